"""Batch norm before the ReLU, after it, or on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from syncnorm.tools.common.decision import Rule
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.experiment import (
    COSINE_NOTE,
    DATA_NOTE,
    Placement,
    Recipe,
    batches,
    build_net,
    correct,
    fit,
    load_images,
    net_note,
)
from syncnorm.tools.study.findings import Runs, by_level, compared, difference, levels, runs, support, verdict
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

BEFORE, AFTER = "before ReLU", "after ReLU"
# The placement of the claim first: the others are compared with it.
PLACEMENTS: dict[Value, Placement] = {
    BEFORE: "before",
    AFTER: "after",
    "both": "both",
    "no norm": "none",
}
WIDTHS = (8, 8, 16, 16, 32, 32)
BATCH = 32
RATES = (0.02, 0.05, 0.1, 0.2)
# When a run is tested, as fractions of its steps.
MARKS = (0.125, 0.25, 0.5, 1.0)


def _train(trial: Trial, ranks: Ranks, together: bool) -> list[StudyRow]:
    images, rows = load_images(), list[StudyRow]()
    model = build_net(trial.seed, WIDTHS, PLACEMENTS[trial.condition["place"]])
    marks = {max(1, round(mark * trial.steps)) for mark in MARKS}

    def test(step: int) -> None:
        condition: dict[str, Value] = {**trial.condition, "steps": step, "lr": trial.lr}
        if trial.tuning:
            if step == trial.steps:
                validated = correct(model, images.validation_x, images.validation_y)
                rows.append(StudyRow.of_images(condition, trial.seed, VALIDATION_ACCURACY, validated))
        elif step in marks:
            tested = correct(model, images.test_x, images.test_y)
            rows.append(StudyRow.of_images(condition, trial.seed, "accuracy", tested))

    data = batches(images.train_x, images.train_y, BATCH, trial.seed)
    fit(model, data, Recipe(trial.lr, trial.steps), after_step=test)
    return rows


def _tuning(settings: StudySettings) -> Trials:
    return Trials(
        alone=[
            Trial({"place": place}, lr, FIRST_TUNING_SEED + seed, settings.steps, tuning=True)
            for place in PLACEMENTS
            for lr in (RATES[1:3] if settings.quick else RATES)
            for seed in range(1 if settings.quick else 2)
        ]
    )


def _measured(settings: StudySettings, rates: Mapping[Value, float]) -> Trials:
    return Trials(
        alone=[
            Trial({"place": place}, rates[place], seed, settings.steps)
            for seed in range(settings.seeds)
            for place in PLACEMENTS
        ]
    )


def num_stages(settings: StudySettings) -> int:
    """Number of training runs of rank 0."""
    some_rates = dict.fromkeys(PLACEMENTS, RATES[0])
    return sum(t.num_stages(settings.world_size) for t in (_tuning(settings), _measured(settings, some_rates)))


def run(settings: StudySettings, ranks: Ranks, tell: Tell) -> Outcome:
    """Tunes a learning rate for each placement, then trains each with every seed. Collective: all ranks."""
    tuned = run_trials(_tuning(settings), _train, ranks, tell)
    rates = best_rates(tuned, "place")
    rows = run_trials(_measured(settings, rates), _train, ranks, tell)
    notes = {
        "data": DATA_NOTE,
        "model": f"{net_note(WIDTHS)}; batches of {BATCH}, {COSINE_NOTE}. One process per run.",
        "learning rates": f"for each placement the one of {rates_text(RATES)} with the best validation accuracy, "
        f"with seeds that are not used for the results: {rates_text(rates)}.",
    }
    return Outcome([*tuned, *rows], notes)


def find(rows: Sequence[StudyRow], rule: Rule) -> list[str]:
    """How the placements compare after each number of steps, and at the end."""
    steps = sorted(levels([row for row in rows if row.measure == "accuracy"], "steps"), key=float)
    others = [str(place) for place in PLACEMENTS if place != BEFORE]

    def at(place: str, step: Value) -> Runs:
        return runs(rows, "accuracy", place=place, steps=step)

    last = steps[-1]
    return [
        *(
            by_level(
                place, BEFORE, "steps", {step: difference(at(place, step), at(BEFORE, step), rule) for step in steps}
            )
            for place in others
        ),
        *(
            f"After {last} steps, {compared(place, at(place, last), BEFORE, at(BEFORE, last), rule)}"
            for place in others
        ),
        verdict(
            f"batch norm belongs before the ReLU, not after it, judged after {last} steps,",
            [support(difference(at(BEFORE, last), at(AFTER, last), rule), "better")],
        ),
    ]


def views(rows: Sequence[StudyRow]) -> list[View]:
    """Accuracy against steps."""
    return [View("Test accuracy by number of steps", "accuracy", "place", "steps", {}, scale="log")]


QUESTION = Question(
    name="placement",
    about="Batch norm before the ReLU, after it, or both.",
    question="Does batch norm belong before the ReLU, or after it?",
    claim=Claim(
        "batch norm belongs immediately before the nonlinearity, where the values are closer to a normal "
        "distribution than after it",
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
