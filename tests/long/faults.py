"""Runs many training jobs with one fault in each: does every rank that survives end in time and with a clear error?

    python tests/long/faults.py --faults 200

Each job is two or three processes that train a small net with three synced norms, in DDP or with an all_reduce of
the gradients. At a random step, on a random rank, one fault happens. The outcome of each rank is judged from outside,
by its exit status, its error, and the result of a reference run: a single process on the whole batch, in fp64.

``fault_jobs`` defines what a rank runs, ``fault_kinds`` the interface of faults, ``fault_disagreements``,
``fault_interruptions`` and ``fault_transports`` the faults. ``fault_processes`` starts and ends the ranks.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import fault_disagreements  # noqa: F401  # registers its kinds
import fault_interruptions  # noqa: F401
import fault_transports  # noqa: F401
import torch
import torch.distributed as dist
from fault_jobs import Fault, reference, write_note
from fault_kinds import KINDS, ErrorReport
from fault_processes import Ranks, wait

EXITS = (0, 1, -signal.SIGINT)  # Python ends itself by that signal after a KeyboardInterrupt
BAD = ("hang", "abort", "silent", "unclear")
OUTCOMES = ("layer error", "DDP error", "equal", *BAD)


@dataclass
class Verdict:
    """The outcomes of the ranks of one job."""

    fault: Fault
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # from the fault to each error
    failures: list[str] = field(default_factory=list)  # descriptions of bad outcomes


def judge(fault: Fault, timeout: float, ranks: Ranks) -> Verdict:
    """Runs the job and judges its ranks."""
    verdict = Verdict(fault)
    kind = KINDS[fault.kind]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        notes = Path(folder)
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent hosts it
        write_note(notes / "port", str(store.port))
        ranks.start(fault, notes)
        hanging = wait(fault, notes, timeout)
        happened = notes / "happened"
        at = float(happened.read_text()) if happened.exists() else None
        all_ranks = range(len(fault.rows))
        results = {r: torch.load(p) for r in all_ranks if (p := notes / f"result{r}").exists()}
        reports = {r: p.read_text() for r in all_ranks if (p := notes / f"error{r}").exists()}
        errors = {r: ErrorReport(**json.loads(text)) for r, text in reports.items()}
        for rank in all_ranks:
            code = int((notes / f"status{rank}").read_text())
            if kind.dies and rank == fault.rank and code == -signal.SIGKILL and rank not in hanging:
                continue
            if rank in hanging:
                outcome = "hang"
            elif code not in EXITS or (rank not in errors and rank not in results):
                outcome = "abort"
            else:
                outcome = ended(fault, rank, results, errors)
                if at is None and not kind.dies:
                    outcome = "unclear"  # the fault did not happen
            if rank in errors:
                verdict.seconds.append(errors[rank].at - (at or errors[rank].at))
            verdict.outcomes[outcome] += 1
            if outcome in BAD:
                stderr = (notes / f"stderr{rank}").read_text(errors="replace")
                verdict.failures.append(f"rank {rank}: {outcome}, exit status {code}\n{stderr[-3000:]}")
    return verdict


def ended(fault: Fault, rank: int, results: dict[int, Any], errors: dict[int, ErrorReport]) -> str:
    """The outcome of a rank that was not killed."""
    kind = KINDS[fault.kind]
    if rank not in errors:
        correct = "equal" in kind.expected(fault, rank) and equal(fault, rank, results)
        return "equal" if correct else "silent"
    error = errors[rank]
    elsewhere = not error.is_syncnorm_error and not error.raised_in_syncnorm and error.text
    outcome = "layer error" if kind.is_clear(fault, rank, errors) else "DDP error" if elsewhere else "unclear"
    return outcome if outcome in kind.expected(fault, rank) else "unclear"


def equal(fault: Fault, rank: int, results: dict[int, Any]) -> bool:
    """Whether the result of this rank equals that of the reference."""
    logits, state = reference(KINDS[fault.kind], fault)
    try:
        for number, result in enumerate(results[rank]):
            torch.testing.assert_close(result["logits"], logits[rank], rtol=1e-8, atol=1e-8, equal_nan=True)
            torch.testing.assert_close(result["state"], state, rtol=1e-8, atol=1e-8, equal_nan=True)
            for other in results.values():  # the same bits on all ranks
                torch.testing.assert_close(result["state"], other[number]["state"], rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


def run(
    faults: int, seed: int, timeout: float, jobs: int, show: bool = True, kinds: Collection[str] = tuple(KINDS)
) -> list[Verdict]:
    """Judges that many faults, taking the ``kinds`` in turn."""
    torch.set_num_threads(1)
    names = list(kinds)
    drawn = [Fault.draw(name, KINDS[name], seed + i) for i in range(faults) for name in [names[i % len(names)]]]
    verdicts = []
    with Ranks(timeout) as ranks, ThreadPoolExecutor(jobs) as pool:
        for verdict in pool.map(lambda fault: judge(fault, timeout, ranks), drawn):
            verdicts.append(verdict)
            if show:
                print(f"{len(verdicts):4}", line(verdict), flush=True)
                print(*verdict.failures, sep="\n", end="\n" if verdict.failures else "", flush=True)
    return verdicts


def line(verdict: Verdict) -> str:
    fault = verdict.fault
    slowest = f"{max(verdict.seconds):.1f} s" if verdict.seconds else "-"
    what = f"{fault.kind} {fault.variant} rank {fault.rank} of {len(fault.rows)} step {fault.step} {fault.layer}"
    return f"{what + ' DDP' * fault.ddp:64} {dict(verdict.outcomes)} {slowest}"


def table(verdicts: list[Verdict]) -> str:
    """A table of the surviving ranks by kind of fault and outcome, with the seconds until their errors."""
    head = ["kind", "faults", "ranks", *OUTCOMES, "median s", "max s"]
    rows = [head]
    for kind in (*dict.fromkeys(v.fault.kind for v in verdicts), "total"):
        of_kind = [v for v in verdicts if kind in (v.fault.kind, "total")]
        outcomes: Counter[str] = sum((v.outcomes for v in of_kind), Counter())
        seconds = [s for v in of_kind for s in v.seconds]
        times = [f"{median(seconds):.2f}", f"{max(seconds):.2f}"] if seconds else ["-", "-"]
        rows.append([kind, *map(str, (len(of_kind), outcomes.total(), *(outcomes[o] for o in OUTCOMES))), *times])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def failed(verdicts: list[Verdict]) -> bool:
    return any(verdict.outcomes[bad] for verdict in verdicts for bad in BAD)


def main() -> None:
    kinds = "\n".join(f"  {name:10} {kind.description}" for name, kind in KINDS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=20.0, help="of the process group, in seconds")
    parser.add_argument("--jobs", type=int, default=2, help="number of training jobs at a time")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    options = parser.parse_args()
    started = time.monotonic()
    verdicts = run(options.faults, options.seed, options.timeout, options.jobs, kinds=options.kinds)
    print(f"\nSurviving ranks by outcome; torch {torch.__version__}, gloo, seed {options.seed}, ", end="")
    print(f"timeout {options.timeout:g} s, {time.monotonic() - started:.0f} s in total.\n\n{table(verdicts)}")
    sys.exit(failed(verdicts))


if __name__ == "__main__":
    main()
