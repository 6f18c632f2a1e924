"""What a study found, as plain frozen records that pickle, print and turn into JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.records import Record

Value = str | int | float


@dataclass(frozen=True)
class Claim:
    """What the literature says, in our words, and where it says so."""

    text: str
    source: str


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a study computes; two equal settings give the same rows.

    Attributes:
        study: its name.
        world_size: ranks.
        seeds: each condition is run with the seeds 0, 1, ... below this.
        steps: optimiser steps of a run; what that means where batches differ in size is in the record's notes.
        quick: a short run over few conditions, to see that it works.
    """

    study: str
    world_size: int
    seeds: int
    steps: int
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """One value that one run gave.

    Attributes:
        condition: what is varied, by its name: ``{"norm": "group", "batch": 4}``.
        seed: of the weights and of the order of the data; rows of equal seed are compared with each other.
        measure: what the value is: ``"accuracy"``.
        value: finite.
    """

    condition: Mapping[str, Value]
    seed: int
    measure: str
    value: float


@dataclass(frozen=True)
class View:
    """One way to look at the rows: a table, and a panel of the plot.

    Attributes:
        title: above both.
        measure: which rows' values.
        lines: the part of the condition that tells table rows and plot lines apart.
        across: the part that goes along the table's columns and the plot's x axis.
        where: only rows whose condition has these values.
        unit: ``"percent"`` shows 0.5 as 50; ``"number"`` as it is.
        scale: of the x axis; ``"category"`` takes values that are no numbers.
    """

    title: str
    measure: str
    lines: str
    across: str
    where: Mapping[str, Value]
    unit: Literal["percent", "number"] = "percent"
    scale: Literal["log", "linear", "category"] = "category"

    def shows(self, row: Row) -> bool:
        """Whether ``row`` belongs in it."""
        return row.measure == self.measure and all(row.condition.get(key) == v for key, v in self.where.items())


@dataclass(frozen=True)
class Study(Record):
    """A whole run: the question, what was done, every value, and what follows from them.

    Attributes:
        question: one sentence.
        claim: what the literature says.
        settings: what was asked for.
        notes: what else decides the result, by topic: data, model, how the learning rates were chosen.
        rows: every value of every seed.
        views: how to show them.
        findings: sentences that are computed from the rows.
    """

    schema: ClassVar[str] = "syncnorm.study"
    schema_version: ClassVar[int] = 1

    question: str
    claim: Claim
    settings: Settings
    notes: Mapping[str, str]
    rows: tuple[Row, ...]
    views: tuple[View, ...]
    findings: tuple[str, ...]
    hardware: Hardware
    syncnorm_version: str
    torch_version: str
    python_version: str
    date: str
    command: str
    wall_seconds: float
