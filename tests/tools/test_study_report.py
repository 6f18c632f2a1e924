"""A study on a terminal, as Markdown and as a plot."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import recorded_pictures
from rich.console import Console
from study_rows import by_hand, rows

from syncnorm.tools.report.study_plot import write_plot
from syncnorm.tools.report.study_text import markdown, print_study
from syncnorm.tools.study import STUDIES, View
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


def _picture(study, path, views, made):
    with recorded_pictures() as pictures:
        write_plot(replace(study, views=tuple(views), rows=tuple(made)), path)
    (picture,) = pictures
    assert picture.faults() == []
    return picture


def test_lines_that_end_close_together_have_a_closeup(study, tmp_path):
    view = View("By steps", "accuracy", "place", "steps", {}, scale="log")
    starts = {"before ReLU": 0.2, "after ReLU": 0.3, "no norm": 0.1}

    def made(last):
        cells = {}
        for shift, (place, first) in enumerate(starts.items()):
            cells[("place", place), ("steps", 38)] = first
            cells[("place", place), ("steps", 300)] = 0.84 + shift * last
        return rows("accuracy", cells)

    close = _picture(study, tmp_path / "close.png", [view], made(0.01))
    assert len(close.frames) == 2
    names = [tick.text for tick in close.ticks if tick.box[0] > close.frames[0].box[2]]
    assert [name for name in names if name in starts] == list(starts)
    assert len(_picture(study, tmp_path / "apart.png", [view], made(0.06)).frames) == 1
    assert len(_picture(study, tmp_path / "equal.png", [view], made(0.0)).frames) == 1


def test_a_ratio_is_drawn_around_one_and_no_marker_is_on_an_axis(study, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, lines = [], []
    errorbar, axhline = Axes.errorbar, Axes.axhline
    monkeypatch.setattr(Axes, "errorbar", lambda ax, x, *a, **k: drawn.append((ax, x)) or errorbar(ax, x, *a, **k))
    monkeypatch.setattr(Axes, "axhline", lambda ax, y, **k: lines.append((ax, y)) or axhline(ax, y, **k))
    made = rows("speed-up", {(("model", m), ("batch", b)): 1.2 for m in ("plain", "deep") for b in (1, 32)})
    _picture(study, tmp_path / "fold.png", [View("Speed-up", "speed-up", "model", "batch", {}, "ratio")], made)
    (ax, height) = lines[0]
    assert (len(lines), height) == (1, 1)
    assert ax.get_ylim()[0] < 1 < ax.get_ylim()[1]
    assert ax.get_ylim()[0] > 0.5
    left, right = ax.get_xlim()
    assert all(left + 0.1 < x < right - 0.1 for _, points in drawn for x in points)


def test_a_view_of_one_line_has_bars_with_their_values(study, tmp_path):
    made = rows("padding", {(("norm", "BN"), ("padding", name)): value for name, value in (("a", 0.2), ("b", 0.64))})
    picture = _picture(study, tmp_path / "bars.png", [View("Padding", "padding", "norm", "padding", {})], made)
    assert {"20", "64"} <= {text.text for text in picture.texts}
    assert picture.legends == []


@pytest.mark.parametrize("name", STUDIES)
def test_the_stored_results_have_the_current_question_and_notes(name):
    text = (Path(__file__).parents[2] / "examples" / "studies.md").read_text()
    section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert section.lstrip().startswith(STUDIES[name].question)
    assert f"- *data*: {DATA_NOTE}" in section
