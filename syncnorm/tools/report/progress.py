"""How far a run has come, on stderr: a bar on a terminal, one line an arm or a row elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from syncnorm.tools.compare.progress import Progress
from syncnorm.tools.compare.records import ArmResult
from syncnorm.tools.report.consoles import console as console_on


@contextmanager
def progress_on_stderr(num_arms: int) -> Iterator[Progress]:
    """A `Progress` of ``num_arms`` arms, written to this process's stderr."""
    console = console_on(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, num_arms)
        return
    # Four times a second: the ranks need the cores more than the eye needs the frames.
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


class _Bars:
    """One bar that starts anew for each arm."""

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
        """Leaves the bar full until the next arm begins."""


class _Lines:
    """For logs: a line when an arm is done."""

    def __init__(self, console: Console, num_arms: int) -> None:
        self._console, self._num_arms, self._arm, self._label = console, num_arms, 0, ""

    def start(self, label: str, steps: int) -> None:
        self._arm, self._label = self._arm + 1, label

    def step(self) -> None:
        """A line a step would drown everything else."""

    def finish(self, result: ArmResult) -> None:
        outcome = f"not run: {result.not_run}" if result.not_run else f"{_result(result)}"
        line = f"{self._arm}/{self._num_arms} {self._label}: {outcome}"
        self._console.print(line, soft_wrap=True)


def _result(result: ArmResult) -> str:
    if result.test_accuracy is not None:
        return f"{result.test_accuracy:.1%} right"
    return "not finite" if result.test_loss is None else f"test loss {result.test_loss:.3g}"


@contextmanager
def counted_on_stderr(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call with what is measured next, ``total`` times: a bar on a terminal, a line each elsewhere."""
    console = console_on(stderr=True)
    done = 0

    def tell_line(label: str) -> None:
        nonlocal done
        done += 1
        console.print(f"{done}/{total} {label}", soft_wrap=True)

    if not console.is_terminal:
        yield tell_line
        return
    # Twice a second: what is timed needs the core that draws it.
    columns = (
        TextColumn("{task.description:<44}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("starting", total=total, completed=-1)
        yield lambda label: bar.update(task, description=label, advance=1)
