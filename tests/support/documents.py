"""The documents of the repository, and what tests read in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md"), *ROOT.glob("docs/*/*.md")])
REPOSITORY = "https://github.com/syncnorm/syncnorm"
SITE = "https://syncnorm.github.io/syncnorm/"

CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|\]\[([\w-]+)\]")
# Blocks with a title are files; see tests/package/test_documents.py.
PYTHON = re.compile(r'^```python(?: title="([\w.]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def name_of(document: Path) -> str:
    """The path of a document in the repository."""
    return document.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """A document without its code blocks."""
    return CODE.sub("", text)


def anchors(text: str) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, a hyphen for each space."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in HEADING.findall(prose(text))}


class Page(NamedTuple):
    """The Python code of a document."""

    code: str  # every block without a title, each line where it is in the document
    files: dict[str, str]  # title -> block


def page_of(text: str) -> Page:
    """The Python code of a document."""
    lines = [""] * len(text.splitlines())
    files = {}
    for block in PYTHON.finditer(text):
        if block[1]:
            files[block[1]] = block[2]
        else:
            first = text.count("\n", 0, block.start(2))
            code = block[2].splitlines()
            lines[first : first + len(code)] = code
    return Page("\n".join(lines).rstrip(), files)


def in_repository(url: str) -> str | None:
    """The path and anchor of a file of this repository to which ``url`` leads; None if it leads elsewhere."""
    if match := re.fullmatch(rf"{REPOSITORY}/(?:blob|tree)/main/(.+)", url):
        return match[1]
    if match := re.fullmatch(r"https://raw\.githubusercontent\.com/syncnorm/syncnorm/main/(.+)", url):
        return match[1]
    if match := re.fullmatch(rf"{SITE}([^#]*)(#.+)?", url):
        page = f"docs/{match[1].rstrip('/')}".rstrip("/")
        file = f"{page}.md" if (ROOT / f"{page}.md").exists() else f"{page}/index.md"
        return file + (match[2] or "")
    return None
