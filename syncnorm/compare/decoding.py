"""Frozen records back from the plain dicts and lists that ``dataclasses.asdict`` and JSON make of them."""

from __future__ import annotations

from dataclasses import is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def decode(cls: type[T], data: dict[str, Any]) -> T:
    """The record of class ``cls``, whose fields are numbers, strings, records, tuples of one type, or None.

    Raises:
        TypeError: a field too many or too few.
    """
    hints = get_type_hints(cls)
    return cls(**{name: _value(hints.get(name), value) for name, value in data.items()})


def _value(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, UnionType):  # X | None
        hint = next(each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is tuple:
        return tuple(_value(get_args(hint)[0], each) for each in value)
    return decode(hint, value) if is_dataclass(hint) and isinstance(hint, type) else value
