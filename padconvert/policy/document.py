"""A YAML file as plain values that remember their lines; what YAML 1.1 makes risky is refused here.

Plain means dict, list, str, int, float, bool and None. Duplicate keys, tags, merge keys, aliases that multiply, and
numbers that YAML 1.1 reads in another base are problems, never values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from padconvert.errors import PolicyError

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000  # after aliases are followed
MAX_DEPTH = 16
MAX_SHOWN = 60  # characters of a value that a message repeats

Path_ = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("str", "int", "float", "bool", "null")}
_PLAIN_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?\.[0-9]+([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was said. Among several, the highest `rank` counts; `text` is the scalar as it was written."""

    where: str  # "preset paper", "FILE:LINE", "option --x"
    rank: int = 0
    line: int = 0
    text: str = ""

    @property
    def file(self) -> str:
        return self.where.removesuffix(f":{self.line}")

    @property
    def is_option(self) -> bool:
        return self.where.startswith("option ")


@dataclass(frozen=True, slots=True)
class Problem:
    origin: Origin
    path: Path_
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin.where, dotted(self.path), self.text) if part)


@dataclass(slots=True)
class Document:
    """Values, where each was said (containers too), and what is wrong with them."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[Path_, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def dotted(path: Path_) -> str:
    """`("rules", 0, "name")` as `rules[0].name`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def shortened(text: str) -> str:
    """`text` as a message may show it: its first characters, and how many there are."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text):,} characters)"


def read_text(path: Path) -> str:
    """The text of a policy file. Raises PolicyError if it cannot be read, is too large or is not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PolicyError(f"{path}: the policy file cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise PolicyError(f"{path}: the file is larger than {MAX_BYTES // 1024} KiB; that is no policy")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: the file is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def parse(text: str, label: str, rank: int = 0, where: str | None = None) -> Document:
    """Read a mapping. `where` replaces "LABEL:LINE" as the origin of its values (for presets).

    Raises PolicyError where the text is no YAML mapping; smaller faults are collected in `.problems`.
    """
    node = _compose(text, label)
    if node is None:
        raise PolicyError(f"{label}: the policy is empty; it needs at least 'version: 1'")
    if not isinstance(node, yaml.MappingNode):
        raise PolicyError(f"{label}:{node.start_mark.line + 1}: a policy is a mapping of keys, such as 'version: 1'")
    reader = _Reader(label, rank, where)
    value = reader.value(node, ())
    assert isinstance(value, dict)
    reader.document.values = value
    return reader.document


def parse_value(text: str, origin: Origin, path: Path_) -> tuple[object, list[Problem]]:
    """The value of one `--set key=value`, read as YAML."""
    node = _compose(text, origin.where)
    if node is None:
        return None, []
    reader = _Reader(origin.where, origin.rank, origin.where)
    return reader.value(node, path), reader.document.problems


def _compose(text: str, label: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PolicyError(f"{label}{line}: this is not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise PolicyError(f"{label}: this is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise PolicyError(f"{label}: the file is nested too deeply; a policy has {MAX_DEPTH} levels at most") from None
    return node


class _Reader:
    """One pass over a node tree; it counts what it visits, so that aliases cannot multiply."""

    def __init__(self, label: str, rank: int, where: str | None) -> None:
        self.label, self.rank, self.where = label, rank, where
        self.document = Document()
        self.visited = 0
        self.constructor = yaml.SafeLoader("")

    def value(self, node: yaml.Node, path: Path_) -> object:
        self.visited += 1
        if self.visited > MAX_NODES or len(path) > MAX_DEPTH:
            where = f"{self.label}:{node.start_mark.line + 1}"
            raise PolicyError(f"{where}: aliases or nesting grow past {MAX_NODES} values or {MAX_DEPTH} levels")
        self.document.origins[path] = self._origin(node)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return {key: self.value(child, (*path, key)) for key, child in self._pairs(node, path)}
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(child, (*path, index)) for index, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node, path)
        self._problem(node, path, f"the YAML type {node.tag.removeprefix(_TAG)!r} has no place in a policy; quote it")
        return None

    def _pairs(self, node: yaml.MappingNode, path: Path_) -> Iterator[tuple[str, yaml.Node]]:
        first: dict[str, int] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, path, "a key must be a plain word")
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key_node.tag == _TAG + "merge":
                self._problem(key_node, path, "merge keys ('<<') are not read; use 'extends', or write the keys out")
            elif key in first:
                self._problem(key_node, (*path, key), f"the key is there twice (first in line {first[key]})")
            else:
                first[key] = line
                yield key, child

    def _scalar(self, node: yaml.ScalarNode, path: Path_) -> object:
        text = node.value
        is_number = node.tag in (_TAG + "int", _TAG + "float")
        if is_number and not _PLAIN_NUMBER.fullmatch(text) and not _NOT_FINITE.fullmatch(text):
            self._problem(
                node,
                path,
                f"YAML 1.1 reads {shortened(text)!r} in its own way; write a plain decimal number or quote it",
            )
            return None
        try:
            value: object = self.constructor.construct_object(node)
        except (ValueError, KeyError, yaml.YAMLError):
            if node.style is None and is_number:
                self._problem(node, path, f"{shortened(text)} is too long for a number; write fewer digits")
            else:
                self._problem(node, path, f"{shortened(text)!r} is not what its tag says")
            return None
        return value

    def _origin(self, node: yaml.Node) -> Origin:
        line = node.start_mark.line + 1
        text = node.value if isinstance(node, yaml.ScalarNode) and node.style is None else ""
        return Origin(self.where or f"{self.label}:{line}", self.rank, line, text)

    def _problem(self, node: yaml.Node, path: Path_, text: str) -> None:
        line = node.start_mark.line + 1
        self.document.problems.append(
            Problem(Origin(self.where or f"{self.label}:{line}", self.rank, line), path, text)
        )
