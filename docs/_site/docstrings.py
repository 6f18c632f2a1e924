"""Docstrings as the site shows them: sections of our own become paragraphs, roles of Sphinx become code."""

import re
from typing import Any

import griffe

OWN_SECTION = re.compile(r"^(Collective|Source|Shapes):(?=\s)", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
ROLE = re.compile(r":\w+:`~?\.?([^`]+)`")


class Docstrings(griffe.Extension):
    """Changes each docstring before it is parsed as a docstring of Google's style."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)


def shown(text: str) -> str:
    """A docstring in the form that griffe and Markdown understand."""
    text = OWN_SECTION.sub(r"**\1:**", text)
    return ROLE.sub(r"`\1`", EXAMPLE.sub("Examples:", text))
