"""Comparisons with a name for each, what differs between them, and how to read them from files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from syncnorm.errors import InputError
from syncnorm.tools.compare.paired import decisions
from syncnorm.tools.compare.records import Comparison, Decision, Sweep
from syncnorm.tools.compare.verdict import verdict
from syncnorm.tools.report.arm_styles import metric_label, shown_text

# The first of these has no decisions, and sentences of another rule.
_VERSIONS = range(2, Comparison.schema_version + 1)


class Run(NamedTuple):
    """A comparison and what to call it."""

    name: str
    comparison: Comparison


def named_by_batch(comparisons: Sequence[Comparison]) -> list[Run]:
    """Comparisons that differ in their batch per rank, sorted by it and named after it."""
    by_size = sorted(comparisons, key=lambda c: c.settings.batch_per_rank)
    return [Run(samples_per_rank(each), each) for each in by_size]


def samples_per_rank(comparison: Comparison) -> str:
    """``4 samples per rank``."""
    number = comparison.settings.batch_per_rank
    return f"{number} sample{'s' * (number > 1)} per rank"


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The comparisons in files that ``syncnorm compare --json`` has written, named after their files.

    Raises:
        InputError: a file cannot be read, or is not such a record.
    """
    files = [(path, named_by_batch(_read(path))) for path in paths]
    stems = [path.stem for path in paths]
    runs = []
    for path, found in files:
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        if len(found) == 1:
            found = [Run(name, found[0].comparison)]
        elif len(files) > 1:
            found = [Run(f"{name}, {each.name}", each.comparison) for each in found]
        runs += found
    return runs


def _read(path: Path) -> Sequence[Comparison]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a complete JSON file: {error}") from error
    schema, version = (data.get("schema"), data.get("schema_version")) if isinstance(data, dict) else (None, None)
    if schema not in (Comparison.schema, Sweep.schema):
        what = f"a record of schema {schema}" if isinstance(schema, str) else "no record of syncnorm"
        raise InputError(f"{path} holds {what}; expected a file that `syncnorm compare --json` has written")
    if version not in _VERSIONS:
        newer = isinstance(version, int) and version > _VERSIONS[-1]
        hint = "; update syncnorm" if newer else ""
        raise InputError(
            f"{path} has schema version {version}, and this syncnorm reads {_VERSIONS[0]} to {_VERSIONS[-1]}{hint}"
        )
    try:
        found = Sweep.from_dict(data).comparisons if schema == Sweep.schema else (Comparison.from_dict(data),)
        found = tuple(each if version == _VERSIONS[-1] else _judged_again(each) for each in found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not found:
        raise InputError(f"{path} holds no comparison")
    return found


def _judged_again(comparison: Comparison) -> Comparison:
    """An older record with the decisions and sentences of today's rule."""
    judged = replace(comparison, decisions=decisions(comparison))
    return replace(judged, verdict=tuple(verdict(judged)))


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs: name -> a text for each run, ``-`` where it has no value."""
    described = [_described(run.comparison) for run in runs]
    names = dict.fromkeys(name for each in described for name in each)
    found = {name: [each.get(name, "-") for each in described] for name in names}
    return {name: texts for name, texts in found.items() if len(set(texts)) > 1}


def _described(comparison: Comparison) -> dict[str, str]:
    """What a run depends on, by names for a reader."""
    task = asdict(comparison.task)
    task["norm_layers"] = len(comparison.task.norm_layers)
    task["metric"] = comparison.task.metric.name
    versions = {name: getattr(comparison, name) for name in ("torch_version", "syncnorm_version", "python_version")}
    fields = {**asdict(comparison.settings), **task, **asdict(comparison.hardware), **versions}
    return {name.replace("_", " "): _text(value) for name, value in fields.items()}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "-" if value in (None, "") else f"{value:,}" if isinstance(value, int) else str(value)


def differ_in_batch_alone(runs: Sequence[Run]) -> bool:
    """Whether nothing but the samples per rank is different, as in a sweep."""
    return differences(runs).keys() <= {"batch per rank", "eval batch"}


def results(runs: Sequence[Run]) -> Mapping[str, list[str]]:
    """Arm -> its result in each run, mean ± standard deviation over seeds."""
    names = dict.fromkeys(arm.label for run in runs for arm in run.comparison.arms)
    return {name: [_result(run.comparison, name) for run in runs] for name in names}


def _result(comparison: Comparison, label: str) -> str:
    arm = next((arm for arm in comparison.arms if arm.label == label), None)
    if arm is None or arm.test_metric is None:
        return "-" if arm is None or not arm.not_run else "not run"
    metric = comparison.task.metric
    spread = "" if arm.std is None else f" ± {shown_text(arm.std, metric)}"
    return f"{shown_text(arm.test_metric, metric)}{spread}"


def decided(runs: Sequence[Run]) -> Mapping[str, list[str]]:
    """Pair of arms -> the decision on it in each run, with the difference."""
    found = [{f"{d.arm} vs. {d.other}": d for d in run.comparison.decisions} for run in runs]
    pairs = dict.fromkeys(pair for decisions in found for pair in decisions)
    return {
        pair: [_decided(run.comparison, by_pair.get(pair)) for run, by_pair in zip(runs, found, strict=True)]
        for pair in pairs
    }


def _decided(comparison: Comparison, decision: Decision | None) -> str:
    if decision is None:
        return "-"
    return f"{decision.kind}, {decision.difference:{'+.1f' if comparison.task.metric.share else '+.3g'}}"


def results_title(runs: Sequence[Run]) -> str:
    """What the values of `results` are."""
    labels = dict.fromkeys(metric_label(run.comparison.task.metric) for run in runs)
    return f"{' or '.join(labels)}, mean ± standard deviation over seeds"


def decision(comparison: Comparison) -> str:
    """The first sentence of the verdict."""
    return comparison.verdict[0] if comparison.verdict else NO_VERDICT


NO_VERDICT = "No verdict: the arms that it is based on did not run."
