"""The results of the self-test, and how the verdicts of all ranks on a case become one result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.records import Record

Status = Literal["pass", "fail", "skip", "not run"]


@dataclass(frozen=True)
class Measured:
    """One comparison on one rank: the largest ``|got - want| / (1 + |want|)``, and the tolerance for it."""

    what: str
    error: float
    tolerance: float

    @property
    def used(self) -> float:
        """``error / tolerance``: the comparison fails if it is more than 1."""
        if self.tolerance == 0:
            return 0.0 if self.error == 0 else float("inf")
        return self.error / self.tolerance


@dataclass
class Verdict:
    """What one rank found in a case.

    Attributes:
        measured: the comparisons of this rank.
        bits: digests of tensors, by name; they must be the same on all ranks.
        error: the exception that ended the case, in one line; None if there was none.
    """

    measured: list[Measured] = field(default_factory=list)
    bits: dict[str, int] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """The result of one case on all ranks.

    Attributes:
        name: of the case.
        status: ``"skip"`` if this machine cannot run the case, ``"not run"`` if an earlier failure prevented it.
        what: the comparison with the largest error relative to its tolerance.
        rank: the rank of that comparison; after a failure, the first rank that failed.
        error: as in `Measured`; None if nothing was compared or the error is infinite.
        tolerance: of that comparison.
        message: why the case failed, was skipped or did not run; otherwise None.
        seconds: how long the case took on rank 0.
    """

    name: str
    status: Status
    what: str | None = None
    rank: int | None = None
    error: float | None = None
    tolerance: float | None = None
    message: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class SelfTest(Record):
    """The result of a whole self-test."""

    schema: ClassVar[str] = "syncnorm.selftest"
    schema_version: ClassVar[int] = 1

    world_size: int
    hardware: Hardware
    syncnorm_version: str
    torch_version: str
    python_version: str
    date: str
    cases: tuple[CaseResult, ...]
    wall_seconds: float

    @property
    def passed(self) -> bool:
        """Whether every case passed or cannot run on this machine."""
        return all(case.status in ("pass", "skip") for case in self.cases)

    def count(self, status: Status) -> int:
        """The number of cases with that status."""
        return sum(case.status == status for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """As for every `Record`, and ``passed``."""
        return {**super().to_dict(), "passed": self.passed}


def combine(name: str, verdicts: Sequence[Verdict], seconds: float) -> CaseResult:
    """The result of a case from the verdicts of all ranks, in rank order; it fails if it fails on any rank."""
    errors = {rank: verdict.error for rank, verdict in enumerate(verdicts) if verdict.error is not None}
    if errors:
        message = "; ".join(f"rank {rank}: {error}" for rank, error in errors.items())
        return CaseResult(name, "fail", rank=min(errors), message=message, seconds=seconds)
    for what, bits in verdicts[0].bits.items():
        others = [rank for rank, verdict in enumerate(verdicts) if verdict.bits.get(what) != bits]
        if others:
            message = f"rank {others[0]}: {what} is not bitwise equal to that of rank 0"
            return CaseResult(name, "fail", what=what, rank=others[0], message=message, seconds=seconds)
    found = [(measured, rank) for rank, verdict in enumerate(verdicts) for measured in verdict.measured]
    if not found:
        return CaseResult(name, "pass", seconds=seconds)
    worst, rank = max(found, key=lambda each: each[0].used)
    finite = worst.error if worst.error < float("inf") else None
    result = CaseResult(name, "pass", worst.what, rank, finite, worst.tolerance, seconds=seconds)
    if worst.used <= 1:
        return result
    message = f"rank {rank}: error of {worst.what} is {worst.error:.1e}, tolerance {worst.tolerance:.0e}"
    failed = sorted({rank for measured, rank in found if measured.used > 1})
    if len(failed) > 1:
        message += f"; ranks {', '.join(map(str, failed))} failed"
    return replace(result, status="fail", message=message)
