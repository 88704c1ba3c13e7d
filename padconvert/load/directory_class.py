"""A config → the class of transformers it names, and an object of the config's class. No code of the model's own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from padconvert.checkpoint.header import quote
from padconvert.errors import FileError, UnsafeError
from padconvert.load.directory_files import check_depth, check_not_quantized, tables

#: what a config says of the machine, the place and the code it comes from, and not of the network
_DROPPED = frozenset({
    "architectures", "attn_implementation", "auto_map", "custom_pipelines", "dtype", "experts_implementation",
    "fusion_config", "name_or_path", "torch_dtype", "transformers_version", "transformers_weights",
})  # fmt: skip
# lists as long as these are made before the first layer is
_COUNTS = re.compile(r"(layers?|blocks?|depths?|experts|stages?|groups|num_labels)$")
_MAX_COUNT = 100_000
_LABELS = frozenset({"id2label", "label2id"})  # their keys are a user's words


def transformers_package(where: str) -> Any:
    """The package. Raises FileError with the line that installs it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise FileError(
            f"{where}: reading it needs the package transformers. Install it: pip install 'padconvert[hf]'."
        ) from error


def plain_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config as the network's description alone: no paths, no way of computing, no pretrained backbone to fetch.

    Raises FileError for one that is quantised, nested too deeply, or counts more layers than any network has.
    """
    check_depth(config, where)
    check_not_quantized(config, where)
    for table in tables(config):
        for key, value in table.items():
            values = value if isinstance(value, list) else [value]
            if _COUNTS.search(key) and any(type(each) is int and each > _MAX_COUNT for each in values):
                raise FileError(f"{where}: its config has {quote(key)} {quote(str(value))}, more than any network.")
    kept = _kept(config)
    assert isinstance(kept, dict)
    return kept


def _kept(value: object) -> object:
    if isinstance(value, list):
        return [_kept(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {
        key: each if key in _LABELS else _kept(each)
        for key, each in value.items()
        if key not in _DROPPED and not key.startswith("_")
    }
    if kept.get("use_pretrained_backbone"):
        kept["use_pretrained_backbone"] = False  # its weights are in the file with the others
    return kept


def class_named(config: Mapping[str, Any], where: str) -> type[nn.Module]:
    """The class in the config's `architectures`; without one, that which AutoModel takes for its `model_type`.

    Raises FileError where transformers has none, UnsafeError where the class is code of the model's own.
    """
    named = config.get("architectures")
    if isinstance(named, list) and named and all(isinstance(name, str) for name in named):
        if config.get("auto_map") and not _is_known(str(named[0]), where):
            raise UnsafeError(
                f"{where}: its class {quote(named[0])} is code that came with the model ('auto_map'), and such code is "
                "never run. Take the model's version for transformers itself, if there is one."
            )
        return model_class(named[0], where)
    if named:
        raise FileError(f"{where}: its config's 'architectures' is no list of names of classes.")
    names = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_MAPPING_NAMES
    name = names.get(_model_type(config, where))
    if name is None:
        raise FileError(
            f"{where}: transformers has no plain model for model_type {quote(str(config.get('model_type')))}. "
            "Name the class in the config: \"architectures\": [\"BertModel\"]."
        )  # fmt: skip
    return model_class(name if isinstance(name, str) else name[0], where)


def _is_known(name: str, where: str) -> bool:
    try:
        model_class(name, where)
    except FileError:
        return False
    return True


def model_class(name: object, where: str) -> type[nn.Module]:
    """The class of a model in transformers that has exactly this name. Raises FileError where there is none."""
    package = transformers_package(where)
    found: Any = None
    if isinstance(name, str) and name.isidentifier() and name.isascii():
        try:
            found = getattr(package, name, None)
        except Exception as error:  # a class whose own needs are not installed may raise anything
            raise FileError(f"{where}: transformers cannot give {name} ({_line(error)}).") from error
    if not _is_model(found, package) or found.__name__ != name:
        raise FileError(
            f"{where}: its class is {quote(str(name))}, and transformers {package.__version__} has no such model. "
            "Update transformers, or save the network with torch.save(model, 'model.pt') and name that file."
        )
    model: type[nn.Module] = found
    return model


def _is_model(found: Any, package: Any) -> bool:
    return (
        isinstance(found, type)
        and issubclass(found, package.PreTrainedModel)
        and found.__module__.startswith("transformers.models.")
    )


def config_for(cls: type[nn.Module], config: Mapping[str, Any], where: str) -> Any:
    """A config object for the class, of a dict that `plain_config` gave.

    Raises FileError where it is of another model than the class, or transformers refuses it.
    """
    package = transformers_package(where)
    wanted: Any = getattr(cls, "config_class", None)
    model_type = _model_type(config, where) if config.get("model_type") or wanted is None else wanted.model_type
    stated = wanted if wanted is not None and wanted.model_type == model_type else package.CONFIG_MAPPING[model_type]
    if wanted is not None and not issubclass(stated, wanted):
        raise FileError(
            f"{where}: its config is of the model_type {quote(model_type)}, its class {cls.__name__} takes "
            f"{quote(wanted.model_type)}. Download the directory again."
        )
    try:
        return stated.from_dict(dict(config))
    except Exception as error:  # whatever the class makes of values it does not expect
        raise FileError(f"{where}: transformers refuses its config ({_line(error)}).") from error


def _model_type(config: Mapping[str, Any], where: str) -> str:
    package = transformers_package(where)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in package.CONFIG_MAPPING:
        said = f"the model_type {quote(model_type)}" if isinstance(model_type, str) else "no 'model_type'"
        code = " Its config is code that came with the model ('auto_map'), which is never run." * bool(
            config.get("auto_map")
        )
        raise FileError(
            f"{where}: its config has {said}, which transformers {package.__version__} does not know.{code} "
            "Update transformers, or save the network with torch.save(model, 'model.pt') and name that file."
        )
    return model_type


def _line(error: BaseException) -> str:
    """An error of another package on one line."""
    return quote(" ".join(f"{type(error).__name__}: {error}".split()))
