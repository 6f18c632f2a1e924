"""What a study is before it runs (`Question`), and its record afterwards (`Study`), which has a JSON schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from syncnorm.tools.common.decision import Rule
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.records import Record
from syncnorm.tools.common.units import encode

ACCURACY = Rule()

Value = str | int | float
Condition = Mapping[str, Value]


@dataclass(frozen=True)
class Claim:
    """What the literature claims, in our words, and the source."""

    text: str
    source: str


@dataclass(frozen=True)
class StudySettings:
    """Everything that determines the rows of a study; equal settings give equal rows.

    Attributes:
        study: name of the study.
        world_size: number of ranks.
        seeds: number of seeds; each condition is run with the seeds 0 to ``seeds - 1``.
        steps: optimizer steps per run; where batch sizes differ, the notes of the record say how they are counted.
        quick: a short run over few conditions, to check that the study works.
        margin: largest difference that does not matter, see `tools.common.decision.Rule`; ``None`` for the default.
    """

    study: str
    world_size: int
    seeds: int
    steps: int
    quick: bool = False
    margin: float | None = None


@dataclass(frozen=True)
class StudyRow:
    """One value measured in one run.

    Attributes:
        condition: what the study varies, by name: ``{"norm": "GN", "lr": 0.1}``.
        seed: of the weights and of the order of the data; rows of equal seed are compared with each other.
        measure: what the value is: ``"accuracy"``.
        value: finite.
        units: of an accuracy: whether each image is classified correctly, as text (`tools.common.units`); else empty.
    """

    condition: Condition
    seed: int
    measure: str
    value: float
    units: str = ""

    @classmethod
    def of_images(cls, condition: Condition, seed: int, measure: str, correct_N: Tensor) -> StudyRow:
        """An accuracy, from whether each of N images is classified correctly."""
        return cls(condition, seed, measure, float(correct_N.double().mean()), encode(correct_N))


@dataclass(frozen=True)
class View:
    """One view of the rows: a table, and a panel of the plot.

    Attributes:
        title: of both.
        measure: the measure that is shown.
        lines: name of the condition that varies over the table's rows and the plot's lines.
        across: name of the condition that varies over the table's columns and the plot's x axis.
        where: only rows with these conditions are shown.
        unit: ``"percent"`` shows 0.5 as 50; ``"number"`` shows it unchanged, from zero on; ``"ratio"`` likewise, but
            beside 1.
        scale: of the x axis; ``"category"`` is for values that are not numbers.
    """

    title: str
    measure: str
    lines: str
    across: str
    where: Condition
    unit: Literal["percent", "number", "ratio"] = "percent"
    scale: Literal["log", "linear", "category"] = "category"

    def shows(self, row: StudyRow) -> bool:
        """Whether ``row`` is part of this view."""
        return row.measure == self.measure and self.where.items() <= row.condition.items()


@dataclass(frozen=True)
class Study(Record):
    """The record of a study: the question, what was run, every value, and the findings.

    Attributes:
        question: one sentence.
        claim: what the literature claims.
        settings: as requested.
        notes: what else determines the result, by topic: data, model, how the learning rates were chosen.
        rows: every value of every seed.
        views: how to show them.
        findings: sentences computed from the rows.
    """

    schema: ClassVar[str] = "syncnorm.study"
    schema_version: ClassVar[int] = 2

    question: str
    claim: Claim
    settings: StudySettings
    notes: Mapping[str, str]
    rows: tuple[StudyRow, ...]
    views: tuple[View, ...]
    findings: tuple[str, ...]
    hardware: Hardware
    syncnorm_version: str
    torch_version: str
    python_version: str
    date: str
    command: str
    wall_seconds: float

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Study:
        """As for any `Record`; also reads version 1, whose accuracies had no results per image."""
        if (data.get("schema"), data.get("schema_version")) == (cls.schema, 1):
            data = {**data, "schema_version": cls.schema_version}
        return super().from_dict(data)


@dataclass(frozen=True)
class Outcome:
    """What `Question.run` returns: every row, and notes that depend on the run, such as the tuned learning rates."""

    rows: Sequence[StudyRow]
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """One study: a question, a claim, and how to get from settings to rows to sentences.

    Attributes:
        name: of the subcommand.
        about: one line for the list of commands.
        question: one sentence.
        claim: what the literature claims.
        seeds: default number of seeds.
        steps: default number of steps.
        quick_steps: number of steps with ``--quick``.
        num_stages: settings -> number of training runs of rank 0, each of which it reports as a stage.
        run: settings, ranks, tell -> the outcome, the same on all ranks. Collective: all ranks.
        find: rows, rule -> findings. Must work with two seeds and without the conditions that ``--quick`` leaves out.
        views: rows -> views.
        rule: by which the findings judge; the margin of the settings replaces its own.
        steps_help: what ``--steps`` counts.
        needs: packages besides torch, imported before anything starts, so that a missing one is reported at once.
    """

    name: str
    about: str
    question: str
    claim: Claim
    seeds: int
    steps: int
    quick_steps: int
    num_stages: Callable[[StudySettings], int]
    run: Callable[[StudySettings, Ranks, Tell], Outcome]
    find: Callable[[Sequence[StudyRow], Rule], list[str]]
    views: Callable[[Sequence[StudyRow]], Sequence[View]]
    rule: Rule = ACCURACY
    steps_help: str = "Optimizer steps per run"
    needs: tuple[str, ...] = ("mlxtend",)
