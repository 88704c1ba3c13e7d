"""Frozen dataclasses as strict JSON and back: nothing unknown, nothing missing, nothing coerced."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from padconvert.policy.document import dotted

T = TypeVar("T")


def record_to_dict(value: object) -> dict[str, Any]:
    """`value` (a dataclass) as what JSON can hold; enums by value, decimals as text."""
    data: dict[str, Any] = TypeAdapter(type(value)).dump_python(value, mode="json")
    return data


def record_from_dict(kind: type[T], data: object) -> T:
    """The inverse of `record_to_dict`. Raises ValueError that names the key at fault."""
    try:
        value = TypeAdapter(kind).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{dotted(first['loc'])}: {first['msg']}") from None
    difference = _difference(record_to_dict(value), data, "")
    if difference:
        raise ValueError(f"{difference.removeprefix('.')}: unknown, missing or not in its plain form")
    return value


def _difference(ours: object, theirs: object, path: str) -> str | None:
    """Where `theirs` says something that did not get through: an unknown key, a default that was left out."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() ^ theirs.keys()):
            return f"{path}.{key}"
        pairs = [(f"{path}.{key}", ours[key], theirs[key]) for key in ours]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(ours, theirs, strict=True))]
    else:
        return None if ours == theirs else path
    return next((found for where, a, b in pairs if (found := _difference(a, b, where))), None)
