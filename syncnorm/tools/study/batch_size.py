"""Local batch norm, synced batch norm, and norms that see one image at a time, at 1 to 32 images a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.data import NOTE, batches, load_images
from syncnorm.tools.study.models import WIDTHS, build_net
from syncnorm.tools.study.norms import NAMES, NUM_GROUPS, Norm, with_norm
from syncnorm.tools.study.question import Outcome, Question
from syncnorm.tools.study.records import Claim, Row, Settings, Value, View
from syncnorm.tools.study.sentences import by_level, joined
from syncnorm.tools.study.statistics import Difference, difference, levels, values
from syncnorm.tools.study.training import Recipe, accuracy, fit
from syncnorm.tools.study.trials import Trials, labelled, run_trials
from syncnorm.tools.study.tuning import FIRST_SEED, MEASURE, best_rates, told
from syncnorm.training import recalibrate

SIZE = "images a rank"
SIZES = (1, 2, 4, 8, 16, 32)
QUICK_SIZES = (2, 32)
# Images a rank at which learning rates are tuned -> those tried, per 32 images of the global batch, as Wu and He
# state theirs. Every size takes the rate of one of these, scaled linearly to its batch.
TUNED = {2: (0.05, 0.1, 0.2), 16: (0.1, 0.2, 0.4)}
LARGEST_SMALL = 4
RATE_IMAGES = 32
# Statistics computed anew see so many images of each rank.
RECALIBRATION_IMAGES = 128
RECALIBRATED = "BN, recalibrated"
# Pixels of the last convolution's output, both ways.
LAST_SIDE = 2
# What is set against what in the findings.
PAIRS = (("BN", "SyncBN"), ("GN", "BN"), ("GN", "SyncBN"), (RECALIBRATED, "BN"), (RECALIBRATED, "SyncBN"))
# Wu and He: GN is ahead below.
CROSSING = 16


@dataclass(frozen=True)
class Trial:
    """One training run; ``lr`` is per 32 images of the global batch."""

    norm: Norm
    images: int
    lr: float
    seed: int
    steps: int
    tuning: bool = False

    def __str__(self) -> str:
        what = "tuning" if self.tuning else f"seed {self.seed}"
        return f"{NAMES[self.norm]}, {self.images} {SIZE}, {self.steps} steps, {what}"

    @property
    def condition(self) -> dict[str, Value]:
        """Of its rows."""
        return {"norm": NAMES[self.norm], SIZE: self.images, "lr": self.lr}


def train(trial: Trial, ranks: Ranks, together: bool) -> list[Row]:
    """Trains and tests; a norm that needs no other rank may do so alone, on the whole batch.

    Alone the gradient is that which DDP would average over the ranks.
    """
    images = load_images()
    model = with_norm(build_net(trial.seed), trial.norm)
    module: nn.Module = DistributedDataParallel(model) if together else model
    global_batch = ranks.world_size * trial.images
    part = slice(ranks.rank * trial.images, (ranks.rank + 1) * trial.images) if together else slice(None)
    recipe = Recipe(trial.lr * global_batch / RATE_IMAGES, trial.steps)
    fit(module, batches(images.train_x, images.train_y, global_batch, trial.seed, part), recipe)
    if trial.tuning:
        right = accuracy(model, images.validation_x, images.validation_y)
        return [Row(trial.condition, trial.seed, MEASURE, right)]
    rows = [Row(trial.condition, trial.seed, "accuracy", accuracy(model, images.test_x, images.test_y))]
    if trial.norm == "batch":
        data = batches(images.train_x, images.train_y, global_batch, trial.seed, part)
        recalibrate(model, (x for x, _ in data), RECALIBRATION_IMAGES // trial.images)
        right = accuracy(model, images.test_x, images.test_y)
        rows.append(Row({**trial.condition, "norm": RECALIBRATED}, trial.seed, "accuracy", right))
    return rows


def _trials(wanted: Sequence[Trial]) -> Trials[Trial]:
    together = [trial for trial in wanted if trial.norm in ("batch", "sync")]
    return Trials(together, [trial for trial in wanted if trial not in together])


def _tuning(settings: Settings) -> Trials[Trial]:
    return _trials(
        [
            Trial(norm, images, lr, FIRST_SEED, _steps(settings, images), tuning=True)
            for images in ([max(TUNED)] if settings.quick else TUNED)
            for lr in TUNED[images]
            for norm in NAMES
        ]
    )


def _measured(settings: Settings, rates: Mapping[int, Mapping[Value, float]]) -> Trials[Trial]:
    return _trials(
        [
            Trial(norm, images, rates[_tuned_at(images, rates)][NAMES[norm]], seed, _steps(settings, images))
            for seed in range(settings.seeds)
            for images in (QUICK_SIZES if settings.quick else SIZES)
            for norm in NAMES
        ]
    )


def _steps(settings: Settings, images: int) -> int:
    """So that every batch size sees as many images as the largest."""
    return settings.steps * max(SIZES) // images


def _tuned_at(images: int, rates: Mapping[int, object]) -> int:
    return min(rates) if images <= LARGEST_SMALL else max(rates)


def num_stages(settings: Settings) -> int:
    """Runs of rank 0."""
    some_rates: dict[int, dict[Value, float]] = {max(TUNED): dict.fromkeys(NAMES.values(), 0.1)}
    return sum(t.num_stages(settings.world_size) for t in (_tuning(settings), _measured(settings, some_rates)))


def run(settings: Settings, ranks: Ranks, tell: Tell) -> Outcome:
    """Tunes a learning rate for each norm at two batch sizes, then trains all. Collective: all ranks."""
    tuned = run_trials(_tuning(settings), train, ranks, labelled(tell))
    rates = {
        int(images): best_rates([row for row in tuned if row.condition[SIZE] == images], "norm")
        for images in levels(tuned, SIZE)
    }
    rows = run_trials(_measured(settings, rates), train, ranks, labelled(tell))
    return Outcome([*tuned, *rows], _notes(settings, rates))


def _notes(settings: Settings, rates: Mapping[int, Mapping[Value, float]]) -> dict[str, str]:
    samples = settings.steps * max(SIZES) * settings.world_size
    return {
        "data": f"{NOTE} A run sees {samples:,} images, whatever its batch.",
        "model": f"{len(WIDTHS)} convolutions 3x3 of {', '.join(map(str, WIDTHS))} channels, {NUM_GROUPS} groups in "
        f"GN, a linear classifier; at 1 image a rank a channel of the last norm has {LAST_SIDE**2} values. SGD with "
        "momentum 0.9, a learning rate that falls along a cosine.",
        "ranks": f"BN (statistics of each rank's images, rank 0's in the buffers) and SyncBN train on "
        f"{settings.world_size} ranks in DDP; GN, LN and IN, which need no other rank, in one process with the whole "
        f"batch. '{RECALIBRATED}' is BN's network after syncnorm.training.recalibrate on {RECALIBRATION_IMAGES} "
        "images of each rank.",
        "learning rates": f"per {RATE_IMAGES} images, scaled linearly with the batch; for each norm the best "
        "by accuracy on the validation images, with a seed that is not measured: "
        + "; ".join(
            f"tuned at {images} {SIZE}, out of {', '.join(f'{rate:g}' for rate in TUNED[images])}: {told(best)}"
            for images, best in rates.items()
        )
        + f". Up to {LARGEST_SMALL} {SIZE} take the first of these, more the last.",
    }


def find(rows: Sequence[Row]) -> list[str]:
    """Where local BN falls behind, where GN crosses it, what recalibration is worth, what small batches cost."""
    measured = [row for row in rows if row.measure == "accuracy"]
    sizes = sorted(levels(measured, SIZE), key=float)

    def at(norm: Value, size: Value) -> dict[int, float]:
        return values(measured, "accuracy", **{"norm": norm, SIZE: size})

    def apart(norm: str, other: str) -> dict[Value, Difference]:
        return {size: difference(at(norm, size), at(other, size)) for size in sizes}

    smallest, largest = sizes[0], sizes[-1]
    changes = {name: difference(at(name, smallest), at(name, largest)) for name in levels(measured, "norm")}
    return [
        *(by_level(norm, other, SIZE, apart(norm, other)) for norm, other in PAIRS),
        f"From {largest} {SIZE} to {smallest}, accuracy changes by "
        + joined([f"{change.points()} ({name})" for name, change in changes.items()])
        + " points (with more and smaller steps over as many images).",
        _verdict(apart("GN", "BN")),
    ]


def _verdict(gn_bn: Mapping[Value, Difference]) -> str:
    below = [d.agreed for size, d in gn_bn.items() if float(size) < CROSSING]
    above = [d.agreed for size, d in gn_bn.items() if float(size) >= CROSSING]
    ahead, behind = below.count(1), above.count(-1)
    whole = ahead == len(below) and behind == len(above)
    held = "is what happens" if whole else "happens in part" if ahead + behind else "does not happen"
    return (
        f"That GN passes BN below {CROSSING} {SIZE} {held} here: GN is ahead at {ahead} of the {len(below)} sizes "
        f"below, and behind at {behind} of the {len(above)} from there on."
    )


def views(rows: Sequence[Row]) -> list[View]:
    """Accuracy against images a rank."""
    return [View(f"Test accuracy by {SIZE}", "accuracy", "norm", SIZE, {}, scale="log")]


QUESTION = Question(
    name="batch-size",
    about="BN, SyncBN, GN, LN and IN at 1 to 32 images a rank.",
    question="How few images a rank can batch norm do with, and which norm takes over below that?",
    claim=Claim(
        "batch norm's error grows as the batch of a worker shrinks, that of group norm does not; GN is behind BN at "
        "16 and 32 images a worker and ahead of it below 16",
        "Wu and He 2018, Group Normalization, table 2",
    ),
    seeds=3,
    steps=40,
    steps_are="Optimiser steps at 32 images a rank (smaller batches take more, to see as many images)",
    quick_steps=4,
    num_stages=num_stages,
    run=run,
    find=find,
    views=views,
)
