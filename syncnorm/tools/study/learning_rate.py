"""How high a learning rate each norm, and no norm, allows, with good initial weights and with poor ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import nn

from syncnorm.tools.common.decision import Rule
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.experiment import (
    DATA_NOTE,
    NUM_GROUPS,
    OPTIMIZER_NOTE,
    SMALL_STD,
    Init,
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
    Support,
    compared,
    difference,
    levels,
    percent,
    runs,
    values,
    verdict,
)
from syncnorm.tools.study.records import Claim, Outcome, Question, StudyRow, StudySettings, Value, View
from syncnorm.tools.study.trials import VALIDATION_ACCURACY, Trial, Trials, best_rates, run_trials

WIDTHS = (8, 8, 16, 16, 32, 32)
BATCH = 32
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.6, 1.5)
QUICK_RATES = (0.02, 0.2)
NO_NORM = "no norm"
COMPARED_NORMS = (NO_NORM, "BN", "GN", "LN", "IN")
HE = "He initialization"
INITS: dict[Value, Init] = {HE: "he", f"weights of std {SMALL_STD:g}": "small"}
# A network counts as trained if its mean accuracy is at least this fraction of the best without a norm.
TRAINED_FRACTION = 0.9
# Ioffe and Szegedy's BN-x5 and BN-x30: multiples of the learning rate for the network without batch norm.
CLAIMED = (5, 30)


def train(trial: Trial, ranks: Ranks, together: bool) -> list[StudyRow]:
    """Trains at a constant learning rate, and tests; every trial runs alone."""
    images, norm = load_images(), trial.condition["norm"]
    init = INITS[trial.condition["weights"]]
    model: nn.Module = build_net(trial.seed, WIDTHS, "none" if norm == NO_NORM else "before", init)
    if norm != NO_NORM:
        model = with_norm(model, norm)
    data = batches(images.train_x, images.train_y, BATCH, trial.seed)
    fit(model, data, Recipe(trial.lr, trial.steps, decay=False))
    return [
        trial.accuracy("accuracy", correct(model, images.test_x, images.test_y)),
        trial.accuracy(VALIDATION_ACCURACY, correct(model, images.validation_x, images.validation_y)),
    ]


def _trials(settings: StudySettings) -> Trials:
    return Trials(
        alone=[
            Trial({"norm": norm, "weights": weights}, lr, seed, settings.steps)
            for norm in COMPARED_NORMS
            for weights in INITS
            for lr in (QUICK_RATES if settings.quick else RATES)
            for seed in range(settings.seeds)
        ]
    )


def num_stages(settings: StudySettings) -> int:
    """Number of training runs of rank 0."""
    return _trials(settings).num_stages(settings.world_size)


def run(settings: StudySettings, ranks: Ranks, tell: Tell) -> Outcome:
    """Trains every norm at every learning rate from both kinds of initial weights. Collective: all ranks."""
    rows = run_trials(_trials(settings), train, ranks, tell)
    notes = {
        "data": DATA_NOTE,
        "model": f"{net_note(WIDTHS)}, {NUM_GROUPS} groups in GN; {settings.steps} steps of {OPTIMIZER_NOTE} at a "
        f"constant learning rate, batches of {BATCH}. One process per run: BN there is what SyncBN is on several "
        "ranks.",
        "learning rates": "all of them are shown; the best rate of a norm is the one with the best validation "
        "accuracy, while the accuracies shown are those on the test images.",
    }
    return Outcome(rows, notes)


def find(rows: Sequence[StudyRow], rule: Rule) -> list[str]:
    """How high each norm lets the learning rate be, compared with no norm, and the accuracies at the best rates."""
    best = {weights: best_rates(_of(rows, weights), "norm") for weights in levels(rows, "weights")}
    base = best[HE][NO_NORM]
    reached = values(rows, "accuracy", norm=NO_NORM, weights=HE, lr=base)
    found = [
        f"With {HE} and without a norm, the best learning rate is {base:g}, at which the network reaches "
        f"{percent(reached)}. Here a network trains at a learning rate if its accuracy is at least "
        f"{TRAINED_FRACTION:.0%} of that (95% intervals)."
    ]
    for weights in levels(rows, "weights"):
        highest = {norm: _highest(rows, norm, weights, base) for norm in levels(rows, "norm")}
        found.append(
            f"With {weights}, the highest learning rate at which a network trains, in multiples of {base:g}: "
            f"{'; '.join(f'{norm}: {rates}' for norm, rates in highest.items())}."
        )
        found.append(_verdict(weights, highest))
        found += [
            f"With {weights}, each at its best learning rate, "
            + compared(
                *(f"{norm} ({best[weights][norm]:g})", _at(rows, norm, weights, best[weights][norm])),
                *(f"{NO_NORM} ({best[weights][NO_NORM]:g})", _at(rows, NO_NORM, weights, best[weights][NO_NORM])),
                rule,
            )
            for norm in levels(rows, "norm")
            if norm != NO_NORM
        ]
    return found


def _of(rows: Sequence[StudyRow], weights: Value) -> list[StudyRow]:
    return [row for row in rows if row.condition["weights"] == weights]


def _at(rows: Sequence[StudyRow], norm: Value, weights: Value, lr: float) -> Runs:
    return runs(rows, "accuracy", norm=norm, weights=weights, lr=lr)


@dataclass(frozen=True)
class _Highest:
    """The highest learning rates of a norm, in multiples of the best rate without a norm; 0 if there is none.

    Attributes:
        trains: at which the network trains.
        possible: at which it trains, or it is undecided whether it does.
        tested: of all.
    """

    trains: float
    possible: float
    tested: float

    def __str__(self) -> str:
        undecided = f", undecided up to {self.possible:.3g}" if self.possible > self.trains else ""
        return f"{f'{self.trains:.3g}' if self.trains else 'none'}{undecided}"

    def at(self, times: float) -> Support:
        """Whether it trains at ``times`` the best rate without a norm, or at more."""
        if self.trains >= times:
            return "supports"
        return "contradicts" if self.possible < times <= self.tested else "open"


def _highest(rows: Sequence[StudyRow], norm: Value, weights: Value, base: float) -> _Highest:
    reference = _at(rows, NO_NORM, HE, base)
    missing = 100 * (1 - TRAINED_FRACTION) * fmean(row.value for row in reference.values())
    trains, possible, rates = [0.0], [0.0], [float(lr) for lr in levels(_of(rows, weights), "lr")]
    for lr in rates:
        found = difference(_at(rows, norm, weights, lr), reference, Rule(margin=missing))
        # The quotient of two decimal numbers may round down: 0.1 / 0.02 to less than 5.
        times = lr / base * (1 + 1e-9)
        if found.high >= -missing:
            possible.append(times)
        if found.low >= -missing:
            trains.append(times)
    return _Highest(max(trains), max(possible), max(rates) / base * (1 + 1e-9))


def _verdict(weights: Value, highest: Mapping[Value, _Highest]) -> str:
    low, high = CLAIMED
    without: dict[Support, Support] = {"supports": "contradicts", "contradicts": "supports", "open": "open"}
    return verdict(
        f"BN trains at {low} and at {high} times the best learning rate without a norm, and that {low} times is too "
        f"high without one, with {weights},",
        [highest["BN"].at(low), highest["BN"].at(high), without[highest[NO_NORM].at(low)]],
    )


def views(rows: Sequence[StudyRow]) -> list[View]:
    """Accuracy against the learning rate, one view per kind of initial weights."""
    return [
        View(f"Test accuracy with {weights}", "accuracy", "norm", "lr", {"weights": weights}, scale="log")
        for weights in levels(rows, "weights")
    ]


QUESTION = Question(
    name="learning-rate",
    about="How high a learning rate each norm allows.",
    question="How high a learning rate does each norm allow, with and without good initial weights?",
    claim=Claim(
        "with batch norm a network trains at 5 and at 30 times the learning rate that is best without it, while 5 "
        "times that rate is too high for the network without it; it is also less sensitive to its initial weights",
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
