"""A new head on a transformers encoder that has none for its task. Its values are seeded noise, to be trained."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from padconvert.errors import UsageError
from padconvert.load.directory_build import architecture_record, from_tensors
from padconvert.load.directory_class import model_class

#: by what the data holds, the table of transformers that names the class with a head
_TABLES = {
    "text": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
_ENDINGS = ("ForSequenceClassification", "ForImageClassification")


def has_head(architecture: Mapping[str, Any]) -> bool:
    """Whether the class classifies whole inputs already."""
    return str(architecture.get("class")).endswith(_ENDINGS)


def with_head(
    module: nn.Module,
    architecture: Mapping[str, Any],
    *,
    outputs: int,
    names: Sequence[str] | None,
    regression: bool,
    text: bool,
    pad_token: int | None,
    where: str,
) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """(the network with a head of `outputs` outputs in eval mode, its architecture, the names of its new parameters).

    `names` are the classes' words, kept in the config. `pad_token` tells networks that read their last token where a
    text ends. Raises UsageError where transformers has no class with a head for this kind of network.
    """
    config = dict(architecture["config"])
    tables: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    named = getattr(tables, _TABLES["text" if text else "image"]).get(config.get("model_type"))
    if named is None:
        raise UsageError(
            f"{where}: transformers has no head for a {config.get('model_type')} on such data. Save a model that has "
            "its head, and leave --task away."
        )
    labels = [str(name) for name in names] if names else [f"LABEL_{number}" for number in range(outputs)]
    config["id2label"] = {str(number): label for number, label in enumerate(labels)}
    config["label2id"] = {label: number for number, label in enumerate(labels)}
    config["problem_type"] = "regression" if regression else "single_label_classification"
    if config.get("pad_token_id") is None and pad_token is not None:
        config["pad_token_id"] = pad_token
    cls = model_class(named, where)
    dtype = getattr(torch, str(architecture["dtype"]))
    made, new = from_tensors(cls, config, module.state_dict(), dtype, where)
    return made, architecture_record(cls, config, dtype), new
