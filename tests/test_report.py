import io

import pytest
from rich.console import Console

from syncnorm.compare.records import (
    ArmResult,
    CollectiveCount,
    Comparison,
    Gap,
    Hardware,
    Parity,
    Settings,
)
from syncnorm.report.progress import progress_on_stderr
from syncnorm.report.terminal import print_comparison


def _parity(rel):
    return tuple(Parity(step, *[Gap(rel / 2, rel)] * 3) for step in (1, 10))


def _arm(name, **changes):
    values = {
        "label": name,
        "ranks": 2,
        "test_accuracy": 0.975,
        "step_seconds": 0.008,
        "samples_per_second": 1000.0,
        "collectives": (CollectiveCount("all_reduce", "ddp", 1, 2048),),
        "wall_seconds": 12.34,
    }
    return ArmResult(name, **{**values, **changes})


@pytest.fixture
def comparison():
    synced = (CollectiveCount("all_reduce", "ddp", 1, 2048), CollectiveCount("all_gather", "norm", 9, 1024))
    other_norm = tuple(Parity(step, Gap(0.01, 0.02), None, None) for step in (1, 10))
    return Comparison(
        settings=Settings(("single",), 2, 4, 504, 10, 0, 0.02, 0.9, 8),
        hardware=Hardware(
            "cpu", "A processor with a name as long as vendors like to make them @ 2.0 GHz", "gloo", 2, 1
        ),
        syncnorm_version="0.1.0",
        torch_version="2.13.0",
        python_version="3.11",
        date="2024-01-01T00:00:00+00:00",
        command="syncnorm compare",
        num_parameters=77754,
        num_norm_layers=9,
        num_train=1347,
        num_test=450,
        arms=(
            _arm("single", parity=_parity(0.0), collectives=()),
            _arm("dp", label="dp (emulated)", parity=_parity(4e-3), collectives=()),
            _arm("ddp+syncbn", parity=_parity(2e-7), collectives=synced),
            _arm("ddp+group", parity=other_norm),
            ArmResult("ddp+torch-syncbn", "ddp+torch-syncbn", 2, not_run="torch refuses: [CPU]"),
        ),
        wall_seconds=61.0,
    )


def _printed(comparison, **console):
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, highlight=False, **console))
    return out.getvalue()


def _rows(text, start):
    return [line.split() for line in text.splitlines() if line.startswith(start + " ")]


def test_parity_rows(comparison):
    text = _printed(comparison, width=100)
    assert _rows(text, "single")[0][:7] == ["single"] + ["0"] * 6
    assert "4e-03  4e-03  4e-03" in text
    assert _rows(text, "dp (emulated)")[0][-3:] == ["no:", "other", "statistics"]
    assert _rows(text, "ddp+syncbn")[0] == ["ddp+syncbn", *["2e-07"] * 6, "yes,", "to", "fp32", "rounding"]
    assert _rows(text, "ddp+group")[0] == [
        "ddp+group",
        "2e-02",
        "-",
        "-",
        "2e-02",
        "-",
        "-",
        "no:",
        "another",
        "norm",
    ]


def test_cost_rows(comparison):
    text = _printed(comparison, width=100)
    assert _rows(text, "ddp+syncbn")[1] == ["ddp+syncbn", "97.5%", "1,000", "8.0", "1", "+", "9", "3.0", "12.3"]
    assert _rows(text, "single")[1] == ["single", "97.5%", "1,000", "8.0", "0", "0", "12.3"]
    assert _rows(text, "ddp+torch-syncbn") == [["ddp+torch-syncbn", "not", "run", "-", "-", "-", "-", "-"]]
    assert "Not run: ddp+torch-syncbn: torch refuses: [CPU]" in text


def test_an_arm_beyond_rounding_is_not_called_the_same(comparison):
    just_beyond = _arm("ddp+syncbn", parity=_parity(2e-5))
    text = _printed(Comparison(**{**vars(comparison), "arms": (just_beyond,)}), width=100)
    assert "yes, to fp32 rounding" not in text
    assert "no: other statistics" in text


def test_fits_a_hundred_columns_in_whole_numbers(comparison):
    text = _printed(comparison, width=100)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text


def test_piped_output_is_plain_and_a_hundred_wide(comparison, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_comparison(comparison)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert _rows(text, "ddp+syncbn")[0][-4:] == ["yes,", "to", "fp32", "rounding"]


def test_terminal_output_is_coloured(comparison):
    assert "\x1b[" in _printed(comparison, width=100, force_terminal=True, color_system="standard", no_color=False)


def test_one_parity_step_makes_one_group_of_columns(comparison):
    settings = Settings(("single",), 2, 4, 1, 1, 0, 0.02, 0.9, 8)
    text = _printed(Comparison(**{**vars(comparison), "settings": settings}), width=100)
    assert text.count("after") == 1


def test_progress_is_a_line_an_arm_where_stderr_is_no_terminal(comparison, capsys):
    with progress_on_stderr(2) as progress:
        for arm in (comparison["single"], comparison["ddp+torch-syncbn"]):
            progress.start(arm.name, 504)
            progress.step()
            progress.finish(arm)
    expected = "1/2 single: 97.5% right\n2/2 ddp+torch-syncbn: not run: torch refuses: [CPU]\n"
    assert capsys.readouterr().err == expected
