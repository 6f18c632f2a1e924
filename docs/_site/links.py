"""Links between the site and the rest of the repository.

Documents link to files by their paths in the repository, so that the links also work on GitHub and in a checkout. For
the site this hook includes the documents that stand outside of ``docs/``, with their pictures, and points every
other link that leads out of ``docs/`` at the repository on GitHub. A link to a missing file fails the strict build.
Drawings (SVG) become part of their page, so that they have its colors, light or dark.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

log = get_plugin_logger("links")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

# Pages of the site that are other documents of the repository, and folders of pictures that these show.
INCLUDED = {
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "recipes/containers.md": ROOT / "docker" / "README.md",
    "results/speed.md": ROOT / "examples" / "speed.md",
    "results/studies.md": ROOT / "examples" / "studies.md",
}
PICTURES = {
    "results": ROOT / "examples",
    "results/studies": ROOT / "examples" / "studies",
}

CODE = re.compile(r"^(```|~~~).*?^\1\s*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
DRAWING = re.compile(r"!\[[^\]]*\]\(([^)\s]+\.svg)\)")
LINK = re.compile(r"(\]\()([^)\s]+)(\))|(<img src=\")([^\"]+)(\")")


def on_files(files: Any, config: Any) -> Any:
    """Adds the included documents and their pictures to the files of the site."""
    for uri, file in _included().items():
        files.append(File.generated(config, uri, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes the links of a page work on the site."""
    place = INCLUDED.get(page.file.src_uri, DOCS / page.file.src_uri)
    uris = {file: uri for uri, file in _included().items()}

    def resolve(target: str) -> str:
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return target
        file = (place.parent / path).resolve()
        anchor = anchor and f"#{anchor}"
        if not file.exists():
            log.warning("%s links to %s, which does not exist", place.relative_to(ROOT), target)
            return target
        if file in uris or DOCS in file.parents:
            uri = uris.get(file) or file.relative_to(DOCS).as_posix()
            return os.path.relpath(uri, os.path.dirname(page.file.src_uri)) + anchor
        kind = "tree" if file.is_dir() else "blob"
        return f"{config.extra['repository']}/{kind}/main/{file.relative_to(ROOT).as_posix()}{anchor}"

    if not re.search(r"^## ", markdown, re.MULTILINE):
        page.meta.setdefault("hide", ["toc"])  # otherwise an empty column takes space from wide tables

    def change(text: str) -> str:
        text = DRAWING.sub(lambda match: _inline(place.parent / match[1]), text)
        return LINK.sub(lambda match: _replaced(match, resolve), text)

    return outside_code(markdown, change)


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """``markdown`` with ``change`` made to all of it but code."""
    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def _replaced(match: re.Match[str], resolve: Callable[[str], str]) -> str:
    before, target, after = (group for group in match.groups() if group is not None)
    return before + resolve(target) + after


def _inline(file: Path) -> str:
    lines = (line.strip() for line in file.read_text().splitlines())
    return f'<div class="drawing">{" ".join(filter(None, lines))}</div>'


def _included() -> dict[str, Path]:
    pictures = {
        f"{uri}/{file.name}": file for uri, folder in PICTURES.items() for file in sorted(folder.glob("*.png"))
    }
    return INCLUDED | pictures
