"""Which rank's running statistics a checkpoint holds after DataParallel, DDP and synced batch norm, and the cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.comm.process_groups import no_sync_stats
from syncnorm.tools.common.data_parallel import EmulatedDataParallel
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.experiment import (
    COSINE_NOTE,
    DATA_NOTE,
    WIDTHS,
    Images,
    Recipe,
    accuracy,
    batches,
    build_net,
    fit,
    load_images,
    net_note,
    with_norm,
)
from syncnorm.tools.study.findings import by_level, difference, levels, values
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
# Condition "images" -> an order of the training images, of which each rank trains on a contiguous part.
ORDERS: dict[Value, Callable[[Images], Tensor]] = {
    "shuffled": lambda images: torch.randperm(len(images.train_y), generator=torch.Generator().manual_seed(0)),
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
        ddp = DistributedDataParallel(model, forward_sync_buffers=arm != OWN_BUFFERS)
        fit(ddp, streams[ranks.rank], recipe)
    elif ranks.rank == 0:
        fit(EmulatedDataParallel(model, ranks.world_size), _concatenated(streams), recipe)
    if arm != OWN_BUFFERS:
        # DDP would broadcast rank 0's buffers in the next forward, but there is none.
        model.load_state_dict(ranks.share(model.state_dict() if ranks.rank == 0 else None))
    inputs = [x for x, _ in (next(streams[ranks.rank]) for _ in range(RECALIBRATION_BATCHES))]
    if trial.tuning:
        recalibrate(model, inputs)
        validated = accuracy(model, images.validation_x, images.validation_y)
        return [StudyRow({"norm": _norm(arm), "lr": trial.lr}, trial.seed, VALIDATION_ACCURACY, validated)]
    return _tested(trial, model, images, inputs, ranks)


def _norm(arm: Value) -> str:
    return "SyncBN" if arm == SYNC else "BN"


def _concatenated(streams: Sequence[Iterator[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    for parts in zip(*streams, strict=True):
        yield torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _tested(trial: Trial, model: nn.Module, images: Images, inputs: list[Tensor], ranks: Ranks) -> list[StudyRow]:
    def tested(network: nn.Module) -> float:
        return accuracy(network, images.test_x, images.test_y)

    def row(arm: Value, measure: str, value: float, **more: Value) -> StudyRow:
        condition = {"arm": arm, "images": trial.condition["images"], **more}
        return StudyRow(condition, trial.seed, measure, value)

    arm = trial.condition["arm"]
    recalibrated = copy.deepcopy(model)
    recalibrate(recalibrated, inputs)
    if arm == OWN_BUFFERS:
        merged = copy.deepcopy(model)
        merge_buffers(merged)
        by_arm = {LAST: ranks.collect(tested(model))[-1], MERGED: tested(merged), RECALIBRATED: tested(recalibrated)}
        return [row(name, "accuracy", value) for name, value in by_arm.items()]
    of_this_rank = copy.deepcopy(model)
    with no_sync_stats():
        recalibrate(of_this_rank, inputs)
    by_rank = ranks.collect(distance(model, of_this_rank))
    distances = zip(REFERENCES, (by_rank[0], by_rank[-1], distance(model, recalibrated)), strict=True)
    return [
        row(arm, "accuracy", tested(model)),
        *(row(arm, "distance", value, **{"statistics of": reference}) for reference, value in distances),
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
            Trial({"arm": arm, "images": "shuffled"}, lr, FIRST_TUNING_SEED, settings.steps, tuning=True)
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


def find(rows: Sequence[StudyRow]) -> list[str]:
    """Which statistics the buffers are closest to, how that affects accuracy, and what restores it."""
    orders = levels(rows, "images")

    def at(arm: str, order: Value) -> dict[int, float]:
        return values(rows, "accuracy", arm=arm, images=order)

    found = [
        f"Images {order}, the statistics closest to the buffers (distances in standard deviations): "
        f"{'; '.join(_closest(rows, arm, order) for arm in (DP, DDP, SYNC))}."
        for order in orders
    ]
    found += [
        by_level(arm, other, "images", {order: difference(at(arm, order), at(other, order)) for order in orders})
        for arm, other in PAIRS
    ]
    return found


def _closest(rows: Sequence[StudyRow], arm: str, order: Value) -> str:
    distances = {
        reference: values(rows, "distance", arm=arm, images=order, **{"statistics of": reference})
        for reference in REFERENCES
    }
    closest = {min(REFERENCES, key=lambda name: distances[name][seed]) for seed in distances[REFERENCES[0]]}
    verdict = f"those of {closest.pop()} for every seed" if len(closest) == 1 else "the seeds do not agree"
    means = ", ".join(f"{name} {fmean(by_seed.values()):.2f}" for name, by_seed in distances.items())
    return f"in {arm} {verdict} ({means})"


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
