"""A self-test on a terminal: one line per case, with its largest error and the tolerance, and the verdict."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.text import Text

from syncnorm.tools.report.consoles import PlainTable, for_tables
from syncnorm.tools.selftest.records import CaseResult, SelfTest

STYLES = {"pass": "green", "fail": "bold red", "skip": "yellow", "not run": "red"}
LEGEND = (
    "error: the largest |got - want| / (1 + |want|) on any rank, where want is fp64 F.batch_norm on the batch of all "
    "ranks together. Of the comparisons of a case, the table shows the one closest to its tolerance."
)


def print_selftest(record: SelfTest, console: Console | None = None) -> None:
    """Prints a table and, as the last line, the verdict; plain text if stdout is not a terminal."""
    (console or for_tables()).print(render(record))


def render(record: SelfTest) -> RenderableType:
    """The table and the verdict, for any rich console."""
    hardware = record.hardware
    head = (
        f"{record.world_size} rank{'s' * (record.world_size > 1)} on {hardware.device}, {hardware.backend}; "
        f"{hardware.device_name}, {hardware.cpu_count} cores, {hardware.threads_per_rank} thread(s) per rank.\n"
        f"torch {record.torch_version}, syncnorm {record.syncnorm_version}, Python {record.python_version}, "
        f"{record.date}, {record.wall_seconds:.0f} s.\n"
    )
    table = PlainTable()
    table.add_column("", no_wrap=True)
    table.add_column("case", no_wrap=True)
    for header in ("error", "tolerance"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("compared", overflow="fold")
    for case in record.cases:
        status = Text(case.status, style=STYLES[case.status])
        table.add_row(status, case.name, *_numbers(case), case.message or case.what)
    return Group(Text(head), table, Text(LEGEND, style="dim"), Text(), _verdict(record))


def _numbers(case: CaseResult) -> tuple[str, str]:
    if case.tolerance is None:
        return "", ""
    if case.tolerance == 0:
        return ("exact" if case.error == 0 else "wrong"), "exact"
    return "inf" if case.error is None else f"{case.error:.1e}", f"{case.tolerance:.1e}"


def _verdict(record: SelfTest) -> Text:
    passed, failed, skipped, not_run = (record.count(status) for status in ("pass", "fail", "skip", "not run"))
    others = ((failed, "failed"), (skipped, "skipped"), (not_run, "not run"))
    counts = f"{passed} passed" + "".join(f", {n} {what}" for n, what in others if n)
    if not record.passed:
        return Text(f"FAILED: {counts}. Add the output of `syncnorm env` to a bug report.", style="bold red")
    if record.world_size == 1:
        return Text(f"OK, but nothing was synchronized: there is only one rank. {counts}.", style="bold yellow")
    return Text(f"OK: {counts}, on {record.world_size} ranks over {record.hardware.backend}.", style="bold green")
