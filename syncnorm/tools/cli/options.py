"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from syncnorm.tools.common.ranks import DEFAULT_RANKS

FUNCTION = "MODULE:FUNCTION"
RANKS_HELP = f"Number of ranks to start, {DEFAULT_RANKS} by default; not under a launcher."


def file_option(name: str, help: str, metavar: str = "FILE") -> Callable[[Any], Any]:
    """``--name FILE``: the command gets ``name_file``, a path, or None."""
    path = click.Path(dir_okay=False, path_type=Path)
    return click.option(f"--{name}", f"{name}_file", type=path, metavar=metavar, help=help)


json_option = file_option("json", "Also write the result to FILE.")
ranks_option = click.option("--ranks", type=int, metavar="N", help=RANKS_HELP)
