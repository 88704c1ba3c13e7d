"""A result as it may be shown: names out of files cannot move a terminal's cursor, start a line or turn the text."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from padconvert.errors import printable

T = TypeVar("T")


def plain(value: T) -> T:
    """`value`, all text in it escaped by `errors.printable`; the order and kind of everything else stay."""
    found: Any = value
    match found:
        case str():
            escaped = printable(found)
            found = found if escaped == found else escaped  # an Enum's member stays one
        case list() | tuple():
            found = type(found)(plain(each) for each in found)
        case dict():
            found = {plain(key): plain(each) for key, each in found.items()}
        case _ if is_dataclass(found) and not isinstance(found, type):
            found = replace(
                found, **{each.name: plain(getattr(found, each.name)) for each in fields(found) if each.init}
            )
    return found  # type: ignore[no-any-return]
