"""The HTML report: its content, that it is self-contained, and that names from the user cannot break it."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import records

from syncnorm.tools.compare import Comparison
from syncnorm.tools.report.compare_html import render_html, write_html


class Page(HTMLParser):
    """The open tags, and the text and attributes of the page."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def comparison() -> Comparison:
    return replace(records.comparison(), verdict=("SyncBN recovers the difference.", "Use SyncBN."))


def test_a_page_has_verdict_tables_and_plots(comparison, tmp_path):
    write_html([comparison], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    text = " ".join(page.text)
    for sentence in comparison.verdict:
        assert sentence in text
    for arm in comparison.arms:
        assert arm.label in text
    titles = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert titles == [
        "Test accuracy, % by arm",
        "Learning curves",
        "Difference from single by depth",
        "Difference from single by step",
        "Divergence of the statistics by layer",
        "Step time",
    ]


def test_a_page_needs_no_network(comparison):
    text = render_html([comparison])
    for _, key, value in Page(text).attributes:
        if key in ("src", "href"):
            assert value is not None
            assert value.startswith("data:")
    assert "<script" not in text
    assert not re.search(r"url\(|@import|<link", text)


def test_several_batches_are_sorted_and_have_a_plot_of_all(comparison):
    larger = replace(comparison, settings=replace(comparison.settings, batch_per_rank=64))
    page = Page(render_html([larger, comparison]))
    titles = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert titles[0] == "Test accuracy, % against batch per rank"
    headings = [t for t in page.text if re.fullmatch(r"\d+ samples? per rank, global batch \d+", t)]
    assert headings == sorted(headings, key=lambda h: int(h.split()[0]))
    assert len(headings) == 2


def test_names_are_escaped(comparison):
    task = replace(comparison.task, model="<b>nets</b>:build")
    page = Page(render_html([replace(comparison, task=task, command="a && <i>b</i>")]))
    assert "b" not in [tag for tag, *_ in page.attributes]
    assert any("<b>nets</b>:build" in t for t in page.text)
    assert any("a && <i>b</i>" in t for t in page.text)


def test_what_was_not_measured_is_left_out(comparison):
    arms = tuple(replace(a, wait=None, memory=None, parity=(), collectives=None) for a in comparison.arms)
    page = Page(render_html([replace(comparison, arms=arms, spread=(), verdict=())]))
    titles = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert titles == ["Test accuracy, % by arm", "Learning curves", "Step time"]
    assert any("No verdict" in t for t in page.text)


def test_no_comparison_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        write_html([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
