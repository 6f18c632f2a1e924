"""Batch norm before the ReLU, after it, or on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.data import NOTE, batches, load_images
from syncnorm.tools.study.models import Place, build_net
from syncnorm.tools.study.question import Outcome, Question
from syncnorm.tools.study.records import Claim, Row, Settings, Value, View
from syncnorm.tools.study.sentences import by_level, compared
from syncnorm.tools.study.statistics import difference, levels, values
from syncnorm.tools.study.training import Recipe, accuracy, fit
from syncnorm.tools.study.trials import Trials, labelled, run_trials
from syncnorm.tools.study.tuning import FIRST_SEED, MEASURE, best_rates, told

# The claim's place first: the others are compared with it.
NAMES = {"before": "before ReLU", "after": "after ReLU", "both": "both", "none": "no norm"}
WIDTHS = (8, 8, 16, 16, 32, 32)
BATCH = 32
RATES = (0.02, 0.05, 0.1, 0.2)
# Where a run is tested, as parts of its steps.
MARKS = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Trial:
    """One training run."""

    place: Place
    lr: float
    seed: int
    steps: int
    tuning: bool = False

    def __str__(self) -> str:
        return f"{NAMES[self.place]}, lr {self.lr:g}, {'tuning' if self.tuning else f'seed {self.seed}'}"


def _train(trial: Trial, ranks: Ranks, together: bool) -> list[Row]:
    images, model, rows = load_images(), build_net(trial.seed, WIDTHS, trial.place), list[Row]()
    marks = {max(1, round(mark * trial.steps)) for mark in MARKS}

    def test(step: int) -> None:
        condition: dict[str, Value] = {"place": NAMES[trial.place], "steps": step, "lr": trial.lr}
        if trial.tuning:
            if step == trial.steps:
                right = accuracy(model, images.validation_x, images.validation_y)
                rows.append(Row(condition, trial.seed, MEASURE, right))
        elif step in marks:
            rows.append(Row(condition, trial.seed, "accuracy", accuracy(model, images.test_x, images.test_y)))

    data = batches(images.train_x, images.train_y, BATCH, trial.seed)
    fit(model, data, Recipe(trial.lr, trial.steps), after_step=test)
    return rows


def _tuning(settings: Settings) -> Trials[Trial]:
    rates = RATES[1:3] if settings.quick else RATES
    return Trials(
        alone=[
            Trial(place, lr, FIRST_SEED + seed, settings.steps, tuning=True)
            for place in get_args(Place)
            for lr in rates
            for seed in range(1 if settings.quick else 2)
        ]
    )


def _measured(settings: Settings, rates: Mapping[Value, float]) -> Trials[Trial]:
    return Trials(
        alone=[
            Trial(place, rates[NAMES[place]], seed, settings.steps)
            for seed in range(settings.seeds)
            for place in get_args(Place)
        ]
    )


def num_stages(settings: Settings) -> int:
    """Runs of rank 0."""
    some_rates: dict[Value, float] = dict.fromkeys(NAMES.values(), RATES[0])
    return sum(t.num_stages(settings.world_size) for t in (_tuning(settings), _measured(settings, some_rates)))


def run(settings: Settings, ranks: Ranks, tell: Tell) -> Outcome:
    """Tunes a learning rate for each place, then trains every place with every seed. Collective: all ranks."""
    tuned = run_trials(_tuning(settings), _train, ranks, labelled(tell))
    rates = best_rates(tuned, "place")
    rows = run_trials(_measured(settings, rates), _train, ranks, labelled(tell))
    notes = {
        "data": NOTE,
        "model": f"{len(WIDTHS)} convolutions 3x3 of {', '.join(map(str, WIDTHS))} channels, a linear classifier; "
        f"batches of {BATCH}, SGD with momentum 0.9, a learning rate that falls along a cosine. One process a run.",
        "learning rates": f"for each place the best of {', '.join(f'{rate:g}' for rate in RATES)} by accuracy on the "
        f"validation images, over seeds that are not measured: {told(rates)}.",
    }
    return Outcome([*tuned, *rows], notes)


def find(rows: Sequence[Row]) -> list[str]:
    """Which place wins, early and late; where they end; what a norm brings at all."""
    steps = sorted(levels([row for row in rows if row.measure == "accuracy"], "steps"), key=float)
    claimed, *others = NAMES.values()

    def at(name: str, step: Value) -> dict[int, float]:
        return values(rows, "accuracy", place=name, steps=step)

    last = steps[-1]
    return [
        *(
            by_level(name, claimed, "steps", {step: difference(at(name, step), at(claimed, step)) for step in steps})
            for name in others
        ),
        *(f"After {last} steps, {compared(name, at(name, last), claimed, at(claimed, last))}" for name in others),
    ]


def views(rows: Sequence[Row]) -> list[View]:
    """Accuracy against steps."""
    return [View("Test accuracy by number of steps", "accuracy", "place", "steps", {}, scale="log")]


QUESTION = Question(
    name="placement",
    about="Batch norm before the ReLU, after it, or both.",
    question="Does batch norm belong before the ReLU, or after it?",
    claim=Claim(
        "batch norm goes immediately before the nonlinearity, where the distribution of values is closer to a normal "
        "one than behind it",
        "Ioffe and Szegedy 2015, section 3.2",
    ),
    seeds=8,
    steps=300,
    quick_steps=8,
    num_stages=num_stages,
    run=run,
    find=find,
    views=views,
)
