"""A study on a terminal, as Markdown and as a plot."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from study_rows import by_hand

from syncnorm.tools.report.study_plot import write_plot
from syncnorm.tools.report.study_text import markdown, print_study
from syncnorm.tools.study import STUDIES
from syncnorm.tools.study.experiment import DATA_NOTE


@pytest.fixture
def study():
    return by_hand()


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_shows_every_cell(study, width):
    out = io.StringIO()
    print_study(study, Console(file=out, highlight=False, width=width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if " ± " in line and line[:1] in "BSGLI"}
    assert rows["GN"] == ["GN", "93.0", "±", "0.0", "91.0", "±", "0.0"]
    assert rows["IN"] == ["IN", "95.0", "±", "0.0", "-"]
    assert "0.930 ± 0.000" in text
    assert study.claim.source in " ".join(text.split())
    assert all(" ".join(finding.split()) in " ".join(text.split()) for finding in study.findings)


def test_markdown_has_a_table_for_each_view_and_every_finding(study):
    lines = markdown(study).splitlines()
    assert "| norm / images a rank | 1 | 16 |" in lines
    assert "| --- | ---: | ---: |" in lines
    assert "| IN | 95.0 ± 0.0 | - |" in lines
    assert [line for line in lines if line.startswith("- ")][: len(study.findings)] == [
        f"- {finding}" for finding in study.findings
    ]


def test_the_plot_is_a_png_whose_lines_differ_without_color(study, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda *args, **look: drawn.append(look) or errorbar(*args, **look))
    write_plot(study, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    first = drawn[:6]
    assert [look["label"] for look in first] == ["BN", "BN, recalibrated", "SyncBN", "GN", "LN", "IN"]
    assert len({look["marker"] for look in first}) == len({str(look["linestyle"]) for look in first}) == 6


@pytest.mark.parametrize("name", STUDIES)
def test_the_stored_results_have_the_current_question_and_notes(name):
    text = (Path(__file__).parents[2] / "examples" / "studies.md").read_text()
    section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert section.lstrip().startswith(STUDIES[name].question)
    assert f"- *data*: {DATA_NOTE}" in section
