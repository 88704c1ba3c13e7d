"""A result as its one JSON document. Field names are key names; the order of keys is the order of fields."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

from padconvert.results import Result


def document(result: Result) -> dict[str, object]:
    """`result` as plain JSON values, `schema` first. Numbers that JSON cannot hold (NaN, infinity) become null."""
    values = asdict(result)
    plain = _plain({"schema": values.pop("schema"), **values})
    assert isinstance(plain, dict)
    return plain


def text(result: Result) -> str:
    """The document as text, ending in a line break."""
    return json.dumps(document(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case str():
            return str(value)  # an Enum's value, no longer the Enum
        case _:
            return value
