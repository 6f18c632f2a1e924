"""Comparisons as one self-contained HTML page: verdict, tables, plots and the record, without network access."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncnorm.tools.common.files import write_file
from syncnorm.tools.compare.records import Comparison
from syncnorm.tools.report.compare_plots import plot_against_batch, plots
from syncnorm.tools.report.compare_tables import Cell, Table, tables
from syncnorm.tools.report.inline_svg import Plot, with_own_ids
from syncnorm.tools.report.runs import (
    NO_VERDICT,
    Run,
    decided,
    differ_in_batch_alone,
    differences,
    named_by_batch,
    results,
    results_title,
    samples_per_rank,
)


def write_html(comparisons: Sequence[Comparison], path: Path) -> None:
    """Writes the page of one comparison, or of several that differ only in their batch per rank, to ``path``.

    Raises:
        ValueError: no comparison.
    """
    write_page(named_by_batch(comparisons), path)


def render_html(comparisons: Sequence[Comparison]) -> str:
    """The page that `write_html` writes."""
    return render_page(named_by_batch(comparisons))


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Writes the page of one run, or of several side by side, to ``path``.

    Raises:
        ValueError: no run.
    """
    if not runs:
        raise ValueError("a report needs at least one comparison, got none")
    write_file(path, render_page(runs).encode(errors="replace"))  # the command may contain any bytes


def render_page(runs: Sequence[Run]) -> str:
    """The page. Names from the user (of models, layers, commands) are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("syncnorm.tools.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.globals["drawing"] = _drawing
    models = {run.comparison.task.model for run in runs}
    return environment.get_template("comparison.html.j2").render(
        title=f"Which norm for {models.pop()}?" if len(models) == 1 else "Which norm? Several models",
        side_by_side=_side_by_side(runs) if len(runs) > 1 else [],
        overview=plot_against_batch([run.comparison for run in runs]) if differ_in_batch_alone(runs) else None,
        parts=[_part(number, run) for number, run in enumerate(runs, 1)],
    )


def _part(number: int, run: Run) -> dict[str, Any]:
    comparison = run.comparison
    batch = f"{samples_per_rank(comparison)}, global batch {comparison.settings.global_batch}"
    return {
        "id": f"run-{number}",
        "name": run.name,
        "heading": batch if batch.startswith(run.name) else f"{run.name}: {batch}",
        "verdict": comparison.verdict or (NO_VERDICT,),
        "about": _about(comparison),
        "tables": tables(comparison),
        "plots": list(plots(comparison)),
        "not_run": [f"Not run: {arm.label}: {arm.not_run}" for arm in comparison.arms if arm.not_run],
        "provenance": _provenance(comparison),
        "file_name": f"{re.sub(r'[^0-9A-Za-z]+', '-', run.name).strip('-') or 'comparison'}.json",
        "record": comparison.to_dict(),
    }


def _about(comparison: Comparison) -> str:
    task, settings = comparison.task, comparison.settings
    seeds = len(settings.seeds)
    return (
        f"{task.model}: {task.num_parameters:,} parameters, {len(task.norm_layers)} norm layers, trained on "
        f"{task.num_train:,} samples of {task.data} for {settings.steps:,} steps on {settings.world_size} ranks with "
        f"{samples_per_rank(comparison)}, {seeds} seed{'s' * (seeds > 1)}."
    )


def _side_by_side(runs: Sequence[Run]) -> list[Table]:
    columns = [run.name for run in runs]
    found = results(runs)
    different = differences(runs)
    sections = [
        (
            results_title(runs),
            "arm",
            found,
            "On samples that were not used for training; not all differences matter.",
        ),
        ("Decisions, and differences of the results", "arms", decided(runs), "Positive: the first arm is better."),
        ("What differs", "setting", different, "All other settings, and the versions, are the same."),
    ]
    return [
        Table(title, (first, *columns), [[Cell(name), *map(Cell, texts)] for name, texts in lines.items()], legend)
        for title, first, lines, legend in sections
        if lines
    ]


def _provenance(comparison: Comparison) -> list[str]:
    hardware, settings, task = comparison.hardware, comparison.settings, comparison.task
    optimizer = (
        task.optimizer or f"SGD, learning rate {settings.lr:g} with a cosine schedule, momentum {settings.momentum:g}"
    )
    return [
        f"Command: {comparison.command}",
        f"{comparison.date}, {comparison.wall_seconds:.0f} s.",
        f"{hardware.device_name}, {hardware.cpu_count} cores, {hardware.threads_per_rank} thread(s) per rank, "
        f"{hardware.backend}.",
        f"torch {comparison.torch_version}, syncnorm {comparison.syncnorm_version}, Python "
        f"{comparison.python_version}.",
        f"{optimizer}, {task.step or task.loss}; for each seed, all arms have the same initial weights and the same "
        "batches in the same order.",
    ]


def _drawing(plot: Plot, name: str) -> Any:
    """The SVG of ``plot``, with what it shows as its alternative text."""
    from markupsafe import Markup, escape

    opening = Markup('<svg role="img" aria-label="{}"').format(f"{plot.title}: {plot.shows}")
    return Markup(with_own_ids(plot.svg, str(escape(name))).replace("<svg", opening, 1))
