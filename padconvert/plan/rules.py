"""Which rule of the policy decides for which layer, and what is wrong with rules that match nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from padconvert.errors import PolicyError
from padconvert.policy import Rule, did_you_mean, name_matcher, said_at
from padconvert.walk.info import LayerInfo

Test = Callable[[LayerInfo], bool]


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
            return f"{_where(path, origins)}{path}: {word!r} matches no layer.{near}"
    path = f"rules[{index}]"
    return f"{_where(path, origins)}{path}: no layer meets all of {', '.join(_tests(rule))} at once."


def _where(path: str, origins: Mapping[str, str]) -> str:
    said = said_at(origins, path)
    return f"{said}: " if said else ""


def _known(key: str, layers: Sequence[LayerInfo]) -> list[str]:
    """Words of the model that could have been meant; for names every dotted prefix too."""
    if key != "name":
        return sorted({str(getattr(info, key)) for info in layers})
    names = [name for info in layers for name in (info.name, *info.aliases)]
    return sorted({name.rsplit(".", cut)[0] for name in names for cut in range(name.count(".") + 1)})
