"""Links in the documents resolve, and the Chinese README has the structure, figures and names of the English one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")])
ENGLISH, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))

CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|\]\[([\w-]+)\]")
NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")


def prose(text: str) -> str:
    return CODE.sub("", text)


def anchors(text: str) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, a hyphen for each space."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in HEADING.findall(prose(text))}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_resolve(document):
    text = document.read_text()
    defined = set(re.findall(r"^\[([\w-]+)\]: https://", text, re.MULTILINE))
    for target, reference in LINK.findall(prose(text)):
        if reference:
            assert reference in defined, f"{document.name}: [{reference}] is defined nowhere"
        elif not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            other = document.parent / file if file else document
            assert other.exists(), f"{document.name}: no {target}"
            assert not anchor or anchor in anchors(other.read_text()), f"{document.name}: no heading {target}"
    assert all(f"][{reference}]" in text for reference in defined)


def sections(document: Path) -> list[tuple[str, str]]:
    """(level of the heading, text below it), starting with the title."""
    text = document.read_text()
    hidden = CODE.sub(lambda block: block[0].replace("#", "\0"), text)
    starts = [*HEADING.finditer(hidden)]
    ends = [*(match.start() for match in starts[1:]), len(text)]
    return [(match[1], text[match.end() : end]) for match, end in zip(starts, ends, strict=True)]


def tables(text: str) -> list[int]:
    """The number of cells in each row of a table."""
    return [len(re.split(r"(?<!\\)\|", line)) for line in prose(text).splitlines() if line.startswith("|")]


def targets(text: str) -> list[str]:
    """The targets of links, except the other README and headings, which differ between the languages."""
    found = [reference or target for target, reference in LINK.findall(prose(text))]
    return sorted(t for t in found if not t.startswith(("#", "README")))


def figures(text: str) -> list[str]:
    return sorted(NUMBER.findall(re.sub(r"\]\([^)]*\)", "]", prose(text))))


def names(text: str) -> list[str]:
    return sorted(re.findall(r"`([^`]+)`", prose(text).replace("\n", " ")))


def test_the_chinese_readme_matches_the_english_one():
    english, chinese = sections(ENGLISH), sections(CHINESE)
    assert [level for level, _ in chinese] == [level for level, _ in english]
    for (_, ours), (_, theirs) in zip(english, chinese, strict=True):
        assert CODE.findall(theirs) == CODE.findall(ours)
        for facts in (tables, targets, figures, names):
            assert facts(theirs) == facts(ours), ours[:60]
