"""The report as a page: what stands in it, that it stands alone, and that what users named cannot break it."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import records

from syncnorm.tools.compare import Comparison
from syncnorm.tools.report.html import render_html, write_html


class Page(HTMLParser):
    """Tags that are open, and text and attributes that were seen."""

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
    return replace(records.comparison(), verdict=("SyncBN recovers it.", "Take SyncBN."))


def test_a_page_has_verdict_tables_and_pictures(comparison, tmp_path):
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
        "Difference to single over depth",
        "Difference to single over steps",
        "Spread of the statistics, layer by layer",
        "Time of a step",
    ]


def test_a_page_asks_nothing_of_the_network(comparison):
    text = render_html([comparison])
    for _, key, value in Page(text).attributes:
        if key in ("src", "href"):
            assert value is not None
            assert value.startswith("data:")
    assert "<script" not in text
    assert not re.search(r"url\(|@import|<link", text)


def test_several_batches_have_a_picture_over_them_and_stand_in_order(comparison):
    larger = replace(comparison, settings=replace(comparison.settings, batch_per_rank=64))
    page = Page(render_html([larger, comparison]))
    titles = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert titles[0] == "Test accuracy, % against batch per rank"
    headings = [t for t in page.text if re.fullmatch(r"\d+ samples? a rank, \d+ in all", t)]
    assert headings == sorted(headings, key=lambda h: int(h.split()[0]))
    assert len(headings) == 2


def test_names_are_text(comparison):
    task = replace(comparison.task, model="<b>nets</b>:build")
    page = Page(render_html([replace(comparison, task=task, command="a && <i>b</i>")]))
    assert "b" not in [tag for tag, *_ in page.attributes]
    assert any("<b>nets</b>:build" in t for t in page.text)
    assert any("a && <i>b</i>" in t for t in page.text)


def test_what_was_not_measured_is_left_out(comparison):
    arms = tuple(replace(a, wait=None, memory=None, parity=(), collectives=None) for a in comparison.arms)
    page = Page(render_html([replace(comparison, arms=arms, spread=(), verdict=())]))
    titles = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert titles == ["Test accuracy, % by arm", "Learning curves", "Time of a step"]
    assert any("No verdict" in t for t in page.text)


def test_no_comparison_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        write_html([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
