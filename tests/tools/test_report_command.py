"""`syncnorm report`: earlier records, alone and side by side, as text and as a page; files that are no records."""

import io
import json
import re
import sys
from dataclasses import replace

import pytest
import records
from rich.console import Console

from syncnorm.__main__ import main
from syncnorm.tools.common.records import write_json
from syncnorm.tools.compare import Comparison
from syncnorm.tools.compare.records import Sweep
from syncnorm.tools.report.compare_html import render_page
from syncnorm.tools.report.runs import Run, differences, read_runs, results
from syncnorm.tools.report.runs_terminal import print_runs


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["syncnorm", "report", *arguments])
        return main(), *capsys.readouterr()

    return call_main


@pytest.fixture
def before():
    return replace(records.judged(), verdict=("Use SyncBN.", "At 4 samples, local BN is worse."))


@pytest.fixture
def after(before):
    """The same with another learning rate, another result, and an arm less."""
    worse = tuple(replace(run, test_metric=run.test_metric - 0.04) for run in before["ddp+syncbn"].seeds)
    arms = [replace(arm, seeds=worse) if arm.name == "ddp+syncbn" else arm for arm in before.arms if arm.name != "dp"]
    settings = replace(before.settings, lr=0.1)
    return replace(before, settings=settings, arms=tuple(arms), verdict=("Local BN is enough here.",))


@pytest.fixture
def files(before, after, tmp_path):
    write_json(before, tmp_path / "before.json")
    write_json(after, tmp_path / "after.json")
    return tmp_path


def test_one_record_is_shown_as_when_it_was_made(call, files, before):
    code, out, err = call("before.json", "--html", "out.html")
    assert (code, err) == (0, "")
    assert "Use SyncBN." in out
    assert "Relative difference from single" in out
    assert "What differs" not in out
    page = (files / "out.html").read_text(encoding="utf-8")
    assert "<strong>Use SyncBN.</strong>" in page
    assert "What differs" not in page


def test_two_records_are_compared_before_each_is_shown(call, files):
    code, out, err = call("before.json", "after.json", "--html", "out.html")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    top = lines[: lines.index("before", 1)]
    assert top[:4] == ["before:", "Use SyncBN.", "after:", "Local BN is enough here."]
    assert top[top.index("What differs") + 1 :][:2] == ["before after", "lr 0.02 0.1"]
    assert "ddp+syncbn 97.5 ± 0.7 93.5 ± 0.7" in top
    assert "dp (emulated) 97.5 ± 0.7 -" in top
    assert "ddp+torch-syncbn not run not run" in top
    assert (
        top[top.index("Decisions, and differences of the results") + 2]
        == "ddp vs. single undecided, +0.0 undecided, +0.0"
    )
    assert lines.count("Relative difference from single, in step 1 and in step 10") == 2
    page = (files / "out.html").read_text(encoding="utf-8")
    body = page[page.index("<body>") :]
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", body)[:2] == [
        "before: 4 samples per rank, global batch 8",
        "after: 4 samples per rank, global batch 8",
    ]
    assert body.index("<strong>Use SyncBN.</strong>") < body.index("<strong>Local BN is enough here.</strong>")
    assert "93.5 ± 0.7" in body
    assert len(re.findall(r'<script type="application/json"', body)) == 2


def test_a_sweep_is_named_after_its_batches_and_its_file(call, files, before):
    larger = replace(before, settings=replace(before.settings, batch_per_rank=64))
    write_json(Sweep((larger, before)), files / "sweep.json")
    assert [run.name for run in read_runs([files / "sweep.json"])] == ["4 samples per rank", "64 samples per rank"]
    names = [run.name for run in read_runs([files / "before.json", files / "sweep.json"])]
    assert names == ["before", "sweep, 4 samples per rank", "sweep, 64 samples per rank"]
    assert call("sweep.json")[0] == 0


def test_files_of_one_name_are_told_apart_by_their_folders(files, before):
    (files / "old").mkdir()
    write_json(before, files / "old" / "before.json")
    paths = [files / "before.json", files / "old" / "before.json"]
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]


def test_runs_that_differ_in_more_than_their_batch_have_no_plot_against_it(files, before):
    larger = replace(before, settings=replace(before.settings, batch_per_rank=64))
    title = "Test accuracy, % against batch per rank"
    assert title in render_page([Run("before", before), Run("larger", larger)])
    other = replace(larger, settings=replace(larger.settings, steps=9))
    assert title not in render_page([Run("before", before), Run("other", other)])


def test_only_what_differs_is_listed(files):
    runs = read_runs([files / "before.json", files / "after.json"])
    assert differences(runs) == {"lr": ["0.02", "0.1"]}
    assert differences(runs[:1] * 2) == {}
    assert results(runs)["ddp"] == ["97.5 ± 0.7"] * 2


def test_an_older_record_is_judged_by_the_present_rule(call, files, before):
    data = _as_version_2(before.to_dict())
    (files / "old.json").write_text(json.dumps(data))
    (run,) = read_runs([files / "old.json"])
    assert run.comparison.decisions
    assert run.comparison.verdict[0].startswith("Undecided whether SyncBN is needed")
    code, out, _ = call("old.json")
    assert code == 0
    assert "an old sentence" not in out


def _as_version_2(data):
    data |= {"schema_version": 2, "verdict": ["an old sentence"]}
    for name in ("looks", "decisions"):
        del data[name]
    data["task"]["metric"] = "accuracy"
    for name in ("step", "collate", "optimizer"):
        del data["task"][name]
    for name in ("accumulate", "eval_batch", "num_workers", "amp", "margin", "budget_seconds"):
        del data["settings"][name]
    for arm in data["arms"]:
        step = arm.pop("step") or {}
        del arm["cost"]
        arm |= {"step_seconds": step.get("seconds"), "samples_per_second": 1000.0, "wait": None}
        for run in arm["seeds"]:
            run["test_accuracy"], run["test_accuracies"] = run.pop("test_metric"), run.pop("test_metrics")
            del run["units"]
    return data


def _changed(change):
    def text(record):
        data = json.loads(json.dumps(record))
        change(data)
        return json.dumps(data)

    return text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda record: "", "file.json is not a complete JSON file: Expecting value"),
        (lambda record: "not json", "file.json is not a complete JSON file: Expecting value"),
        (lambda record: json.dumps(record)[:2000], "file.json is not a complete JSON file: "),
        (lambda record: "[" * 100_000, "file.json is not a complete JSON file: "),
        (lambda record: "\xff", "file.json is not a complete JSON file: "),
        (
            lambda record: "[1]",
            "file.json holds no record of syncnorm; expected a file that `syncnorm compare --json`",
        ),
        (lambda record: "{}", "file.json holds no record of syncnorm; expected"),
        (_changed(lambda data: data.update(schema="syncnorm.bench")), "holds a record of schema syncnorm.bench; exp"),
        (
            _changed(lambda data: data.update(schema_version=99)),
            "has schema version 99, and this syncnorm reads 2 to 3",
        ),
        (
            _changed(lambda data: data.update(schema_version=1)),
            "has schema version 1, and this syncnorm reads 2 to 3",
        ),
        (_changed(lambda data: data.update(schema_version=None)), "has schema version None, and this syncnorm reads"),
        (_changed(lambda data: data.pop("arms")), "file.json is damaged: Comparison lacks arms"),
        (_changed(lambda data: data.update(arms=None)), "file.json is damaged: arms: expected a list, got None"),
        (_changed(lambda data: data["arms"][0].update(more=1)), "damaged: arms: ArmResult has unknown more"),
        (_changed(lambda data: data["settings"].update(lr="x")), "damaged: settings: lr: expected float, got 'x'"),
        (
            _changed(lambda data: _as_version_2(data)["arms"][0]["seeds"][0].update(test_accuracy=float("nan"))),
            "file.json is damaged: expected finite results",
        ),
        (_changed(lambda data: data.update(schema="syncnorm.compare.sweep", comparisons=[])), "holds no comparison"),
    ],
)
def test_a_file_that_is_no_record_ends_in_one_line(text, message, call, before, tmp_path):
    (tmp_path / "file.json").write_bytes(text(before.to_dict()).encode("latin-1"))
    code, out, err = call("file.json", "--html", "out.html")
    assert (code, out) == (2, "")
    assert err.startswith("syncnorm report: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.html").exists()


def test_files_that_cannot_be_read_or_written_end_in_one_line(call, files):
    for arguments, message in (
        (["missing.json"], "cannot read missing.json: No such file or directory"),
        (["."], "cannot read .: Is a directory"),
        (["before.json", "missing.json"], "cannot read missing.json: No such file or directory"),
        (["before.json", "--html", "no/folder.html"], "cannot write no/folder.html: No such file or directory"),
        ([], "Missing argument 'FILE...'."),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert err == f"syncnorm report: {message}\n"


@pytest.mark.parametrize("width", [80, 100])
def test_many_runs_with_long_names_stay_within_the_width(before, width, tmp_path):
    paths = [tmp_path / f"{'long-name-' * 6}{i}.json" for i in range(4)]
    for index, path in enumerate(paths):
        write_json(replace(before, settings=replace(before.settings, lr=0.1 * index)), path)
    out = io.StringIO()
    print_runs(read_runs(paths), Console(file=out, highlight=False, width=width))
    top = out.getvalue().split("Relative difference")[0].splitlines()
    assert max(map(len, top)) <= width
    assert not any("…" in line for line in top)


def test_a_record_is_the_same_after_reading(files, before):
    assert read_runs([files / "before.json"])[0].comparison == before
    assert isinstance(before, Comparison)
