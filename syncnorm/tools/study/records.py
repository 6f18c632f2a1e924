"""What a study is before it runs (`Question`), and its record afterwards (`Study`), which has a JSON schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.common.records import Record

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
    """

    study: str
    world_size: int
    seeds: int
    steps: int
    quick: bool = False


@dataclass(frozen=True)
class StudyRow:
    """One value measured in one run.

    Attributes:
        condition: what the study varies, by name: ``{"norm": "GN", "lr": 0.1}``.
        seed: of the weights and of the order of the data; rows of equal seed are compared with each other.
        measure: what the value is: ``"accuracy"``.
        value: finite.
    """

    condition: Condition
    seed: int
    measure: str
    value: float


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
    schema_version: ClassVar[int] = 1

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
        find: rows -> findings. Must work with two seeds and without the conditions that ``--quick`` leaves out.
        views: rows -> views.
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
    find: Callable[[Sequence[StudyRow]], list[str]]
    views: Callable[[Sequence[StudyRow]], Sequence[View]]
    steps_help: str = "Optimizer steps per run"
    needs: tuple[str, ...] = ("mlxtend",)
