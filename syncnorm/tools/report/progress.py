"""The progress of a run on stderr: a bar on a terminal, elsewhere one line per arm or row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from syncnorm.tools.compare.arm_runner import ArmProgress
from syncnorm.tools.compare.records import ArmResult
from syncnorm.tools.report.consoles import console as console_on


@contextmanager
def progress_on_stderr(num_runs: int | None) -> Iterator[ArmProgress]:
    """Shows the training runs of a comparison, ``num_runs`` if that is known, on the stderr of this process."""
    console = console_on(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, num_runs)
        return
    # Only four times per second, because the ranks need the cores.
    with Bar(
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=4,
        transient=True,
    ) as bar:
        yield _Bars(bar, num_runs)


class _Bars(ArmProgress):
    """One bar, which is reset for each run."""

    def __init__(self, bar: Bar, num_runs: int | None) -> None:
        self._bar, self._num_runs, self._run = bar, num_runs, 0
        self._task = bar.add_task("starting", total=None)

    def start(self, label: str, steps: int) -> None:
        self._run += 1
        self._bar.reset(self._task, description=_numbered(self._run, self._num_runs, label), total=steps)

    def step(self) -> None:
        self._bar.advance(self._task)

    def finish(self, result: ArmResult) -> None:
        """The bar stays full until the next run begins."""


class _Lines(ArmProgress):
    """For logs: a line when a run is done."""

    def __init__(self, console: Console, num_runs: int | None) -> None:
        self._console, self._num_runs, self._run, self._label = console, num_runs, 0, ""

    def start(self, label: str, steps: int) -> None:
        self._run, self._label = self._run + 1, label

    def finish(self, result: ArmResult) -> None:
        outcome = f"not run: {result.not_run}" if result.not_run else _result(result)
        self._console.print(f"{_numbered(self._run, self._num_runs, self._label)}: {outcome}", soft_wrap=True)


def _numbered(run: int, num_runs: int | None, label: str) -> str:
    return f"{run}/{num_runs} {label}" if num_runs else f"{run} {label}"


def _result(result: ArmResult) -> str:
    value = result.seeds[-1].test_metric if result.seeds else None
    return "not finite" if value is None else f"{value:.4g} on the test data"


@contextmanager
def counted_on_stderr(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call ``total`` times with the label of the next measurement: a bar on a terminal, else lines."""
    console = console_on(stderr=True)
    done = 0

    def print_line(label: str) -> None:
        nonlocal done
        done += 1
        console.print(f"{done}/{total} {label}", soft_wrap=True)

    if not console.is_terminal:
        yield print_line
        return
    # Only twice per second, because drawing uses a core of the ranks that are timed.
    columns = (
        TextColumn("{task.description:<44}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("starting", total=total, completed=-1)
        yield lambda label: bar.update(task, description=label, advance=1)
