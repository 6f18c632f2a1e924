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
def progress_on_stderr(num_arms: int) -> Iterator[ArmProgress]:
    """Shows the progress of a comparison of ``num_arms`` arms on the stderr of this process."""
    console = console_on(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, num_arms)
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
        yield _Bars(bar, num_arms)


class _Bars(ArmProgress):
    """One bar, which is reset for each arm."""

    def __init__(self, bar: Bar, num_arms: int) -> None:
        self._bar, self._num_arms, self._arm = bar, num_arms, 0
        self._task = bar.add_task("starting", total=None)

    def start(self, label: str, steps: int) -> None:
        self._arm += 1
        description = f"{self._arm}/{self._num_arms} {label}"
        self._bar.reset(self._task, description=description, total=steps)

    def step(self) -> None:
        self._bar.advance(self._task)

    def finish(self, result: ArmResult) -> None:
        """The bar stays full until the next arm begins."""


class _Lines(ArmProgress):
    """For logs: a line when an arm is done."""

    def __init__(self, console: Console, num_arms: int) -> None:
        self._console, self._num_arms, self._arm, self._label = console, num_arms, 0, ""

    def start(self, label: str, steps: int) -> None:
        self._arm, self._label = self._arm + 1, label

    def finish(self, result: ArmResult) -> None:
        outcome = f"not run: {result.not_run}" if result.not_run else _result(result)
        line = f"{self._arm}/{self._num_arms} {self._label}: {outcome}"
        self._console.print(line, soft_wrap=True)


def _result(result: ArmResult) -> str:
    return "not finite" if result.test_metric is None else f"{result.test_metric:.4g} on the test data"


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
