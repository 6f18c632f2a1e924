"""How far each norm, and none, lets the learning rate rise, from good initial weights and from poor ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from torch import nn

from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.data import NOTE, batches, load_images
from syncnorm.tools.study.models import SMALL, Init, build_net
from syncnorm.tools.study.norms import NAMES, NUM_GROUPS, with_norm
from syncnorm.tools.study.question import Outcome, Question
from syncnorm.tools.study.records import Claim, Row, Settings, Value, View
from syncnorm.tools.study.sentences import compared, joined, percent
from syncnorm.tools.study.statistics import levels, values
from syncnorm.tools.study.training import Recipe, accuracy, fit
from syncnorm.tools.study.trials import Trials, labelled, run_trials
from syncnorm.tools.study.tuning import MEASURE, best_rates

WIDTHS = (8, 8, 16, 16, 32, 32)
BATCH = 32
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.6, 1.5)
QUICK_RATES = (0.02, 0.2)
NO_NORM = "no norm"
NORMS: dict[Literal["none", "batch", "group", "layer", "instance"], str] = {
    "none": NO_NORM,
    "batch": NAMES["batch"],
    "group": NAMES["group"],
    "layer": NAMES["layer"],
    "instance": NAMES["instance"],
}
INITS: dict[Init, str] = {"he": "He's weights", "small": f"weights of {SMALL:g}"}
# A network trains at a rate where every seed gets this share of what one without a norm reaches at its best rate.
TRAINS = 0.9
# Ioffe and Szegedy's BN-x5 and BN-x30: multiples of the rate that suits the network without batch norm.
CLAIMED = (5, 30)


@dataclass(frozen=True)
class Trial:
    """One training run."""

    norm: Literal["none", "batch", "group", "layer", "instance"]
    init: Init
    lr: float
    seed: int
    steps: int

    def __str__(self) -> str:
        return f"{NORMS[self.norm]}, {INITS[self.init]}, lr {self.lr:g}, seed {self.seed}"


def train(trial: Trial, ranks: Ranks, together: bool) -> list[Row]:
    """Trains at a constant rate, and tests; every trial runs alone."""
    images = load_images()
    model: nn.Module = build_net(trial.seed, WIDTHS, "none" if trial.norm == "none" else "before", trial.init)
    if trial.norm != "none":
        model = with_norm(model, trial.norm)
    data = batches(images.train_x, images.train_y, BATCH, trial.seed)
    fit(model, data, Recipe(trial.lr, trial.steps, decay=False))
    condition: dict[str, Value] = {"norm": NORMS[trial.norm], "weights": INITS[trial.init], "lr": trial.lr}
    return [
        Row(condition, trial.seed, "accuracy", accuracy(model, images.test_x, images.test_y)),
        Row(condition, trial.seed, MEASURE, accuracy(model, images.validation_x, images.validation_y)),
    ]


def _trials(settings: Settings) -> Trials[Trial]:
    return Trials(
        alone=[
            Trial(norm, init, lr, seed, settings.steps)
            for norm in NORMS
            for init in INITS
            for lr in (QUICK_RATES if settings.quick else RATES)
            for seed in range(settings.seeds)
        ]
    )


def num_stages(settings: Settings) -> int:
    """Runs of rank 0."""
    return _trials(settings).num_stages(settings.world_size)


def run(settings: Settings, ranks: Ranks, tell: Tell) -> Outcome:
    """Trains every norm at every rate from both kinds of weights. Collective: all ranks."""
    rows = run_trials(_trials(settings), train, ranks, labelled(tell))
    notes = {
        "data": NOTE,
        "model": f"{len(WIDTHS)} convolutions 3x3 of {', '.join(map(str, WIDTHS))} channels, {NUM_GROUPS} groups in "
        f"GN, a linear classifier; {settings.steps} steps of SGD with momentum 0.9 at a constant rate, batches of "
        f"{BATCH}. One process a run: BN is what SyncBN is on several ranks.",
        "learning rates": "all of them are shown; where norms are compared at their best rate, it is the best on the "
        "validation images, which the accuracies are not from.",
    }
    return Outcome(rows, notes)


def find(rows: Sequence[Row]) -> list[str]:
    """How many times the best rate without a norm each norm bears, and what each reaches at its own best rate."""
    good = INITS["he"]
    best = {weights: best_rates(_of(rows, weights), "norm") for weights in levels(rows, "weights")}
    base = best[good][NO_NORM]
    reached = values(rows, "accuracy", norm=NO_NORM, weights=good, lr=base)
    enough = TRAINS * fmean(reached.values())
    found = [
        f"From {good} without a norm, the best rate is {base:g}, where the network reaches {percent(reached)}; a "
        f"network is said to train at a rate where every seed reaches {TRAINS:.0%} of that."
    ]
    for weights in levels(rows, "weights"):
        highest = {norm: _highest(_of(rows, weights), norm, enough) for norm in levels(rows, "norm")}
        told = [
            f"{name} at none" if rate is None else f"{name} up to {rate / base:.3g} times"
            for name, rate in highest.items()
        ]
        found.append(
            f"From {weights}, in multiples of {base:g}, the rates at which a network trains: {joined(told)}."
        )
        found.append(_verdict(weights, highest, base))
        found += [
            f"From {weights}, each at its best rate, "
            + compared(
                *(f"{norm} ({best[weights][norm]:g})", _at(rows, norm, weights, best[weights][norm])),
                *(f"{NO_NORM} ({best[weights][NO_NORM]:g})", _at(rows, NO_NORM, weights, best[weights][NO_NORM])),
            )
            for norm in levels(rows, "norm")
            if norm != NO_NORM
        ]
    return found


def _of(rows: Sequence[Row], weights: Value) -> list[Row]:
    return [row for row in rows if row.condition["weights"] == weights]


def _at(rows: Sequence[Row], norm: Value, weights: Value, lr: float) -> dict[int, float]:
    return values(rows, "accuracy", norm=norm, weights=weights, lr=lr)


def _highest(rows: Sequence[Row], norm: Value, enough: float) -> float | None:
    rates = sorted(float(lr) for lr in levels(rows, "lr"))
    return max(
        (lr for lr in rates if min(values(rows, "accuracy", norm=norm, lr=lr).values()) >= enough), default=None
    )


def _verdict(weights: Value, highest: Mapping[Value, float | None], base: float) -> str:
    # Rates are decimal, their ratios are not: 0.1 / 0.02 may fall short of 5 by a rounding.
    bn, none = ((highest[norm] or 0.0) / base * (1 + 1e-9) for norm in (NAMES["batch"], NO_NORM))
    borne = [times for times in CLAIMED if bn >= times]
    held = f"{joined(borne)} times" if borne else "none"
    claim = f"From {weights}, of the claim's {joined(CLAIMED)} times the best rate without a norm, BN bears {held}"
    least = min(CLAIMED)
    return f"{claim}; without a norm {least} times is {'not ' if none >= least else ''}too much."


def views(rows: Sequence[Row]) -> list[View]:
    """Accuracy against the rate, a panel for each kind of weights."""
    return [
        View(f"Test accuracy from {weights}", "accuracy", "norm", "lr", {"weights": weights}, scale="log")
        for weights in levels(rows, "weights")
    ]


QUESTION = Question(
    name="learning-rate",
    about="How far each norm lets the learning rate rise.",
    question="How far does each norm let the learning rate rise, with and without good initial weights?",
    claim=Claim(
        "with batch norm a network trains at 5 and at 30 times the learning rate that is best without it, where 5 "
        "times that rate is too much for the network without it; it is also less sensitive to its initial weights",
        "Ioffe and Szegedy 2015, Batch Normalization, sections 1, 3.3 and 4.2",
    ),
    seeds=5,
    steps=100,
    quick_steps=4,
    num_stages=num_stages,
    run=run,
    find=find,
    views=views,
)
