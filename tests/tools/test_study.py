"""Whole studies, shortened, on real ranks: the records that they give, and the command line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from study_rows import by_hand

from syncnorm.__main__ import main
from syncnorm.tools.cli import syncnorm as command_line
from syncnorm.tools.common.records import read_json, write_json
from syncnorm.tools.common.units import decode
from syncnorm.tools.study import Study, StudySettings, run, sequence

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch-size", "placement", "learning-rate", "dp-vs-ddp", "accumulation"])
def test_a_study_gives_a_well_formed_record(name, tmp_path):
    study = run(name, quick=True, steps=1)
    assert study.settings == StudySettings(name, world_size=2, seeds=2, steps=1, quick=True)
    assert {row.seed for row in study.rows if row.measure == "accuracy"} == {0, 1}
    assert all(math.isfinite(row.value) for row in study.rows)
    assert all(0 <= row.value <= 1 for row in study.rows if "accuracy" in row.measure)
    for row in study.rows:
        per_image = decode(row.units)
        assert len(per_image) == {"accuracy": 2000, "validation accuracy": 500}.get(row.measure, 0)
        assert not len(per_image) or float(per_image.mean()) == pytest.approx(row.value)
    assert study.hardware.threads_per_rank == 1
    assert study.findings
    assert not any("nan" in finding or "inf" in finding.split() for finding in study.findings)
    assert len({(row.measure, row.seed, *row.condition.items()) for row in study.rows}) == len(study.rows)
    for view in study.views:
        shown = [row for row in study.rows if view.shows(row)]
        assert shown
        assert all(view.lines in row.condition and view.across in row.condition for row in shown)

    write_json(study, tmp_path / "study.json")
    back = json.loads((tmp_path / "study.json").read_text())
    assert (back["schema"], back["schema_version"]) == ("syncnorm.study", 2)
    assert Study.from_dict(back) == study


def test_another_schema_is_rejected():
    with pytest.raises(ValueError, match=r"expected schema syncnorm\.study version 2, got syncnorm\.bench 1"):
        Study.from_dict({"schema": "syncnorm.bench", "schema_version": 1})


def test_version_1_without_results_per_image_still_loads(tmp_path):
    path = tmp_path / "study.json"
    write_json(by_hand(), path)
    old = json.loads(path.read_text())
    old["schema_version"] = 1
    del old["settings"]["margin"]
    for row in old["rows"]:
        del row["units"]
    path.write_text(json.dumps(old))
    found = read_json(Study, path)
    assert found.settings == by_hand().settings
    assert [row.value for row in found.rows] == [row.value for row in by_hand().rows]
    assert {row.units for row in found.rows} == {""}
    assert found.to_dict()["schema_version"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps", "texts"), [
    ("fold", 1, ["Speed-up by folding, channels last", "All batch norms are folded"]),
    (
        *("sequence", 2),
        ["norm \\ padding  to the longest", "The claim that LN is better than BN on padded", *sequence.NORMS],
    ),
])  # fmt: skip
def test_a_quick_run_prints_tables_and_findings(name, steps, texts):
    result = CliRunner().invoke(command_line, ["study", name, "--quick", "--steps", str(steps)])
    assert result.exit_code == 0, result.output
    for text in texts:
        assert text in result.output


@pytest.fixture
def call(monkeypatch, capsys):
    """The command line in this process: (exit code, stdout, stderr)."""

    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["syncnorm", "study", *arguments])
        code = main()
        return code, *capsys.readouterr()

    return call_main


BAD = [
    (["batchsize"], "syncnorm study: No such command 'batchsize'."),
    (["placement", "--seeds", "1"], "syncnorm study placement: seeds must be at least 2, got 1"),
    (["placement", "--steps", "0"], "syncnorm study placement: steps must be at least 1, got 0"),
    (
        ["placement", "--ranks", "1"],
        "syncnorm study placement: study needs at least 2 ranks, got 1: ask for --ranks 2",
    ),
    (["placement", "--margin", "-1"], "syncnorm study placement: margin must be a number of at least 0, got -1.0"),
    (["placement", "--margin", "nan"], "syncnorm study placement: margin must be a number of at least 0, got nan"),
    (["placement", "--ranks", "65"], "syncnorm study placement: ranks must be at most 64, got 65"),
    (["placement", "--seeds", "1001"], "syncnorm study placement: seeds must be at most 1000, got 1001"),
    (["placement", "--plot", "/no/such/x.png"], "syncnorm study placement: cannot write /no/such/x.png"),
    (["placement", "--markdown", "/no/such/x.md"], "syncnorm study placement: cannot write /no/such/x.md"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_print_one_line_and_exit_with_2(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_under_a_launcher_rank_0_reports_first(call, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    code, out, err = call("placement", "--seeds", "1")
    assert (code, out) == (2, "")
    assert err.startswith("rank 1: syncnorm study placement: ")


def test_a_missing_package_is_reported(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    code, out, err = call("placement", "--quick")
    assert (code, out) == (2, "")
    assert err == 'syncnorm: needs mlxtend: pip install "syncnorm[compare]"\n'


def test_the_error_for_an_unknown_study_lists_the_studies():
    with pytest.raises(ValueError, match="no study is called 'x': the studies are batch-size, "):
        run("x")


@pytest.mark.slow
def test_under_torchrun_it_uses_the_launched_ranks_and_writes_every_file(tmp_path):
    files = {"--json": tmp_path / "s.json", "--markdown": tmp_path / "s.md"}
    options = [text for option, file in files.items() for text in (option, str(file))]
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "syncnorm", "study")
    done = subprocess.run(
        [sys.executable, *launcher, "placement", "--quick", "--steps", "1", "--margin", "100", *options],
        capture_output=True, text=True, timeout=100, env=environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Findings") == 1
    assert "\x1b" not in done.stdout
    settings = json.loads(files["--json"].read_text())["settings"]
    assert (settings["study"], settings["margin"]) == ("placement", 100)
    assert "undecided" not in done.stdout  # no interval of accuracies reaches beyond this margin
    assert "| no norm |" in files["--markdown"].read_text()
