"""The links of all documents resolve, and the Python code in README and docs/ runs.

Blocks of a document run in their order, in one namespace, on two gloo ranks with an initialized process group, as in
a script that torchrun has started. A block with a title is a file of that name: tests run under pytest, other scripts
under torchrun.
"""

import re
import runpy
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from documents import DOCUMENTS, LINK, PYTHON, ROOT, anchors, in_repository, name_of, page_of, prose
from launches import run

from syncnorm.testing import run_ranks

PAGES = {name_of(d): page_of(d.read_text()) for d in DOCUMENTS if d.name == "README.md" or "docs" in d.parts}
PLUGIN = [] if entry_points(group="pytest11", name="syncnorm") else ["-p", "syncnorm.testing.plugin"]
LIMIT = 240  # seconds: torch.compile and torchrun, on a busy machine
pytestmark = pytest.mark.timeout(LIMIT + 60)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_resolve(document):
    text = document.read_text()
    defined = set(re.findall(r"^\[([\w-]+)\]: https://", text, re.MULTILINE))
    for target, reference in LINK.findall(prose(text)):
        if reference:
            assert reference in defined, f"[{reference}] is defined nowhere"
        elif target.startswith("https://"):
            if (ours := in_repository(target)) is not None:
                check_exists(ROOT, ours)
        else:
            check_exists(document.parent if target[0] != "#" else document, target)
    assert all(f"][{reference}]" in text for reference in defined)


def check_exists(place: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    other = place / file if file else place
    assert other.exists(), target
    assert not anchor or anchor in anchors(other.read_text()), f"no heading {target}"


def params(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.slow] if "torch.compile(" in PAGES[n].code else []) for n in names]


@pytest.mark.parametrize("name", params(name for name, page in PAGES.items() if page.code))
def test_the_python_code_runs_on_two_ranks(name, tmp_path, monkeypatch):
    file = tmp_path / name.replace("/", "_").replace(".md", ".py")
    file.write_text(PAGES[name].code)
    monkeypatch.chdir(tmp_path)
    run_ranks(_run, 2, (str(file),), timeout=LIMIT)


def _run(file: str) -> None:
    runpy.run_path(file, run_name="__main__")


@pytest.mark.slow  # starts processes that import torch
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if page.files])
def test_the_files_run(name, tmp_path):
    files = PAGES[name].files
    for title, text in files.items():
        (tmp_path / title).write_text(text)
    if tests := [title for title in files if title.startswith("test_")]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PLUGIN, *tests]
        assert f"{len(tests)} passed" in run(*command, cwd=tmp_path, timeout=LIMIT)
    for script in files.keys() - tests:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        printed = run(sys.executable, *torchrun, script, cwd=tmp_path, timeout=LIMIT)
        assert printed.strip() in (ROOT / name).read_text()  # the page shows it as well


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_python_block_is_found(document):
    """A word after ``python`` that the tests do not know would leave a block out."""
    text = document.read_text()
    assert len(PYTHON.findall(text)) == len(re.findall(r"^ *```(?:python|py)\b", text, re.MULTILINE))
