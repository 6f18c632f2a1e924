"""Batch norm, synced batch norm and norms of single images, at 1 to 32 images per rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.tools.common.decision import Difference, Rule
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.experiment import (
    COSINE_NOTE,
    DATA_NOTE,
    NORMS,
    NUM_GROUPS,
    WIDTHS,
    Recipe,
    batches,
    build_net,
    correct,
    fit,
    load_images,
    net_note,
    with_norm,
)
from syncnorm.tools.study.findings import Runs, by_level, difference, levels, runs, support, verdict
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
from syncnorm.training import recalibrate

SIZE = "images a rank"
SIZE_TEXT = "images per rank"
SIZES = (1, 2, 4, 8, 16, 32)
QUICK_SIZES = (2, 32)
# Learning rates are per 32 images of the global batch, as in Wu and He, and scale linearly with it.
RATE_IMAGES = 32
# Images per rank at which learning rates are tuned -> the candidates. Sizes up to 4 use the rates tuned at the
# first, larger ones those tuned at the last.
TUNED = {2: (0.05, 0.1, 0.2), 16: (0.1, 0.2, 0.4)}
LARGEST_SMALL = 4
RECALIBRATION_IMAGES = 128
RECALIBRATED = "BN, recalibrated"
# The norms whose statistics depend on the rank's whole batch, or on all ranks: they train on all ranks.
BATCH_NORMS = ("BN", "SyncBN")
# Pixels of the last convolution's output in each direction.
LAST_SIDE = 2
# The findings compare the first of each pair with the second.
PAIRS = (("BN", "SyncBN"), ("GN", "BN"), ("GN", "SyncBN"), (RECALIBRATED, "BN"), (RECALIBRATED, "SyncBN"))
# Images per rank below which GN is ahead in Wu and He.
CROSSING = 16

# Images per rank at which it was tuned -> norm -> learning rate.
_Rates = Mapping[int, Mapping[Value, float]]


def train(trial: Trial, ranks: Ranks, together: bool) -> list[StudyRow]:
    """Trains and tests; without the other ranks, on the whole global batch.

    The gradient is then the one that DDP would average over the ranks.
    """
    norm, size = trial.condition["norm"], int(trial.condition[SIZE])
    images = load_images()
    model = with_norm(build_net(trial.seed), norm)
    module: nn.Module = DistributedDataParallel(model) if together else model
    global_batch = ranks.world_size * size
    part = slice(ranks.rank * size, (ranks.rank + 1) * size) if together else slice(None)
    recipe = Recipe(trial.lr * global_batch / RATE_IMAGES, trial.steps)
    fit(module, batches(images.train_x, images.train_y, global_batch, trial.seed, part), recipe)
    if trial.tuning:
        return [trial.accuracy(VALIDATION_ACCURACY, correct(model, images.validation_x, images.validation_y))]
    row = trial.accuracy("accuracy", correct(model, images.test_x, images.test_y))
    if norm != "BN":
        return [row]
    data = batches(images.train_x, images.train_y, global_batch, trial.seed, part)
    recalibrate(model, (x for x, _ in data), RECALIBRATION_IMAGES // size)
    recalibrated = correct(model, images.test_x, images.test_y)
    return [row, StudyRow.of_images({**row.condition, "norm": RECALIBRATED}, row.seed, "accuracy", recalibrated)]


def _trials(trials: Iterable[Trial]) -> Trials:
    together, alone = list[Trial](), list[Trial]()
    for trial in trials:
        (together if trial.condition["norm"] in BATCH_NORMS else alone).append(trial)
    return Trials(together, alone)


def _tuning(settings: StudySettings) -> Trials:
    return _trials(
        Trial({"norm": norm, SIZE: size}, lr, FIRST_TUNING_SEED, _steps(settings, size), tuning=True)
        for size in ([max(TUNED)] if settings.quick else TUNED)
        for lr in TUNED[size]
        for norm in NORMS
    )


def _measured(settings: StudySettings, rates: _Rates) -> Trials:
    def rate(norm: Value, size: int) -> float:
        return rates[min(rates) if size <= LARGEST_SMALL else max(rates)][norm]

    return _trials(
        Trial({"norm": norm, SIZE: size}, rate(norm, size), seed, _steps(settings, size))
        for seed in range(settings.seeds)
        for size in (QUICK_SIZES if settings.quick else SIZES)
        for norm in NORMS
    )


def _steps(settings: StudySettings, size: int) -> int:
    """Every batch size sees as many images as the largest."""
    return settings.steps * max(SIZES) // size


def num_stages(settings: StudySettings) -> int:
    """Number of training runs of rank 0."""
    some_rates = {max(TUNED): dict.fromkeys(NORMS, 0.1)}
    return sum(t.num_stages(settings.world_size) for t in (_tuning(settings), _measured(settings, some_rates)))


def run(settings: StudySettings, ranks: Ranks, tell: Tell) -> Outcome:
    """Tunes a learning rate for each norm at two batch sizes, then trains all. Collective: all ranks."""
    tuned = run_trials(_tuning(settings), train, ranks, tell)
    rates = {
        int(size): best_rates([row for row in tuned if row.condition[SIZE] == size], "norm")
        for size in levels(tuned, SIZE)
    }
    rows = run_trials(_measured(settings, rates), train, ranks, tell)
    return Outcome([*tuned, *rows], _notes(settings, rates))


def _notes(settings: StudySettings, rates: _Rates) -> dict[str, str]:
    num_images = settings.steps * max(SIZES) * settings.world_size
    tuned = "; ".join(
        f"at {size} {SIZE_TEXT}, from {rates_text(TUNED[size])}: {rates_text(best)}" for size, best in rates.items()
    )
    return {
        "data": f"{DATA_NOTE} Each run sees {num_images:,} images, whatever its batch size.",
        "model": f"{net_note(WIDTHS)}, {NUM_GROUPS} groups in GN; with 1 image per rank, each channel of the last "
        f"norm has {LAST_SIDE**2} values. {COSINE_NOTE}.",
        "ranks": "BN (statistics per rank; the buffers are those of rank 0) and SyncBN train on "
        f"{settings.world_size} ranks with DDP; GN, LN and IN, which do not depend on other ranks, train in one "
        f"process on the whole batch. '{RECALIBRATED}' is the BN network after syncnorm.training.recalibrate with "
        f"{RECALIBRATION_IMAGES} images per rank.",
        "learning rates": f"per {RATE_IMAGES} images, scaled linearly with the batch size; for each norm the one "
        f"with the best validation accuracy, with a seed that is not used for the results: {tuned}. Runs with up to "
        f"{LARGEST_SMALL} {SIZE_TEXT} use the first set, the others the last.",
    }


def find(rows: Sequence[StudyRow], rule: Rule) -> list[str]:
    """Where local BN falls behind, where GN overtakes it, what recalibration gains, what small batches cost."""
    measured = [row for row in rows if row.measure == "accuracy"]
    sizes = sorted(levels(measured, SIZE), key=float)

    def at(norm: Value, size: Value) -> Runs:
        return runs(measured, "accuracy", **{"norm": norm, SIZE: size})

    def by_size(norm: str, other: str) -> dict[Value, Difference]:
        return {size: difference(at(norm, size), at(other, size), rule) for size in sizes}

    smallest, largest = sizes[0], sizes[-1]
    changes = {norm: difference(at(norm, smallest), at(norm, largest), rule) for norm in levels(measured, "norm")}
    return [
        *(by_level(norm, other, SIZE_TEXT, by_size(norm, other)) for norm, other in PAIRS),
        by_level(
            *(f"a batch of {smallest} per rank", f"one of {largest} (as many images in fewer steps)", "norm"), changes
        ),
        _verdict(by_size("GN", "BN")),
    ]


def _verdict(gn_bn: Mapping[Value, Difference]) -> str:
    return verdict(
        f"GN is ahead of BN below {CROSSING} {SIZE_TEXT} and behind it from there on",
        [support(found, "better" if float(size) < CROSSING else "worse") for size, found in gn_bn.items()],
    )


def views(rows: Sequence[StudyRow]) -> list[View]:
    """Accuracy against images per rank."""
    return [View(f"Test accuracy by {SIZE_TEXT}", "accuracy", "norm", SIZE, {}, scale="log")]


QUESTION = Question(
    name="batch-size",
    about="BN, SyncBN, GN, LN and IN at 1 to 32 images per rank.",
    question="How few images per rank does batch norm work with, and which norm is better below that?",
    claim=Claim(
        "the error of batch norm grows as the batch per worker shrinks, that of group norm does not; GN is behind BN "
        "at 16 and 32 images per worker and ahead of it below 16",
        "Wu and He 2018, Group Normalization, table 2",
    ),
    seeds=3,
    steps=40,
    steps_help="Optimizer steps at 32 images per rank (smaller batches take more, to see as many images)",
    quick_steps=4,
    num_stages=num_stages,
    run=run,
    find=find,
    views=views,
)
