"""Which rank's running statistics a checkpoint holds after DataParallel, DDP and synced batch norm, and the cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm._torch_versions import ddp_without_buffers
from syncnorm.comm.process_groups import no_sync_stats
from syncnorm.tools.common.data_parallel import EmulatedDataParallel
from syncnorm.tools.common.decision import Difference, Rule
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.experiment import (
    COSINE_NOTE,
    DATA_NOTE,
    WIDTHS,
    Images,
    Recipe,
    batches,
    build_net,
    correct,
    fit,
    load_images,
    net_note,
    with_norm,
)
from syncnorm.tools.study.findings import (
    Runs,
    by_level,
    difference,
    ends,
    levels,
    number,
    runs,
    support,
    verdict,
    would_decide,
)
from syncnorm.tools.study.records import Claim, Outcome, Question, StudyRow, StudySettings, Value, View
from syncnorm.tools.study.trials import (
    FIRST_TUNING_SEED,
    VALIDATION_ACCURACY,
    Trial,
    Trials,
    best_rates,
    rates_text,
    run_trials,
)
from syncnorm.training import merge_buffers, recalibrate
from syncnorm.training.buffers import running_stats, tracking_layers

BATCH = 16
RATES = (0.05, 0.1, 0.2)
RECALIBRATION_BATCHES = 20
DP, DDP, LAST, MERGED, RECALIBRATED, SYNC = (
    "DataParallel (emulated)",
    "DDP",
    "DDP, last rank's",
    "DDP + merge_buffers",
    "DDP + recalibrate",
    "SyncBN",
)
# A run of DDP in which each rank keeps its buffers; it gives the rows of LAST, MERGED and RECALIBRATED.
OWN_BUFFERS = "DDP, own buffers"
# The findings compare the first of each pair with the second.
PAIRS = ((DP, DDP), (DDP, SYNC), (MERGED, DDP), (RECALIBRATED, DDP), (MERGED, SYNC), (RECALIBRATED, SYNC))
SHUFFLED = "shuffled"
# Condition "images" -> an order of the training images, of which each rank trains on a contiguous part.
ORDERS: dict[Value, Callable[[Images], Tensor]] = {
    SHUFFLED: lambda images: torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(0)),
    "by brightness": lambda images: images.train_x.mean((1, 2, 3)).argsort(stable=True),
    "by digit": lambda images: images.train_y.argsort(stable=True),
}
# The statistics that buffers are compared with.
REFERENCES = ("rank 0", "the last rank", "all ranks")


def shares(images: Images, order: Value, world_size: int) -> list[Tensor]:
    """Indices of each rank's training images: contiguous parts, of equal size, of ``order``, a key of `ORDERS`."""
    size = len(images.train_y) // world_size
    return list(torch.split(ORDERS[order](images)[: size * world_size], size))


def train(trial: Trial, ranks: Ranks, together: bool) -> list[StudyRow]:
    """Trains one arm and tests what its checkpoint would hold; all trials run on all ranks.

    Collective: all ranks. DataParallel trains on rank 0 alone, which then shares its model.
    """
    images, arm = load_images(), trial.condition["arm"]
    model = with_norm(build_net(trial.seed), _norm(arm))
    streams = [
        batches(images.train_x[share], images.train_y[share], BATCH, trial.seed)
        for share in shares(images, trial.condition["images"], ranks.world_size)
    ]
    recipe = Recipe(trial.lr, trial.steps)
    if arm != DP:
        ddp = DistributedDataParallel(model, **(ddp_without_buffers() if arm == OWN_BUFFERS else {}))
        fit(ddp, streams[ranks.rank], recipe)
    elif ranks.rank == 0:
        fit(EmulatedDataParallel(model, ranks.world_size), _concatenated(streams), recipe)
    if arm != OWN_BUFFERS:
        # DDP would broadcast rank 0's buffers in the next forward, but there is none.
        model.load_state_dict(ranks.share(model.state_dict() if ranks.rank == 0 else None))
    inputs = [x for x, _ in (next(streams[ranks.rank]) for _ in range(RECALIBRATION_BATCHES))]
    if trial.tuning:
        recalibrate(model, inputs)
        validated = correct(model, images.validation_x, images.validation_y)
        condition: dict[str, Value] = {"norm": _norm(arm), "lr": trial.lr}
        return [StudyRow.of_images(condition, trial.seed, VALIDATION_ACCURACY, validated)]
    return _tested(trial, model, images, inputs, ranks)


def _norm(arm: Value) -> str:
    return "SyncBN" if arm == SYNC else "BN"


def _concatenated(streams: Sequence[Iterator[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    for parts in zip(*streams, strict=True):
        yield torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _tested(trial: Trial, model: nn.Module, images: Images, inputs: list[Tensor], ranks: Ranks) -> list[StudyRow]:
    def tested(network: nn.Module) -> Tensor:
        return correct(network, images.test_x, images.test_y)

    def condition(arm: Value) -> dict[str, Value]:
        return {"arm": arm, "images": trial.condition["images"]}

    def accuracy(arm: Value, correct_N: Tensor) -> StudyRow:
        return StudyRow.of_images(condition(arm), trial.seed, "accuracy", correct_N)

    arm = trial.condition["arm"]
    recalibrated = copy.deepcopy(model)
    recalibrate(recalibrated, inputs)
    if arm == OWN_BUFFERS:
        merged = copy.deepcopy(model)
        merge_buffers(merged)
        by_arm = {LAST: ranks.collect(tested(model))[-1], MERGED: tested(merged), RECALIBRATED: tested(recalibrated)}
        return [accuracy(name, correct_N) for name, correct_N in by_arm.items()]
    of_this_rank = copy.deepcopy(model)
    with no_sync_stats():
        recalibrate(of_this_rank, inputs)
    by_rank = ranks.collect(distance(model, of_this_rank))
    distances = zip(REFERENCES, (by_rank[0], by_rank[-1], distance(model, recalibrated)), strict=True)
    return [
        accuracy(arm, tested(model)),
        *(
            StudyRow({**condition(arm), "statistics of": reference}, trial.seed, "distance", value)
            for reference, value in distances
        ),
    ]


def distance(model: nn.Module, reference: nn.Module) -> float:
    """Difference of the running means, in standard deviations of ``reference``: root mean square over channels."""
    differences = []
    for layer, reference_layer in zip(
        tracking_layers(model).values(), tracking_layers(reference).values(), strict=True
    ):
        mean, var = running_stats(reference_layer)
        differences.append((running_stats(layer)[0] - mean) / (var + reference_layer.eps).sqrt())
    return float(torch.cat(differences).double().square().mean().sqrt())


def _tuning(settings: StudySettings) -> Trials:
    return Trials(
        [
            Trial({"arm": arm, "images": SHUFFLED}, lr, FIRST_TUNING_SEED, settings.steps, tuning=True)
            for arm in (DDP, SYNC)
            for lr in (RATES[1:2] if settings.quick else RATES)
        ]
    )


def _measured(settings: StudySettings, rates: Mapping[Value, float]) -> Trials:
    return Trials(
        [
            Trial({"arm": arm, "images": order}, rates[_norm(arm)], seed, settings.steps)
            for seed in range(settings.seeds)
            for order in (list(ORDERS)[::2] if settings.quick else ORDERS)
            for arm in (DP, DDP, OWN_BUFFERS, SYNC)
        ]
    )


def num_stages(settings: StudySettings) -> int:
    """Number of training runs of rank 0."""
    some_rates: dict[Value, float] = {"BN": 0.1, "SyncBN": 0.1}
    return sum(t.num_stages(settings.world_size) for t in (_tuning(settings), _measured(settings, some_rates)))


def run(settings: StudySettings, ranks: Ranks, tell: Tell) -> Outcome:
    """Tunes two learning rates, then trains every arm on every order of the images. Collective: all ranks."""
    tuned = run_trials(_tuning(settings), train, ranks, tell)
    rates = best_rates(tuned, "norm")
    rows = run_trials(_measured(settings, rates), train, ranks, tell)
    notes = {
        "data": f"{DATA_NOTE} Each of the {settings.world_size} ranks trains on its own equal share of the training "
        "images, which are shuffled, or sorted by brightness or by digit. The test images are not split.",
        "model": f"{net_note(WIDTHS)}; {settings.steps} steps of {BATCH} images per rank, {COSINE_NOTE}.",
        "arms": f"'{DP}' computes on one device what torch.nn.DataParallel computes on {settings.world_size} GPUs. "
        f"'{DDP}' is torch's default, which broadcasts rank 0's buffers before each forward. With "
        f"forward_sync_buffers=False each rank keeps its own buffers: '{LAST}' are those of the last rank, "
        f"'{MERGED}' all of them merged, '{RECALIBRATED}' recomputed from {RECALIBRATION_BATCHES} batches per rank. "
        "The weights of all of these are the same.",
        "distance": "root mean square over all channels of (running mean - reference mean) / reference standard "
        f"deviation; the reference is computed from {RECALIBRATION_BATCHES} batches of one rank, or of every rank, "
        "with the final weights.",
        "learning rates": f"for BN and for SyncBN the one of {rates_text(RATES)} with the best validation accuracy, "
        "after recalibration, on shuffled images, with a seed that is not used for the results: "
        f"{rates_text(rates)}.",
    }
    return Outcome([*tuned, *rows], notes)


def find(rows: Sequence[StudyRow], rule: Rule) -> list[str]:
    """Which statistics the buffers are closest to, how that affects accuracy, and what restores it."""
    orders = levels(rows, "images")
    # With shuffled images, the statistics of all ranks are about the same.
    unlike = [order for order in orders if order != SHUFFLED]

    def by_order(arm: str, other: str) -> dict[Value, Difference]:
        accuracies = {
            name: {order: runs(rows, "accuracy", arm=name, images=order) for order in orders} for name in (arm, other)
        }
        return {order: difference(accuracies[arm][order], accuracies[other][order], rule) for order in orders}

    restored = by_order(RECALIBRATED, DDP)
    return [
        *(_nearest(rows, order) for order in orders),
        *(by_level(arm, other, "images", by_order(arm, other)) for arm, other in PAIRS),
        verdict(
            f"{DP} and {DDP} keep the statistics of rank 0, where those of the ranks differ,",
            [
                support(found, "better")
                for order in unlike
                for arm in (DP, DDP)
                for found in _closer(rows, arm, order, REFERENCES[0]).values()
            ],
        ),
        verdict(
            "such statistics lower the accuracy, and recomputing them from the whole data restores it,",
            [support(restored[order], "better") for order in unlike],
        ),
    ]


def _nearest(rows: Sequence[StudyRow], order: Value) -> str:
    found = "; ".join(_nearest_of(rows, arm, order) for arm in (DP, DDP, SYNC))
    return f"Images {order}, distances of the buffers, in standard deviations (95% intervals): {found}."


def _nearest_of(rows: Sequence[StudyRow], arm: str, order: Value) -> str:
    distances = _distances(rows, arm, order)
    means = {name: fmean(row.value for row in found.values()) for name, found in distances.items()}
    nearest = min(means, key=lambda name: means[name])
    kinds = {"better": "closer", "equivalent": "equally close", "undecided": "undecided"}
    others = [
        f"{kinds[found.kind]} compared with {other} ({ends(found)}"
        + (f", {would_decide(found)})" if found.kind == "undecided" else ")")
        for other, found in _closer(rows, arm, order, nearest).items()
    ]
    return f"in {arm}, {number(means[nearest])} from those of {nearest}, {' and '.join(others)}"


def _distances(rows: Sequence[StudyRow], arm: str, order: Value) -> dict[str, Runs]:
    return {
        reference: runs(rows, "distance", arm=arm, images=order, **{"statistics of": reference})
        for reference in REFERENCES
    }


def _closer(rows: Sequence[StudyRow], arm: str, order: Value, reference: str) -> dict[str, Difference]:
    """How much closer the buffers are to the statistics of ``reference`` than to each of the others."""
    distances, rule = _distances(rows, arm, order), Rule(share=False, higher_is_better=False)
    return {
        other: difference(distances[reference], found, rule)
        for other, found in distances.items()
        if other != reference
    }


def views(rows: Sequence[StudyRow]) -> list[View]:
    """Accuracy of each arm, and the distances of each arm whose ranks share one set of buffers."""
    return [
        View("Test accuracy of what a checkpoint holds", "accuracy", "arm", "images", {}),
        *(
            View(
                f"Distance between the buffers and the statistics of the ranks, images {order}",
                "distance",
                "arm",
                "statistics of",
                {"images": order},
                unit="number",
            )
            for order in levels(rows, "images")
        ),
    ]


QUESTION = Question(
    name="dp-vs-ddp",
    about="Which rank's running statistics DataParallel, DDP and SyncBN leave.",
    question="Which rank's running statistics does a checkpoint hold, and how does that affect its accuracy?",
    claim=Claim(
        "DataParallel keeps the buffers of the module on the first device, DDP those of rank 0, which it "
        "broadcasts before each forward; running statistics that do not represent the whole data lower the "
        "accuracy, and recomputing them from the whole data restores it",
        "PyTorch's documentation of DataParallel and DistributedDataParallel; Wu and Johnson 2021, Rethinking "
        "'Batch' in BatchNorm, sections 3 and 5",
    ),
    seeds=8,
    steps=100,
    quick_steps=4,
    num_stages=num_stages,
    run=run,
    find=find,
    views=views,
)
