"""YAML in, one frozen and whole `Policy` out. No torch, no models."""

from padconvert.policy.check import did_you_mean
from padconvert.policy.model import (
    Choice,
    Data,
    Ffn,
    Partition,
    Policy,
    Rule,
    Train,
    router_names,
    score_names,
)
from padconvert.policy.pattern import name_matcher
from padconvert.policy.resolve import (
    DEFAULT_PRESET,
    WORKING_FILE,
    Option,
    Resolved,
    load_policy,
    names_function,
    preset_names,
    preset_text,
    said_at,
    set_overrides,
)
from padconvert.policy.show import render, schema, settings_of, starter, write_starter

__all__ = [
    "DEFAULT_PRESET",
    "WORKING_FILE",
    "Choice",
    "Data",
    "Ffn",
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
    "render",
    "router_names",
    "said_at",
    "schema",
    "score_names",
    "set_overrides",
    "settings_of",
    "starter",
    "write_starter",
]
