"""The results of commands: frozen dataclasses that pickle and convert to JSON and back."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, is_dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from textwrap import shorten
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from syncnorm.tools.common.files import write_file

R = TypeVar("R", bound="Record")
T = TypeVar("T")


class Record:
    """Base class of the frozen dataclasses that hold the result of a command.

    Attributes:
        schema: ``"syncnorm."`` followed by the name of the command.
        schema_version: incremented whenever the name or the meaning of a field changes.
    """

    schema: ClassVar[str]
    schema_version: ClassVar[int]

    def to_dict(self) -> dict[str, Any]:
        """The record as dicts, lists, numbers and strings; the first keys are the name and version of the schema."""
        fields = asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass
        return {"schema": self.schema, "schema_version": self.schema_version, **fields}

    @classmethod
    def from_dict(cls: type[R], data: dict[str, Any]) -> R:
        """The inverse of `to_dict`, also for data that has been converted to JSON and back.

        Raises:
            ValueError: ``data`` has another schema or version, or fields that do not fit.
        """
        fields = dict(data)
        found = (fields.pop("schema", None), fields.pop("schema_version", None))
        if found != (cls.schema, cls.schema_version):
            raise ValueError(f"expected schema {cls.schema} version {cls.schema_version}, got {found[0]} {found[1]}")
        return _decode(cls, fields)


def write_json(record: Any, path: Path) -> None:
    """Writes ``record.to_dict()`` to ``path``, replacing an existing file."""
    write_file(path, (json.dumps(record.to_dict(), indent=2, allow_nan=False) + "\n").encode())


def read_json(cls: type[R], path: Path) -> R:
    """Reads the record of class ``cls`` that `write_json` wrote.

    Raises:
        ValueError: the file is not JSON, or has another schema or version.
    """
    return cls.from_dict(json.loads(path.read_bytes()))


def _decode(cls: type[T], fields: dict[str, Any]) -> T:
    """Builds a dataclass whose fields are numbers, strings, dicts, dataclasses, tuples of one type, or None."""
    hints = get_type_hints(cls)
    known = dataclass_fields(cls)  # type: ignore[arg-type]  # every caller has a dataclass
    required = {each.name for each in known if each.default is MISSING and each.default_factory is MISSING}
    for problem, names in (("lacks", required - fields.keys()), ("has unknown", fields.keys() - hints.keys())):
        if names:
            raise ValueError(f"{cls.__name__} {problem} {', '.join(sorted(names))}")
    values = {}
    for name, value in fields.items():
        try:
            values[name] = _value(hints[name], value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return cls(**values)


def _value(hint: Any, value: Any) -> Any:
    if isinstance(hint, UnionType) and type(None) in get_args(hint):  # X | None
        if value is None:
            return None
        hint = next(each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is tuple:
        _require(isinstance(value, list | tuple), "a list", value)
        return tuple(_value(get_args(hint)[0], each) for each in value)
    if is_dataclass(hint) and isinstance(hint, type):
        _require(isinstance(value, dict), "an object", value)
        return _decode(hint, value)
    if hint in (bool, int, float, str):
        _require(isinstance(value, int | float if hint is float else hint), hint.__name__, value)
    return value


def _require(holds: bool, expected: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"expected {expected}, got {shorten(repr(value), 60, placeholder='...')}")
