"""The documentation as a site: it builds without a warning, is complete, and loads nothing from elsewhere."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from browser import result_of
from documents import ROOT

import syncnorm

if any(find_spec(package) is None for package in ("mkdocs", "material", "mkdocstrings")):
    pytest.skip("needs mkdocs-material and mkdocstrings: pip install '.[docs]'", allow_module_level=True)

pytestmark = pytest.mark.timeout(300)
MODULES = ("functional", "training", "monitor", "testing", "integrations.scalars")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environ = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr  # unknown links, anchors and names in the API too
    return out


class Loaded(HTMLParser):
    """What a browser loads for a page, and the ids on it."""

    def __init__(self, page: Path):
        super().__init__()
        self.urls, self.ids, self.text = [], set(), page.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id"))
        self.urls += [given[name] for name in ("src", "srcset", "data") if given.get(name)]
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.urls.append(given["href"])


def test_nothing_is_loaded_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded(page)
        assert not [url for url in loaded.urls if re.match(r"(https?:)?//", url)], page
        assert 'data-md-component="source"' not in loaded.text  # would ask api.github.com
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


def public_names() -> list[str]:
    found = []
    for module in [syncnorm, *(importlib.import_module(f"syncnorm.{name}") for name in MODULES)]:
        for name in getattr(module, "__all__", ["sync_batch_norm"]):
            if not isinstance(getattr(module, name), ModuleType):
                found.append(f"{module.__name__}.{name}")
    return [*found, "syncnorm.integrations.lightning.SyncNorm", "syncnorm.integrations.huggingface.SyncNorm",
            "syncnorm.compare.run", "syncnorm.errors.InputError"]  # fmt: skip


def test_the_api_has_every_public_name(site):
    ids = set().union(*(Loaded(page).ids for page in (site / "api").rglob("*.html")))
    missing = [name for name in public_names() if name not in ids]
    assert not missing


def test_sections_of_docstrings_are_shown_as_such(site):
    text = (site / "api" / "functional" / "index.html").read_text()
    assert "<strong>Collective:</strong>" in text
    for raw in ("Collective: in", ":func:", "Args:", "&gt;&gt;&gt; ``"):
        assert raw not in text
    assert inspect.signature(syncnorm.functional.sync_batch_norm).parameters.keys() <= {
        name for name in re.findall(r"<code>(\w+)</code>", text)
    }


def test_links_out_of_the_documents_lead_to_the_repository(site):
    page = (site / "guides" / "masks" / "index.html").read_text()
    assert 'href="https://github.com/syncnorm/syncnorm/blob/main/tests/layer/test_masks.py"' in page
    assert 'href="../../results/studies/#sequence"' in page


def test_the_drawing_is_part_of_its_page(site):
    page = (site / "how_it_works" / "index.html").read_text()
    assert re.search(r'<div class="drawing"><svg class="layer"', page)


_WIDTHS = """<!doctype html>
FRAMES
<pre id="result"></pre>
<script>
  onload = () => {  // after all frames have been loaded
    const widths = [...document.querySelectorAll("iframe")].map(
      (frame) => [frame.getAttribute("src"), frame.contentDocument.documentElement.scrollWidth]);
    result.textContent = JSON.stringify(Object.fromEntries(widths));
  };
</script>
"""
_FRAME = '<iframe src="{}" style="width: 390px; height: 800px; border: 0"></iframe>\n'


def test_no_page_is_wider_than_a_phone(site, tmp_path):
    """Wide tables, code and drawings scroll by themselves."""
    pages = [str(page.relative_to(site)) for page in sorted(site.rglob("*.html"))]
    harness = site / "widths.html"
    harness.write_text(_WIDTHS.replace("FRAMES", "".join(map(_FRAME.format, pages))))
    widths = json.loads(result_of(harness, tmp_path, "--allow-file-access-from-files", timeout=120))
    assert list(widths) == pages
    assert {page: width for page, width in widths.items() if width > 390} == {}
