"""The page of a comparison in a real browser: what is drawn, on a phone and on a screen, and what its scripts do."""

import json
from dataclasses import replace

import pytest
import records
from browser import in_browser

from syncnorm.tools.report.compare_html import render_html

pytestmark = pytest.mark.slow

HOSTILE = ("stages.$x_{1}$.norm", "<script>alert(1)</script>", "[red]norm[/red]", "层归一化.卷积", "deep." * 16)

# Texts of a drawing that overlap, or that stick out of it by more than a pixel.
FAULTS = """
  const found = [];
  for (const svg of page.querySelectorAll("svg")) {
    const whole = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
    boxes.forEach(([name, a], index) => {
      if (name.includes("mathdefault")) found.push(`${name} is a formula`);
      const outside = [whole.left - a.left, a.right - whole.right, whole.top - a.top, a.bottom - whole.bottom];
      if (Math.max(...outside) > 1) found.push(`${name} is cut off by ${outside}`);
      for (const [other, b] of boxes.slice(index + 1)) {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 1 && high > 1.5) found.push(`${name} overlaps ${other}`);
      }
    });
  }
  return [found, page.querySelectorAll("svg text").length];
"""


@pytest.fixture
def comparison():
    return records.judged()


@pytest.fixture
def hostile(comparison):
    """The same with names of layers, arms and the model that would break a page."""
    rename = dict(zip(records.LAYERS, HOSTILE, strict=False))

    def renamed(arm):
        parity = tuple(
            replace(p, layers=tuple(replace(each, layer=rename[each.layer]) for each in p.layers)) for p in arm.parity
        )
        return replace(arm, parity=parity)

    arms = [*map(renamed, comparison.arms)]
    arms += [replace(arms[2], name=f"nets:{name}", label=f"nets:{name}") for name in HOSTILE]
    spread = tuple(replace(comparison.spread[0], layer=name) for name in HOSTILE)
    task = replace(comparison.task, model=f"{HOSTILE[1]} {HOSTILE[3]} {'m' * 80}", norm_layers=HOSTILE)
    return replace(comparison, arms=tuple(arms), spread=spread, task=task, verdict=(HOSTILE[1], HOSTILE[4] * 2))


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["comparison", "hostile"])
def test_no_label_overlaps_another_or_is_cut_off(name, width, request, tmp_path):
    page = render_html([request.getfixturevalue(name)])
    faults, labels = in_browser(page, FAULTS, tmp_path, width)
    assert faults == []
    assert labels > 80


@pytest.mark.parametrize("width", [390, 500, 1200])
def test_the_page_is_no_wider_than_the_screen_and_wide_tables_say_that_they_scroll(hostile, width, tmp_path):
    script = """
      const regions = [...page.querySelectorAll(".wide")];
      return [page.documentElement.scrollWidth, regions.map((region) => [
        region.scrollWidth > region.clientWidth + 1, !region.previousElementSibling.hidden,
        region.tabIndex, page.getElementById(region.getAttribute("aria-labelledby")).textContent])];
    """
    scroll_width, regions = in_browser(render_html([hostile]), script, tmp_path, width)
    assert scroll_width <= width
    assert len(regions) == 4
    for scrolls, hint, tab_index, title in regions:
        assert hint == scrolls
        assert tab_index == 0
        assert title
    assert [scrolls for scrolls, *_ in regions] == [True] * 4 if width == 390 else True


def test_a_click_sorts_a_table_and_another_reverses_it(comparison, tmp_path):
    script = """
      const table = [...page.querySelectorAll("table")].find((each) => each.textContent.includes("of which work"));
      const header = [...table.tHead.rows[0].cells].find((each) => each.textContent.includes("ms per step"));
      const seen = () => [header.getAttribute("aria-sort"), [...table.tBodies[0].rows].map((row) =>
        [row.cells[0].textContent, row.cells[header.cellIndex].textContent])];
      const found = [seen()];
      for (let i = 0; i < 2; i++) { header.querySelector("button").click(); found.push(seen()); }
      return found;
    """
    slow = {"single": 0.1, "ddp": 0.009, "dp": 0.02}
    arms = [
        replace(a, step=replace(a.step, seconds=slow.get(a.name, 0.008))) if a.step else a for a in comparison.arms
    ]
    before, up, down = in_browser(render_html([replace(comparison, arms=tuple(arms))]), script, tmp_path)
    assert [name for name, _ in before[1]] == ["single", "dp (emulated)", "ddp", "ddp+syncbn", "ddp+group"]
    assert [before[0], up[0], down[0]] == [None, "ascending", "descending"]
    values = [[float(value) for _, value in rows] for rows in (up[1], down[1])]
    assert values == [[8.0, 8.0, 9.0, 20.0, 100.0], [100.0, 20.0, 9.0, 8.0, 8.0]]
    assert sorted(up[1]) == sorted(before[1])


def test_the_record_can_be_downloaded(hostile, tmp_path):
    script = """
      const link = page.querySelector("a[download]");
      return [link.href, link.parentElement.hidden, link.download,
        JSON.parse(page.getElementById(link.dataset.record).textContent)];
    """
    hostile = replace(hostile, command="syncnorm compare </script><!-- \udc80")
    link, hidden, name, record = in_browser(render_html([hostile]), script, tmp_path)
    assert link.startswith("blob:")
    assert not hidden
    assert name.endswith(".json")
    assert record == json.loads(json.dumps(hostile.to_dict()))


@pytest.mark.parametrize("dark", [False, True])
def test_texts_and_lines_stand_out_in_light_and_dark(comparison, dark, tmp_path):
    script = """
      const colors = (selector, property) => [...page.querySelectorAll(selector)].map(
        (each) => page.defaultView.getComputedStyle(each)[property]);
      return [colors("body", "backgroundColor")[0], colors("svg text, p, td, figcaption", "fill").slice(0, 1),
        [...colors("p, td, th, figcaption", "color"), ...colors("svg text", "fill")],
        colors("svg g[id*=line2d] path", "stroke")];
    """
    paper, _, texts, lines = in_browser(render_html([comparison]), script, tmp_path, dark=dark)
    assert (_luminance(paper) < 0.05) == dark
    assert min(_contrast(color, paper) for color in texts) >= 4.5
    grid = sorted({color for color in lines if color != "none"}, key=lambda color: _contrast(color, paper))
    assert [color for color in grid if _contrast(color, paper) < 3] == grid[:1]  # the grid lines alone are faint


def _contrast(color, other):
    lighter, darker = sorted((_luminance(color), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color):
    """As in WCAG 2."""
    channels = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
