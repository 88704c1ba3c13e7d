"""YAML in, one frozen and whole `Policy` out. No torch, no models."""

from padconvert.policy.check import did_you_mean
from padconvert.policy.model import (
    Choice,
    Data,
    Partition,
    Policy,
    Rule,
    Train,
    name_matcher,
    router_names,
    score_names,
)
from padconvert.policy.resolve import (
    DEFAULT_PRESET,
    WORKING_FILE,
    Option,
    Resolved,
    load_policy,
    names_function,
    preset_names,
    preset_text,
    set_overrides,
)

__all__ = [
    "DEFAULT_PRESET",
    "WORKING_FILE",
    "Choice",
    "Data",
    "Option",
    "Partition",
    "Policy",
    "Resolved",
    "Rule",
    "Train",
    "did_you_mean",
    "load_policy",
    "name_matcher",
    "names_function",
    "preset_names",
    "preset_text",
    "router_names",
    "score_names",
    "set_overrides",
]
