import io

import pytest
import records
from rich.console import Console

from syncnorm.tools.compare.records import CompareSettings, Comparison, MetricInfo, Task
from syncnorm.tools.report.compare_terminal import print_comparison
from syncnorm.tools.report.progress import progress_on_stderr


@pytest.fixture
def comparison():
    return records.comparison()


def _printed(comparison, **console):
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, highlight=False, **console))
    return out.getvalue()


def _rows(text, start):
    return [line.split() for line in text.splitlines() if line.startswith(start + " ")]


def test_the_verdict_comes_first(comparison):
    text = _printed(comparison, width=100)
    at = [
        text.index(part)
        for part in ("Local BN is sufficient", "A second", "a residual CNN", "Relative difference from single")
    ]
    assert at == sorted(at)
    assert (
        "a residual CNN (77,754 parameters, 2 norm layers), trained on 1,347 samples of scikit-learn's digits" in text
    )
    assert "seeds 0, 1." in text


def test_parity_rows(comparison):
    text = _printed(comparison, width=100)
    assert _rows(text, "single")[0][:7] == ["single"] + ["0"] * 6
    assert _rows(text, "dp (emulated)")[0][-9:] == [*["4e-03"] * 6, "no", "(other", "stats)"]
    assert _rows(text, "ddp+syncbn")[0] == ["ddp+syncbn", *["2e-07"] * 6, "yes", "(rounding)"]
    assert _rows(text, "ddp+group")[0][1:] == [*["2e-02"] * 3, "-", *["2e-02"] * 2, "no", "(other", "norm)"]


def test_layer_rows(comparison):
    assert _rows(_printed(comparison, width=100), "1.norm1") == [["1.norm1", "4e-03", "2e-07", "0.123", "-"]]


def test_of_many_layers_ten_are_shown_from_first_to_last(comparison):
    names = tuple(f"stage.{i}.a_rather_long_name_of_a_block.norm{i}" for i in range(60))
    task = Task(**{**vars(comparison.task), "norm_layers": names})
    text = _printed(Comparison(**{**vars(comparison), "task": task}), width=80)
    assert "10 of 60 layers" in text
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("...")]
    assert (len(shown), shown[0][-5:], shown[-1][-6:]) == (10, "norm0", "norm59")


def test_result_rows(comparison):
    text = _printed(comparison, width=100)
    assert _rows(text, "ddp+syncbn")[1] == ["ddp+syncbn", "50.0%", "97.5%", "±", "0.7%", "1,000", "12.3"]
    assert _rows(text, "ddp+torch-syncbn") == [["ddp+torch-syncbn", "-", "-", "not", "run", "-", "-"]]
    assert "Not run: ddp+torch-syncbn: torch refuses: [CPU]" in text


def test_losses_if_there_are_no_classes(comparison):
    task = Task(**{**vars(comparison.task), "metric": MetricInfo("loss", False, False, "batches")})
    text = _printed(Comparison(**{**vars(comparison), "task": task}), width=100)
    assert _rows(text, "ddp+syncbn")[1] == ["ddp+syncbn", "0.5", "0.975", "±", "0.00707", "1,000", "12.3"]


def test_cost_rows(comparison):
    text = _printed(comparison, width=100)
    assert _rows(text, "ddp+syncbn")[2] == [
        *["ddp+syncbn", "8.0", "=", "3.0", "+", "1.0", "+", "4.0", "1.20-1.40"],
        *["1", "+", "9", "3.0", "3.0"],
    ]
    assert _rows(text, "single")[-1] == ["single", "8.0", "-", "0", "0", "3.0"]
    assert _rows(text, "ddp+group")[2][-1] == "-"


def test_an_arm_beyond_rounding_is_not_called_the_same(comparison):
    just_beyond = records.arm("ddp+syncbn", parity=records.parity(2e-5))
    text = _printed(Comparison(**{**vars(comparison), "arms": (just_beyond,)}), width=100)
    assert "yes (rounding)" not in text
    assert "no (other stats)" in text


@pytest.mark.parametrize("width", [80, 100])
def test_fits_a_terminal_in_whole_words(comparison, width):
    text = _printed(comparison, width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text


def test_piped_output_is_plain_and_100_columns_wide(comparison, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_comparison(comparison)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert _rows(text, "ddp+syncbn")[0][-2:] == ["yes", "(rounding)"]


def test_terminal_output_is_colored(comparison):
    assert "\x1b[" in _printed(comparison, width=100, force_terminal=True, color_system="standard", no_color=False)


def test_one_parity_step_makes_one_group_of_columns(comparison):
    settings = CompareSettings(("single",), 2, 4, 1, 1, (0,), 0.02, 0.9, 8)
    text = _printed(Comparison(**{**vars(comparison), "settings": settings}), width=100)
    assert "step 10" not in text
    assert _rows(text, "single")[0] == ["single", "0", "0", "0", "0", "the", "reference"]


def test_progress_is_one_line_per_arm_if_stderr_is_not_a_terminal(comparison, capsys):
    with progress_on_stderr(2) as progress:
        for arm in (comparison["single"], comparison["ddp+torch-syncbn"]):
            progress.start(arm.name, 504)
            progress.step()
            progress.finish(arm)
    expected = "1/2 single: 0.975 on the test data\n2/2 ddp+torch-syncbn: not run: torch refuses: [CPU]\n"
    assert capsys.readouterr().err == expected
