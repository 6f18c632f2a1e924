"""How high a learning rate each norm, and no norm, allows, with good initial weights and with poor ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from torch import nn

from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.experiment import (
    DATA_NOTE,
    NUM_GROUPS,
    OPTIMIZER_NOTE,
    SMALL_STD,
    Init,
    Recipe,
    accuracy,
    batches,
    build_net,
    fit,
    load_images,
    net_note,
    with_norm,
)
from syncnorm.tools.study.findings import compared, joined, levels, percent, values
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
# A network counts as trained if every seed reaches this fraction of the best accuracy without a norm.
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
        trial.row("accuracy", accuracy(model, images.test_x, images.test_y)),
        trial.row(VALIDATION_ACCURACY, accuracy(model, images.validation_x, images.validation_y)),
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


def find(rows: Sequence[StudyRow]) -> list[str]:
    """How high each norm lets the learning rate be, compared with no norm, and the accuracies at the best rates."""
    best = {weights: best_rates(_of(rows, weights), "norm") for weights in levels(rows, "weights")}
    base = best[HE][NO_NORM]
    reached = _at(rows, NO_NORM, HE, base)
    enough = TRAINED_FRACTION * fmean(reached.values())
    found = [
        f"With {HE} and without a norm, the best learning rate is {base:g}, at which the network reaches "
        f"{percent(reached)}. Here a network trains at a learning rate if every seed reaches "
        f"{TRAINED_FRACTION:.0%} of that accuracy."
    ]
    for weights in levels(rows, "weights"):
        highest = {norm: _highest(_of(rows, weights), norm, enough) for norm in levels(rows, "norm")}
        multiples = [f"{norm}: {'none' if lr is None else f'{lr / base:.3g}'}" for norm, lr in highest.items()]
        found.append(
            f"With {weights}, the highest learning rate at which a network trains, in multiples of {base:g}: "
            f"{joined(multiples)}."
        )
        found.append(_verdict(weights, highest, base))
        found += [
            f"With {weights}, each at its best learning rate, "
            + compared(
                *(f"{norm} ({best[weights][norm]:g})", _at(rows, norm, weights, best[weights][norm])),
                *(f"{NO_NORM} ({best[weights][NO_NORM]:g})", _at(rows, NO_NORM, weights, best[weights][NO_NORM])),
            )
            for norm in levels(rows, "norm")
            if norm != NO_NORM
        ]
    return found


def _of(rows: Sequence[StudyRow], weights: Value) -> list[StudyRow]:
    return [row for row in rows if row.condition["weights"] == weights]


def _at(rows: Sequence[StudyRow], norm: Value, weights: Value, lr: float) -> dict[int, float]:
    return values(rows, "accuracy", norm=norm, weights=weights, lr=lr)


def _highest(rows: Sequence[StudyRow], norm: Value, enough: float) -> float | None:
    """The highest learning rate at which every seed reaches the accuracy ``enough``."""
    rates = sorted(float(lr) for lr in levels(rows, "lr"))
    return max(
        (lr for lr in rates if min(values(rows, "accuracy", norm=norm, lr=lr).values()) >= enough), default=None
    )


def _verdict(weights: Value, highest: Mapping[Value, float | None], base: float) -> str:
    # The quotient of two decimal numbers may round down: 0.1 / 0.02 to less than 5.
    bn, none = ((highest[norm] or 0.0) / base * (1 + 1e-9) for norm in ("BN", NO_NORM))
    trains = [times for times in CLAIMED if bn >= times]
    least = min(CLAIMED)
    return (
        f"With {weights}, of the claimed {joined(CLAIMED)} times the best learning rate without a norm, BN trains at "
        f"{f'{joined(trains)} times' if trains else 'none'}; without a norm, {least} times is "
        f"{'not ' if none >= least else ''}too high."
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
