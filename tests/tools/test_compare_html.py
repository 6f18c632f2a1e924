"""The HTML report: its content, that it is self-contained, and that names from the user cannot break it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import records
from pictures import recorded_pictures

from syncnorm.tools.compare import Comparison
from syncnorm.tools.compare.paired import decisions
from syncnorm.tools.compare.records import ArmResult, MetricInfo, Point
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


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return replace(records.judged(), verdict=("SyncBN recovers the difference.", "Use SyncBN."))


@pytest.fixture(scope="module")
def text(comparison) -> str:
    return render_html([comparison])


@pytest.fixture(scope="module")
def text_of_two(comparison) -> str:
    return render_html([replace(comparison, settings=replace(comparison.settings, batch_per_rank=64)), comparison])


def _descriptions(page: Page) -> dict[str, str]:
    """What a screen reader says of each drawing: title -> what it shows."""
    labels = [value or "" for tag, key, value in page.attributes if (tag, key) == ("svg", "aria-label")]
    return dict(label.split(": ", 1) for label in labels)


def _titles(page: Page) -> list[str]:
    return list(_descriptions(page))


def test_a_page_has_verdict_tables_and_plots(comparison, tmp_path):
    write_html([comparison], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    text = " ".join(page.text)
    for sentence in comparison.verdict:
        assert sentence in text
    for arm in comparison.arms:
        assert arm.label in text
    assert _titles(page) == [
        "Decisions",
        "Test accuracy, % by arm",
        "Learning curves",
        "Difference from single by depth",
        "Difference from single by step",
        "Divergence of the statistics by layer",
        "Step time",
    ]


def test_a_page_needs_no_network(text):
    for _, key, value in Page(text).attributes:
        if key in ("src", "href"):
            assert value is not None
            assert value.startswith("#")
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?://(?!www\.w3\.org/1999/xlink\")", text)
    assert not re.search(r"url\((?!#)|@import|<link", text)


def test_several_batches_are_sorted_and_have_a_plot_of_all(text_of_two):
    page = Page(text_of_two)
    assert _titles(page)[0] == "Test accuracy, % against batch per rank"
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
    arms = tuple(replace(a, step=None, memory=None, parity=(), collectives=None) for a in comparison.arms)
    page = Page(render_html([replace(comparison, arms=arms, spread=(), decisions=(), verdict=())]))
    assert _titles(page) == ["Test accuracy, % by arm", "Learning curves"]
    assert any("No verdict" in t for t in page.text)


def test_the_first_sentence_is_the_decision_in_bold(comparison, text):
    body = text[text.index("<body>") :]
    assert re.match(
        rf"<body>\s*<h1>.*</h1>\s*<div class=\"verdict\">\s*<p><strong>{comparison.verdict[0]}</strong></p>", body
    )


def test_drawings_are_described_by_what_they_show(text):
    found = _descriptions(Page(text))
    assert found["Test accuracy, % by arm"].startswith("single 97.5, dp (emulated) 97.5, ddp 97.5")
    assert "ddp compared with single: undecided, 0 (-2" in found["Decisions"]
    assert found["Difference from single by depth"] == "largest: dp 4e-03, ddp 4e-03, ddp+syncbn 2e-07"
    assert found["Learning curves"].startswith("after step 504: single 97.5")
    assert found["Step time"].startswith("single 8.0 ms")
    assert found["Divergence of the statistics by layer"] == "largest for the means: 0.123 in layer 0.1"


def test_ids_are_unique_and_every_reference_has_its_target(text_of_two):
    ids = [value for _, key, value in Page(text_of_two).attributes if key == "id"]
    assert len(ids) == len(set(ids)) > 500
    references = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', text_of_two)
    assert len(references) > 500
    assert set(references) <= set(ids)


def test_every_color_of_a_drawing_is_one_of_the_page_and_stands_out_in_light_and_dark(text):
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert not any(re.search("#[0-9a-f]{6}", drawing) for drawing in drawings)
    used = {name for drawing in drawings for name in re.findall(r"var\(--([\w-]+)\)", drawing)}
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root {(.*?)}", text, re.S)
    )
    assert used <= light.keys() == dark.keys()
    for scheme in (light, dark):
        for name, color in scheme.items():
            faint = name in ("paper", "tint", "grid", "line", "bar", "pale-bar")
            at_least = 4.5 if name in ("ink", "soft") else 1 if faint else 3
            assert _contrast(color, scheme["paper"]) >= at_least, name
    assert "@media screen and (prefers-color-scheme: dark)" in text  # a print is always light


def _contrast(color: str, other: str) -> float:
    """As in WCAG 2: 1 to 21."""
    lighter, darker = sorted((_luminance(color), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_record_is_in_the_page_whatever_it_contains(comparison):
    hostile = replace(comparison, command="</script><!--<script> & \udc80 'quoted'")
    text = render_html([hostile])
    (record,) = re.findall(r'<script type="application/json" id="run-1-record">(.*?)</script>', text, re.DOTALL)
    assert not set(record) & set("<>&'")
    assert Comparison.from_dict(json.loads(record)) == hostile


def test_learning_curves_have_a_band_over_seeds(comparison, text):
    band = re.compile(r"FillBetweenPolyCollection.*?fill-opacity: 0\.\d+", re.DOTALL)
    assert band.search(text)
    one = replace(comparison, decisions=(), arms=tuple(replace(arm, seeds=arm.seeds[:1]) for arm in comparison.arms))
    assert not band.search(render_html([one]))


def test_the_drawings_have_no_faults_whatever_the_names(comparison):
    names = ("a$x^2$b", "<b>bold</b>", "[red]", "层归一化" * 5, "long." * 16)
    arms = tuple(replace(comparison["ddp"], name=f"nets:{name}", label=name) for name in names)
    with recorded_pictures() as pictures:
        render_html([replace(comparison, arms=(*comparison.arms, *arms))])
        render_html([comparison])
    assert [picture.faults() for picture in pictures] == [[]] * len(pictures)
    assert len(pictures) == 14
    ticks = {tick.text for picture in pictures for tick in picture.ticks}
    assert {"1e-7", "1e-5", "a$x^2$b", "<b>bold</b>", "[red]"} <= ticks
    assert all(picture.legends for picture in pictures if len(picture.frames) == 1 and "step" in str(picture.texts))


def test_an_arm_that_fails_does_not_hide_the_other_decisions(comparison):
    seeds = tuple(replace(run, test_metric=0.1 + 0.01 * run.seed) for run in comparison["ddp"].seeds)
    arms = tuple(replace(arm, seeds=seeds) if arm.name == "ddp+group" else arm for arm in comparison.arms)
    changed = replace(comparison, arms=arms)
    with recorded_pictures() as pictures:
        text = render_html([replace(changed, decisions=decisions(changed))])
    drawn = pictures[0]
    assert drawn.faults() == []
    assert "-87" in {text.text for text in drawn.texts}
    numbers = [float(tick.text.replace("\N{MINUS SIGN}", "-")) for tick in drawn.ticks if "vs" not in tick.text]
    assert -6 < min(numbers) < max(numbers) < 6
    assert "ddp+group compared with ddp+syncbn: worse, -87" in _descriptions(Page(text))["Decisions"]


def _of_one_seed(made):
    made = replace(made, arms=tuple(replace(arm, seeds=arm.seeds[:1]) for arm in made.arms))
    return replace(made, decisions=decisions(made))


def _of_a_loss(made):
    metric = MetricInfo("loss", higher_is_better=False, share=False, units="batches")
    made = replace(made, task=replace(made.task, metric=metric))
    return replace(made, decisions=decisions(made))


def _not_finite(made):
    seeds = tuple(replace(run, test_metric=None, test_metrics=(Point(252, None),)) for run in made["ddp"].seeds)
    made = replace(made, arms=tuple(replace(arm, seeds=seeds) if arm.name == "ddp" else arm for arm in made.arms))
    return replace(made, decisions=decisions(made))


def _of_many_layers(made):
    names = tuple(f"layer{i // 10}.{i % 10}.bn1" for i in range(160))

    def renamed(arm):
        parity = [
            replace(p, layers=tuple(replace(p.layers[0], layer=n) for n in names)) for p in arm.parity if p.layers
        ]
        return replace(arm, parity=tuple(parity))

    spread = tuple(replace(made.spread[0], layer=name) for name in names)
    task = replace(made.task, norm_layers=names)
    return replace(made, task=task, arms=tuple(map(renamed, made.arms)), spread=spread)


def _not_run(made):
    arms = tuple(ArmResult(arm.name, arm.label, 2, not_run="out of memory") for arm in made.arms)
    return replace(made, arms=arms, spread=(), decisions=(), verdict=())


@pytest.mark.parametrize("change", [_of_one_seed, _of_a_loss, _not_finite, _of_many_layers, _not_run])
def test_unusual_records_have_pages_without_faults(comparison, change):
    with recorded_pictures() as pictures:
        text = render_html([change(comparison)])
    assert Page(text).open == []
    assert [picture.faults() for picture in pictures] == [[]] * len(pictures)
    assert not re.search(r">\s*(nan|inf|None)\b", text[: text.index("<script")])


def test_no_comparison_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        write_html([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
