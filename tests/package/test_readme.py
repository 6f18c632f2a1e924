"""README.md is short and stands alone on PyPI; at a release, the Chinese one is held against it."""

import re

import pytest
from documents import CODE, HEADING, LINK, ROOT, prose

ENGLISH, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")


def test_it_fits_on_one_screen_after_another():
    assert len(ENGLISH.read_text().splitlines()) <= 150


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda file: file.name)
def test_links_are_absolute(readme):
    """PyPI shows README.md without the repository; tests/package/test_documents.py checks that the files exist."""
    for target, reference in LINK.findall(prose(readme.read_text())):
        assert target.startswith("https://"), f"{readme.name}: {target or reference}"


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda file: file.name)
def test_it_names_the_commands_of_the_repository(readme):
    for script in ("launch/demo.sh", "launch/test.sh"):
        assert f"bash {script}" in readme.read_text()
        assert (ROOT / script).exists()


def sections(text: str) -> list[tuple[str, str]]:
    """(level of the heading, text below it), starting with the title."""
    hidden = CODE.sub(lambda block: block[0].replace("#", "\0"), text)
    starts = [*HEADING.finditer(hidden)]
    ends = [*(match.start() for match in starts[1:]), len(text)]
    return [(match[1], text[match.end() : end]) for match, end in zip(starts, ends, strict=True)]


def tables(text: str) -> list[int]:
    """The number of cells in each row of a table."""
    return [len(re.split(r"(?<!\\)\|", line)) for line in prose(text).splitlines() if line.startswith("|")]


def targets(text: str) -> list[str]:
    """The targets of links, except the other README."""
    return sorted(target for target, _ in LINK.findall(prose(text)) if "/README" not in target)


def figures(text: str) -> list[str]:
    return sorted(NUMBER.findall(re.sub(r"\]\([^)]*\)", "]", prose(text))))


def names(text: str) -> list[str]:
    return sorted(re.findall(r"`([^`]+)`", prose(text).replace("\n", " ")))


@pytest.mark.release
def test_the_chinese_readme_matches_the_english_one():
    english, chinese = sections(ENGLISH.read_text()), sections(CHINESE.read_text())
    assert [level for level, _ in chinese] == [level for level, _ in english]
    for (_, ours), (_, theirs) in zip(english, chinese, strict=True):
        assert CODE.findall(theirs) == CODE.findall(ours)
        for facts in (tables, targets, figures, names):
            assert facts(theirs) == facts(ours), ours[:60]
