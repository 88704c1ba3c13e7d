"""What pydantic finds wrong with a policy, in words a person can act on: which key, what it may be, did you mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from padconvert.policy.document import Origin, Path_, Problem, dotted, shortened
from padconvert.policy.model import Policy, role_names, router_names, score_names, task_names

_YAML_BOOL = re.compile(r"(?i)(yes|no|on|off|y|n)")
_EXPONENT = re.compile(r"([-+]?[0-9]+)(\.[0-9]*)?[eE]([-+]?[0-9]+)")


def check(values: object, origins: Mapping[Path_, Origin]) -> tuple[Policy | None, list[Problem]]:
    """The policy, or everything that is wrong with `values`, each with where it was said."""
    try:
        return Policy.model_validate(_tuples(values)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    return None, [_problem(detail, origins) for detail in details]


def did_you_mean(word: str, words: list[str]) -> str:
    """` Did you mean 'x'?`, or nothing where no word is near."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def _tuples(value: object, path: Path_ = ()) -> object:
    """Strict models take tuples; YAML has lists, and one data file alone needs no brackets."""
    if isinstance(value, dict):
        return {key: _tuples(child, (*path, key)) for key, child in value.items()}
    if path in (("data", "train"), ("data", "eval")) and isinstance(value, str):
        return (value,)
    return tuple(_tuples(child, (*path, 0)) for child in value) if isinstance(value, list) else value


def _problem(detail: ErrorDetails, origins: Mapping[Path_, Origin]) -> Problem:
    path = detail["loc"]
    origin = origin_of(path, origins)
    return Problem(origin, path, _words(detail, path, origin.text if path in origins else ""))


def origin_of(path: Path_, origins: Mapping[Path_, Origin]) -> Origin:
    """Where the value at `path` was said; for a whole section, where its latest part was; else its parent's."""
    while True:
        under = [origin for key, origin in origins.items() if key[: len(path)] == path]
        if under:
            return max(under, key=lambda origin: (origin.rank, -origin.line))
        if not path:
            return Origin("policy")
        path = path[:-1]


def _words(detail: ErrorDetails, path: Path_, text: str) -> str:
    value, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return "unknown key." + (_near_key(path) or _known_keys(path))
        case "missing":
            return "the key is missing"
        case "model_type" | "model_attributes_type":
            return (
                "has no keys; delete it or fill it"
                if value is None
                else f"must be a mapping of keys, not {_shown(value)}"
            )
        case "tuple_type":
            return f"must be a list, such as [{shortened(str(value))}]"
        case "literal_error":
            return f"must be {context['expected']}, not {_shown(value)}." + _hint(value, text, _choices(context))
        case "value_error":
            return str(context["error"]) + _near_name(path, value)
        case "is_instance_of" if path[-1] == "dynamic_ratio":
            return f"must be a number from 0 to 1, not {_shown(value)}." + _numeric_hint(value, text, whole=False)
        case "int_type" | "int_from_float" | "float_type":
            whole = detail["type"] != "float_type"
            message = "must be a valid integer" if whole else "must be a valid number"
            return f"{message}, not {_shown(value)}." + _numeric_hint(value, text, whole=whole)
        case "string_type" if isinstance(value, (int, float)) and not isinstance(value, bool):
            return f"must be text; quote it: '{shortened(text or str(value))}'"
        case _:
            message = detail["msg"].replace("Input should be ", "must be ")
            return f"{message}, not {_shown(value)}." + _hint(value, text, [])


def _shown(value: object) -> str:
    return "nothing" if value is None else shortened(repr(value) if isinstance(value, str) else str(value))


def _choices(context: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']+)'", str(context["expected"]))


def _hint(value: object, text: str, choices: list[str]) -> str:
    """What YAML 1.1 did to the value, or the nearest allowed word."""
    if isinstance(value, bool) and _YAML_BOOL.fullmatch(text):
        meant = " write none." if "none" in choices and not value else f" quote it: '{text}'." if not choices else ""
        return f" YAML reads {text} as {str(value).lower()}{';' if meant else '.'}{meant}"
    return did_you_mean(value, choices) if isinstance(value, str) else ""


def _numeric_hint(value: object, text: str, *, whole: bool) -> str:
    """How the number that was meant is written, as far as that can be told."""
    if isinstance(value, bool):
        return f" YAML reads {text} as {str(value).lower()}." if _YAML_BOOL.fullmatch(text) else ""
    if whole and (number := _whole(value)) is not None:
        return f" Write {number}."
    if isinstance(value, str) and (found := _EXPONENT.fullmatch(value)) and not whole:
        mantissa, fraction, exponent = found.groups()
        sign = exponent if exponent[0] in "+-" else f"+{exponent}"
        written = f"{mantissa}{fraction if fraction and len(fraction) > 1 else '.0'}e{sign}"
        return f" YAML reads {shortened(value)} as text; write {shortened(written)}."
    if isinstance(value, str) and re.fullmatch(r"[-+0-9.]+", value):
        return " It is quoted text; write the number without quotes."
    return ""


def _whole(value: object) -> int | None:
    """The integer that was written with an exponent or a point, if it is one of a size that makes sense."""
    if isinstance(value, str) and not _EXPONENT.fullmatch(value):
        return None
    number = float(value) if isinstance(value, (str, float)) else float("nan")
    return int(number) if abs(number) <= 2**53 and number.is_integer() else None


def _near_name(path: Path_, value: object) -> str:
    lists = {"score": score_names, "router": router_names, "role": role_names, "task": task_names}
    names = lists.get(str(path[-1]) if path else "")
    return did_you_mean(value, list(names())) if names and isinstance(value, str) else ""


def _near_key(path: Path_) -> str:
    """The key meant: spelt nearly so in this section, or the same word in another one."""
    key = str(path[-1])
    section = _model_at(path[:-1])
    here = difflib.get_close_matches(key, list(section.model_fields), n=1, cutoff=0.6) if section else []
    if here:
        return f" Did you mean {here[0]!r}?"
    everywhere = list(_leaves(Policy, ()))
    same = [name for name in everywhere if key in (name, name.rpartition(".")[2])]
    return f" Did you mean {same[0]!r}?" if same else did_you_mean(key, everywhere)


def _known_keys(path: Path_) -> str:
    section = _model_at(path[:-1])
    return f" There are {', '.join(section.model_fields)}." if section else ""


def _model_at(path: Path_) -> type[BaseModel] | None:
    model: type[BaseModel] = Policy
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = _section_of(field.annotation) if field else None
        if inner is None:
            return None
        model = inner
    return model


def _section_of(annotation: object) -> type[BaseModel] | None:
    """`Choice` of `Choice`, `Rule` of `tuple[Rule, ...]`, None of anything else."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _leaves(model: type[BaseModel], path: Path_) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield dotted((*path, name))
        elif get_args(field.annotation) == ():
            yield from _leaves(inner, (*path, name))
