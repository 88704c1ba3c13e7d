"""A policy as YAML to read: every value with where it was said, a starter file, and the JSON schema."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from padconvert.errors import FileError, UsageError
from padconvert.policy.model import Policy, Rule
from padconvert.policy.resolve import Resolved, preset_text

_STARTER = """\
# A padconvert policy. It says only what differs from the preset it extends; all keys are listed below.
#   padconvert policy check FILE     is it right?
#   padconvert policy show FILE      every value, and where it was said
version: 1
extends: {preset}

# How the preset {base!r}, which the others extend, sets every key. Uncomment what you change, and its section.
{settings}"""


def starter(preset: str) -> str:
    """A commented policy file that changes nothing yet. Raises UsageError for an unknown preset."""
    preset_text(preset)
    base = "paper"
    lines = preset_text(base).splitlines()
    settings = lines[lines.index("version: 1") + 1 :]
    commented = [f"# {line}" if line.strip() else "" for line in settings]
    return _STARTER.format(preset=preset, base=base, settings="\n".join(commented).strip("\n") + "\n")


def write_starter(path: Path, text: str, *, force: bool) -> None:
    """Write `text` to `path`. Raises UsageError if it exists and `force` is off, FileError on other trouble."""
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} exists; name another file, or replace it with --force") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from None


def render(resolved: Resolved) -> str:
    """The whole policy as YAML that reads back as the same policy; each value's origin stands in a comment."""
    return "\n".join(_lines(resolved.policy, (), resolved.origins)) + "\n"


def _lines(section: BaseModel, path: tuple[str, ...], origins: Mapping[str, str]) -> list[str]:
    lines = []
    for key in type(section).model_fields:
        value, here = getattr(section, key), (*path, key)
        indent = "  " * len(path)
        if isinstance(value, BaseModel):
            lines += ["", f"{indent}{key}:", *_lines(value, here, origins)]
        elif key == "rules" and value:
            lines += ["", f"{key}:", *(_rule_line(rule, index, origins) for index, rule in enumerate(value))]
        else:
            lines.append(f"{indent}{key}: {_flow(value)}{_comment('.'.join(here), origins)}")
    return lines


def _rule_line(rule: Rule, index: int, origins: Mapping[str, str]) -> str:
    return f"  - {_flow(rule.model_dump(exclude_defaults=True))}{_comment(f'rules[{index}]', origins)}"


def _comment(key: str, origins: Mapping[str, str]) -> str:
    """Where `key` was said, and where parts of it were said if elsewhere."""
    said = [origins[key]] if key in origins else []
    said += [where for name, where in origins.items() if name.startswith((f"{key}.", f"{key}["))]
    one_line = " ".join(", ".join(dict.fromkeys(said)).split())
    return f"  # {one_line}" if said else ""


def _flow(value: object) -> str:
    text: str = yaml.safe_dump(
        _plain(value), default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: object) -> object:
    """What YAML can say; a decimal as a number where the number reads back as the same decimal."""
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, tuple):
        return [_plain(child) for child in value]
    if isinstance(value, Decimal):
        return float(value) if Decimal(repr(float(value))) == value else str(value)
    return value


def settings_of(policy: Policy) -> dict[str, object]:
    """Every setting that decides something, as JSON says it, by its dotted key; the rules are one setting."""
    settings: dict[str, object] = {}
    for name, value in policy.model_dump(mode="json", exclude={"version", "extends"}).items():
        settings |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return settings


def schema() -> dict[str, Any]:
    """The JSON schema of a policy file: as the whole policy, but only `version` has to be there."""
    document = Policy.model_json_schema()
    for part in document["$defs"].values():
        part.pop("required", None)
    document["required"] = ["version"]
    for key in ("train", "eval"):
        several = document["$defs"]["Data"]["properties"][key]
        one = {"type": "string", "minLength": 1}
        document["$defs"]["Data"]["properties"][key] = {"title": several.pop("title", key), "anyOf": [several, one]}
    return document
