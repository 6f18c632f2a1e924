"""What a self-test found, as plain frozen records, and how the ranks' verdicts on a case become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.records import Record

Status = Literal["pass", "fail", "skip", "not run"]


@dataclass(frozen=True)
class Measured:
    """One comparison on one rank: the largest ``|got - want| / (1 + |want|)``, and what it may be."""

    what: str
    error: float
    tolerance: float

    @property
    def used(self) -> float:
        """Share of the tolerance; more than 1 fails."""
        if self.tolerance == 0:
            return 0.0 if self.error == 0 else float("inf")
        return self.error / self.tolerance


@dataclass
class Verdict:
    """What one rank says of a case.

    Attributes:
        measured: what it compared.
        bits: digests that must be the same on all ranks, by what they are of.
        error: the exception that ended the case, in one line; None if none did.
    """

    measured: list[Measured] = field(default_factory=list)
    bits: dict[str, int] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """One case on all ranks.

    Attributes:
        name: in a few words.
        status: ``"skip"`` is for what this machine cannot run; ``"not run"``, for what a failure before prevented.
        what: the comparison that came nearest to its tolerance, or furthest beyond it.
        rank: the rank of that comparison; in a failure, the first rank that failed.
        error: as in `Measured`; None where nothing was compared, or infinity was found.
        tolerance: of that comparison.
        message: why it failed, was skipped or not run; else None.
        seconds: on rank 0.
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
    """A whole run."""

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
        """Whether every case passed or cannot run here."""
        return all(case.status in ("pass", "skip") for case in self.cases)

    def count(self, status: Status) -> int:
        """Cases with that status."""
        return sum(case.status == status for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """As of any `Record`, and ``passed``."""
        return {**super().to_dict(), "passed": self.passed}


def outcome(name: str, verdicts: Sequence[Verdict], seconds: float) -> CaseResult:
    """The result of a case from what each rank said of it, in rank order: one rank that fails is enough."""
    errors = {rank: verdict.error for rank, verdict in enumerate(verdicts) if verdict.error is not None}
    if errors:
        message = "; ".join(f"rank {rank}: {error}" for rank, error in errors.items())
        return CaseResult(name, "fail", rank=min(errors), message=message, seconds=seconds)
    for what, bits in verdicts[0].bits.items():
        others = [rank for rank, verdict in enumerate(verdicts) if verdict.bits.get(what) != bits]
        if others:
            message = f"rank {others[0]}: {what} is not, bit for bit, that of rank 0"
            return CaseResult(name, "fail", what=what, rank=others[0], message=message, seconds=seconds)
    found = [(measured, rank) for rank, verdict in enumerate(verdicts) for measured in verdict.measured]
    if not found:
        return CaseResult(name, "pass", seconds=seconds)
    worst, rank = max(found, key=lambda each: each[0].used)
    finite = worst.error if worst.error < float("inf") else None
    case = CaseResult(name, "pass", worst.what, rank, finite, worst.tolerance, seconds=seconds)
    if worst.used <= 1:
        return case
    failed = sorted({rank for measured, rank in found if measured.used > 1})
    message = f"rank {rank}: {worst.what} is {worst.error:.1e} off, {worst.tolerance:.0e} allowed"
    if len(failed) > 1:
        message += f"; ranks {', '.join(map(str, failed))} failed"
    return CaseResult(**{**asdict(case), "status": "fail", "message": message})
