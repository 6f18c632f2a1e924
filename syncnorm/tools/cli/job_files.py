"""Job files: the options of a command in a TOML file, so that a comparison can be repeated and shared."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from syncnorm.tools.common.loading import search_current_directory, similar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class JobFile(click.Path):
    """The type of an argument that names a job file. Its values are defaults: options of the command line come first.

    Every option is a key, without the dashes in front, with dashes or underscores inside. A list is joined by commas.
    Modules in the folder of the file can be imported.
    """

    name = "job file"

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path of the file, whose values become defaults of the command."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        assert ctx is not None
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors add a byte order mark
        except FileNotFoundError:
            self.fail(f"no job file {path}: expected a TOML file with the options of this command", param, ctx)
        except OSError as error:
            self.fail(f"cannot read {path}: {error.strerror}", param, ctx)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self.fail(f"{path} is not a TOML file: {error}", param, ctx)
        names = _options(ctx.command)
        for key, given in values.items():
            option = names.get(key.replace("_", "-"))
            if option is None:
                known = similar(key.replace("_", "-"), list(names)) or f": the options are {', '.join(names)}"
                self.fail(f"{path}: no option is called {key!r}{known}", param, ctx)
            ctx.default_map = {**(ctx.default_map or {}), option: self._text(given, f"{path}: {key}", param, ctx)}
        search_current_directory()
        sys.path.insert(0, str(path.resolve().parent))
        return path

    def _text(self, value: Any, where: str, param: click.Parameter | None, ctx: click.Context) -> str:
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, bool) or not isinstance(part, str | int | float) for part in parts):
            self.fail(f"{where}: expected a text, a number, or a list of them, got {value!r}", param, ctx)
        return ",".join(map(str, parts))


def _options(command: click.Command) -> dict[str, str]:
    """The name of each option as in a job file, and the name of its parameter."""
    return {
        option.opts[-1].lstrip("-"): option.name
        for option in command.params
        if isinstance(option, click.Option) and option.name
    }
