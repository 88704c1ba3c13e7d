"""From files and options to one whole policy, all errors at once.

Later wins: preset, `padconvert.yaml` in the working directory, `--policy` file, options.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from padconvert.errors import PadconvertError, PolicyError, UsageError, printable
from padconvert.policy.check import check, did_you_mean, origin_of
from padconvert.policy.document import (
    Document,
    Origin,
    Path_,
    Problem,
    dotted,
    parse,
    parse_value,
    read_text,
    shortened,
)
from padconvert.policy.layering import child, forget, merge, no_place, plain, split
from padconvert.policy.model import PACKAGE, Choice, Policy

DEFAULT_PRESET = "paper"
WORKING_FILE = "padconvert.yaml"
_OPTION_RANK = 1_000
_DATA_PLACES = {"train", "eval"}
_CODE_KEYS = {"arch", "arch_args", "arch_arg", "trust"}
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_DEFAULTS: Path_ = ("defaults",)
_FFN: Path_ = ("ffn",)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True, slots=True)
class Option:
    """An override that says which option it came from, as in `Option(0.3, "--dynamic-ratio")`."""

    value: object
    flag: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """`origins` maps every dotted key to "preset paper", "FILE:LINE" or "option --x"; `notes` are for the report."""

    policy: Policy
    origins: dict[str, str]
    notes: tuple[str, ...]


def said_at(origins: Mapping[str, str], key: str) -> str | None:
    """Where the value of a dotted key was said: with the key itself, or with the list or section it came in."""
    while key not in origins:
        if not (shorter := re.sub(r"(\.[^.\[\]]+|\[\d+\])$", "", key)) or shorter == key:
            return None
        key = shorter
    return origins[key]


def preset_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (PACKAGE / "presets").glob("*.yaml")))


def preset_text(name: str) -> str:
    """The file of a preset. Raises UsageError for a name that is none."""
    if name not in preset_names():
        near = did_you_mean(name, list(preset_names()))
        raise UsageError(f"--preset {name}: there is no such preset; there are {', '.join(preset_names())}.{near}")
    return read_text(PACKAGE / "presets" / f"{name}.yaml")


def names_function(value: str) -> bool:
    """True for `pkg.mod:function`, which runs code, rather than a path."""
    return _FUNCTION.fullmatch(value) is not None


def set_overrides(settings: Iterable[str]) -> dict[str, object]:
    """`["train.steps=200"]` as overrides for `load_policy`; values stay YAML text until there.

    Raises UsageError for a setting without `=`.
    """
    overrides: dict[str, object] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {shortened(setting)}: write it as KEY=VALUE, for example --set train.steps=200")
        overrides[key.strip()] = Option(_YamlText(text), f"--set {shortened(setting)}")
    return overrides


_Chain = tuple[list[Document], str | None]


class _YamlText(str):
    """Text that is still to be read as YAML."""


def load_policy(
    file: Path | None = None,
    preset: str | None = None,
    overrides: Mapping[str, object] | None = None,
    working_file: Path | None = None,
) -> Resolved:
    """The whole policy and where each value of it was said.

    `overrides` maps dotted keys to values; wrap a value in `Option` to name the option it came from. `working_file`
    is a `padconvert.yaml` found in the working directory: it may name data and training, never code.
    Raises PolicyError with every problem found, or UsageError where only options are to blame.
    """
    problems: list[Problem] = []
    own: _Chain = _chain(file, problems, trusted=True) if file else ([], None)
    working: _Chain = _chain(working_file, problems, trusted=False) if working_file else ([], None)
    if preset is not None and own[1] is not None and own[1] != preset:
        raise UsageError(f"--preset {preset}: {file} already extends {own[1]!r}; drop one of the two")
    base = own[1] or preset or working[1] or DEFAULT_PRESET
    stack = _Stack(base, _said_by(base, own, preset, working))
    presets = _preset_chain(base)
    for rank, document in enumerate([*presets, *working[0], *own[0]]):
        stack.add(document if rank < len(presets) else _reaching_ffn(document), rank)
    stack.apply(overrides or {})
    problems += stack.problems
    problems += stack.optimizer_without_rate()
    if problems or stack.policy is None:
        raise _error(problems)
    return Resolved(stack.policy, stack.where(), tuple(stack.notes(working_file)))


def _said_by(base: str, own: _Chain, preset: str | None, working: _Chain) -> Origin:
    """Who named the preset at the bottom."""
    chain = own if own[1] else working
    if chain[1] and (own[1] or not preset):
        return chain[0][0].origins[("extends",)]
    return Origin(f"option --preset {base}" if preset else "default")


def _error(problems: list[Problem]) -> PadconvertError:
    # Each value is reported once: not again with the next file, nor as missing where it could not be read.
    first = {(problem.origin.where, problem.path): problem for problem in reversed(problems)}
    unique = list(dict.fromkeys(str(problem) for problem in _in_order(problems) if problem in first.values()))
    kind = UsageError if all(problem.origin.is_option for problem in problems) else PolicyError
    if len(unique) == 1:
        return kind(printable(unique[0]))
    return kind("\n  ".join([f"{len(unique)} problems in the policy:", *map(printable, unique)]))


def _in_order(problems: list[Problem]) -> list[Problem]:
    """As they are read: file by file and line by line, the options last."""
    files = list(dict.fromkeys(problem.origin.file for problem in problems))
    return sorted(
        problems, key=lambda found: (found.origin.is_option, files.index(found.origin.file), found.origin.line)
    )


def _preset_chain(name: str) -> list[Document]:
    """The documents of a preset, the one it extends first."""
    document = parse(preset_text(name), f"presets/{name}.yaml", where=f"preset {name}")
    parent = document.values.pop("extends", None)
    return [*(_preset_chain(parent) if isinstance(parent, str) else []), document]


def _chain(path: Path, problems: list[Problem], *, trusted: bool) -> _Chain:
    """The documents of a file and of all it extends, first things first, and the preset at the bottom."""
    documents: list[Document] = []
    seen: list[Path] = []
    while True:
        seen.append(path.resolve())
        document = parse(read_text(path), str(path))
        documents.insert(0, document)
        problems += document.problems
        problems += _version_problems(document, path)
        if not trusted:
            problems += _code_problems(document)
        _place(document, path.parent)
        extends = document.values.pop("extends", None)
        if extends is None or extends in preset_names():
            return documents, extends if isinstance(extends, str) else None
        target = path.parent / str(extends)
        if not isinstance(extends, str) or not _is_file(target) or target.resolve() in seen:
            problems.append(Problem(document.origins[("extends",)], ("extends",), _extends_text(extends, target, seen)))
            return documents, None
        path = target


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system takes
        return False


def _extends_text(extends: object, target: Path, seen: list[Path]) -> str:
    if isinstance(extends, str) and _is_file(target) and target.resolve() in seen:
        return f"{extends!r} extends this file in turn; a policy cannot extend itself"
    names = list(preset_names())
    near = did_you_mean(extends, names) if isinstance(extends, str) else ""
    return f"{shortened(repr(extends))} is neither a preset ({', '.join(names)}) nor a file beside this one.{near}"


def _version_problems(document: Document, path: Path) -> list[Problem]:
    version = document.values.get("version")
    if type(version) is int and version == 1:
        return []
    origin = document.origins.get(("version",), replace(document.origins[()], where=f"{path}:1"))
    text = "the key is missing; write 'version: 1'" if "version" not in document.values else "must be 1"
    document.values["version"] = 1
    return [Problem(origin, ("version",), text)]


def _place(document: Document, folder: Path) -> None:
    """Data paths are relative to the file that names them; here they become relative to the working directory."""

    def placed(item: object) -> object:
        return str(folder / item) if isinstance(item, str) and item and not names_function(item) else item

    data = document.values.get("data")
    if isinstance(data, dict):
        for key in _DATA_PLACES & data.keys():
            value = data[key]
            data[key] = [placed(item) for item in value] if isinstance(value, list) else placed(value)


def _code_problems(document: Document) -> list[Problem]:
    """A `padconvert.yaml` that happens to lie in the working directory must not run code."""
    found: list[tuple[Path_, str]] = []
    for key in sorted(_CODE_KEYS & document.values.keys()):
        del document.values[key]
        found.append(((key,), f"{WORKING_FILE} may not name it; give it on the command line"))
    given = document.values.get("data")
    data = given if isinstance(given, dict) else {}
    for key in sorted(_DATA_PLACES & data.keys()):
        for path, item in _strings(data[key], ("data", key)):
            # Any colon, not only a well-formed reference: what a later reader takes for code is not ours to guess.
            if ":" in item and not _DRIVE.match(item):
                text = f"{item!r} looks like a function, and {WORKING_FILE} may not run code; use --data or --policy"
                found.append((path, text))
    return [Problem(document.origins[path], path, text) for path, text in found]


def _reaching_ffn(document: Document) -> Document:
    """What a user's file says of `defaults` it says of `ffn` too, where it says nothing of its own there."""
    defaults, ffn = document.values.get("defaults"), document.values.get("ffn", {})
    if isinstance(defaults, dict) and isinstance(ffn, dict):
        for key in [key for key in defaults if key in Choice.model_fields and key not in ffn]:
            ffn[key] = plain(defaults[key])
            document.origins[("ffn", key)] = document.origins[("defaults", key)]
        if ffn:
            document.values["ffn"] = ffn
    return document


def _strings(value: object, path: Path_) -> list[tuple[Path_, str]]:
    if isinstance(value, list):
        return [((*path, index), item) for index, item in enumerate(value) if isinstance(item, str)]
    return [(path, value)] if isinstance(value, str) else []


class _Stack:
    """The values so far, and where each was said. Each file is checked when it is laid on top."""

    def __init__(self, base: str, origin: Origin) -> None:
        self.values: dict[str, object] = {"version": 1, "extends": base}
        self.origins: dict[Path_, Origin] = {("extends",): origin}
        self.problems: list[Problem] = []
        self.policy: Policy | None = None
        self.optimizers: dict[int, object] = {}

    def add(self, document: Document, rank: int) -> None:
        merge(self.values, document.values, (), self.origins, document.origins, rank)
        self._check(rank)

    def _check(self, rank: int) -> None:
        self.policy, found = check(self.values, self.origins)
        # what 'defaults' said of 'ffn' too is wrong once
        said = {(problem.origin, problem.path[1:], problem.text) for problem in found if problem.path[:1] == _DEFAULTS}
        self.problems += [
            problem
            for problem in found
            if problem.path[:1] != _FFN or (problem.origin, problem.path[1:], problem.text) not in said
        ]
        train = self.values.get("train")
        self.optimizers[rank] = train.get("optimizer") if isinstance(train, dict) else None

    def apply(self, overrides: Mapping[str, object]) -> None:
        for key, given in overrides.items():
            option = given if isinstance(given, Option) else Option(given, shortened(f"--set {key}={given}"))
            origin = Origin(f"option {option.flag}", _OPTION_RANK)
            path = split(key)
            value = option.value
            found: list[Problem] = []
            if isinstance(value, _YamlText):
                try:
                    value, found = parse_value(value, origin, path)
                    origin = replace(origin, text=str(option.value))
                except PolicyError as error:
                    found = [Problem(origin, path, str(error).removeprefix(f"{origin.where}: "))]
            self.problems += found or self._set(path, value, origin)
        self._reach_ffn({split(key) for key in overrides})
        self._check(_OPTION_RANK)

    def _reach_ffn(self, said: set[Path_]) -> None:
        """What the options say of `defaults` they say of `ffn` too, where they say nothing of their own there."""
        defaults, ffn = self.values.get("defaults"), self.values.get("ffn")
        if not isinstance(defaults, dict) or not isinstance(ffn, dict) or _FFN in said:
            return
        for key in Choice.model_fields:
            origin = self.origins.get(("defaults", key), self.origins.get(_DEFAULTS))
            if key in defaults and origin and origin.rank == _OPTION_RANK and (*_FFN, key) not in said:
                ffn[key] = plain(defaults[key])
                self.origins[(*_FFN, key)] = origin

    def _set(self, path: Path_, value: object, origin: Origin) -> list[Problem]:
        if path in (("extends",), ("version",)):
            return [Problem(origin, path, "cannot be set here; use --preset or a policy file")]
        place: object = self.values
        for part in path[:-1]:
            inner = child(place, part)
            if inner is None:
                return [Problem(origin, path, no_place(part, place))]
            place = inner
        last = path[-1]
        is_key = isinstance(place, dict) and isinstance(last, str)
        if not is_key and (not isinstance(place, list) or child(place, last) is None):
            return [Problem(origin, path, no_place(last, place))]
        place[last] = plain(value)  # type: ignore[index]
        forget(self.origins, path)
        self.origins[path] = origin
        return []

    def optimizer_without_rate(self) -> list[Problem]:
        """A learning rate meant for one optimizer is wrong for another by orders of magnitude."""
        optimizer, rate = origin_of(("train", "optimizer"), self.origins), origin_of(("train", "lr"), self.origins)
        name = self.optimizers[_OPTION_RANK]
        if self.policy is not None and self.policy.train.lr is None:
            return []
        if optimizer.rank <= rate.rank or self.optimizers.get(rate.rank) == name:
            return []
        text = f"{name} needs its own train.lr: the one from {rate.where} is for {self.optimizers.get(rate.rank)}"
        return [Problem(optimizer, ("train", "optimizer"), text)]

    def where(self) -> dict[str, str]:
        return {dotted(path): origin.where for path, origin in self.origins.items() if path}

    def notes(self, working_file: Path | None) -> list[str]:
        notes = [f"{working_file} in the working directory was used"] if working_file else []
        if self.policy is not None and self.origins[("defaults", "dynamic_ratio")].is_option:
            notes += [
                f"rules[{index}] keeps its own dynamic_ratio {rule.dynamic_ratio}"
                for index, rule in enumerate(self.policy.rules)
                if rule.dynamic_ratio is not None
            ]
        return notes
