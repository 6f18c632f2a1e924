"""What a study is made of: a question, a claim, and how to get from settings to rows to sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.records import Claim, Row, Settings, View


@dataclass(frozen=True)
class Outcome:
    """What the ranks bring home: every row, and notes that only they know (learning rates that they tuned)."""

    rows: Sequence[Row]
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """One study.

    Attributes:
        name: as the command line takes it.
        about: one line for the list of commands.
        question: one sentence.
        claim: what the literature says.
        seeds: by default.
        steps: by default.
        steps_are: what ``--steps`` counts, for the help.
        quick_steps: with ``--quick``.
        num_stages: settings -> how often rank 0 will tell what it does.
        run: settings, ranks, tell -> the outcome, the same on all ranks. Collective: all ranks.
        find: rows -> sentences. Must cope with two seeds and with conditions that ``--quick`` leaves out.
        views: rows -> tables and panels.
        needs: packages beyond torch, imported before anything starts, so that a missing one is named at once.
    """

    name: str
    about: str
    question: str
    claim: Claim
    seeds: int
    steps: int
    quick_steps: int
    num_stages: Callable[[Settings], int]
    run: Callable[[Settings, Ranks, Tell], Outcome]
    find: Callable[[Sequence[Row]], list[str]]
    views: Callable[[Sequence[Row]], Sequence[View]]
    steps_are: str = "Optimiser steps of a run"
    needs: tuple[str, ...] = ("mlxtend",)
