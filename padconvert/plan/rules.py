"""Which rule of the policy decides for which layer, and what is wrong with rules that match nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from padconvert.errors import PolicyError
from padconvert.policy import Choice, Policy, Rule, did_you_mean, name_matcher, said_at
from padconvert.walk.info import LayerInfo
from padconvert.words import Role

Test = Callable[[LayerInfo], bool]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the policy says of one layer: its section with the rule's overrides. `level` is None outside of blocks."""

    choice: Choice
    level: Literal["ffn", "linear"] | None
    section: Literal["defaults", "ffn"]
    rule: int | None
    overrides: frozenset[str]

    def path(self, key: str) -> str:
        """The dotted key that gives `key`: the rule's, or that of the section."""
        return f"rules[{self.rule}].{key}" if key in self.overrides else f"{self.section}.{key}"


def settings_for(info: LayerInfo, policy: Policy, rule: int | None) -> Settings:
    """The settings of a layer: those of `ffn` in a feed-forward block, else of `defaults`, as the rule changes them."""
    in_block = info.role is Role.FFN or bool(info.group)
    overrides = {} if rule is None else policy.rules[rule].overrides()
    level = policy.ffn.level if rule is None or policy.rules[rule].level is None else policy.rules[rule].level
    base: Choice = policy.ffn if in_block else policy.defaults
    known = {key: value for key, value in overrides.items() if key in Choice.model_fields}
    return Settings(
        choice=base.model_copy(update=known),
        level=level if in_block else None,
        section="ffn" if in_block else "defaults",
        rule=rule,
        overrides=frozenset(overrides),
    )


def with_origin(path: str, origins: Mapping[str, str]) -> str:
    """A dotted key as messages name it: with where it was said, if that is known."""
    said = said_at(origins, path)
    return f"{said}: {path}" if said else path


def first_matches(rules: Sequence[Rule], layers: Sequence[LayerInfo], origins: Mapping[str, str]) -> list[int | None]:
    """For each layer the index of the first rule that matches it.

    Raises PolicyError naming every rule that matches no layer and is not optional.
    """
    hits = [[_matches(rule, info) for info in layers] for rule in rules]
    problems = [
        _no_match(index, rule, layers, origins)
        for index, rule in enumerate(rules)
        if not any(hits[index]) and not rule.optional
    ]
    if problems:
        listing = "'padconvert inspect MODEL' lists the layers; 'optional: true' lets a rule match nothing."
        raise PolicyError("\n  ".join([*problems, listing]) if len(problems) > 1 else f"{problems[0]} {listing}")
    return [next((i for i, row in enumerate(hits) if row[column]), None) for column in range(len(layers))]


def never_first(rules: Sequence[Rule], layers: Sequence[LayerInfo], first: Sequence[int | None]) -> list[str]:
    """A note for each rule that matches layers, but only such as an earlier rule has decided already."""
    return [
        f"rules[{index}] decides nothing: earlier rules match all of its layers"
        for index, rule in enumerate(rules)
        if index not in first and any(_matches(rule, info) for info in layers)
    ]


def _tests(rule: Rule) -> dict[str, Test]:
    """The rule's criteria by their key. A layer has all its names, so any of them counts."""
    tests: dict[str, Test] = {}
    if rule.name is not None:
        matches = name_matcher(rule.name)
        tests["name"] = lambda info: any(matches(name) for name in (info.name, *info.aliases))
    if rule.type is not None:
        tests["type"] = lambda info: info.type == rule.type
    if rule.role is not None:
        tests["role"] = lambda info: info.role == rule.role
    return tests


def _matches(rule: Rule, info: LayerInfo) -> bool:
    return all(test(info) for test in _tests(rule).values())


def _no_match(index: int, rule: Rule, layers: Sequence[LayerInfo], origins: Mapping[str, str]) -> str:
    for key, test in _tests(rule).items():
        if not any(test(info) for info in layers):
            word = str(getattr(rule, key))
            path = f"rules[{index}].{key}"
            near = did_you_mean(word.removeprefix("re:"), _known(key, layers))
            return f"{with_origin(path, origins)}: {word!r} matches no layer.{near}"
    path = f"rules[{index}]"
    return f"{with_origin(path, origins)}: no layer meets all of {', '.join(_tests(rule))} at once."


def _known(key: str, layers: Sequence[LayerInfo]) -> list[str]:
    """Words of the model that could have been meant; for names every dotted prefix too."""
    if key != "name":
        return sorted({str(getattr(info, key)) for info in layers})
    names = [name for info in layers for name in (info.name, *info.aliases)]
    return sorted({name.rsplit(".", cut)[0] for name in names for cut in range(name.count(".") + 1)})
