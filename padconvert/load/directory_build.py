"""A class of transformers, its config and its tensors → a module, within bounds that the tensors set.

A config is data that anyone may have written: it may ask for any number of layers and any size of buffer. So whatever
is built is counted while it is built, and stopped where it outgrows what the files hold.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry
from torch.utils.weak import WeakIdKeyDictionary

from padconvert.checkpoint.header import quote
from padconvert.errors import FileError
from padconvert.load.directory_class import config_for, model_class, plain_config, transformers_package

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 4
# a fused projection may become several, and a tied tensor is there under each of its names
_PARTS_A_TENSOR = 16
_PARTS = 2_000
_BUFFER_BYTES = 1 << 28
# what is not stored, a new head or a layer that is swapped, is no larger than this and so many times all that is
_ABSENT_BYTES = 1 << 26
_ABSENT_TIMES = 16
_STATISTICS = ("running_mean", "running_var")


def load_pretrained(
    cls: type[nn.Module], config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str
) -> tuple[nn.Module, tuple[str, ...]]:
    """The class with these tensors, in eval mode, under transformers' own rules for old names of tensors; and notes.

    transformers gets no path, so that it can read nothing of its own; the tensors are not copied.
    Raises FileError where a parameter would stay random, where shapes differ, or transformers refuses it.
    """
    module, info = _loaded(cls, config, tensors, dtype, where)
    missing = _missing(module, info)
    if missing:
        raise FileError(
            f"{where}: its weights lack {len(missing)} of the values of {type(module).__name__} "
            f"({_first(missing)}), which would stay random. Name the class that was trained in the config's "
            "'architectures', or save the whole model with model.save_pretrained."
        )
    return module.eval(), (*_left_unread(info), *_of_other_dtypes(module, dtype))


def from_tensors(
    cls: type[nn.Module], config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str
) -> tuple[nn.Module, tuple[str, ...]]:
    """As `load_pretrained`, but parameters that have no tensor get transformers' initial values, seeded; and their
    names."""
    module, info = _loaded(cls, config, tensors, dtype, where)
    return module.eval(), tuple(_missing(module, info))


def _loaded(
    cls: type[nn.Module], config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str
) -> tuple[nn.Module, Mapping[str, Any]]:
    made = config_for(cls, config, where)
    loader: Any = cls
    outline = _outline(cls, config, dtype, len(tensors), _bytes(tensors.values()), where)
    _check_sizes(outline, tensors, where)
    del outline
    with alone(where), _bounds(len(tensors), _bytes(tensors.values()), where), _plain_failure(cls, where):
        module, info = loader.from_pretrained(
            None, config=made, state_dict=dict(tensors), dtype=dtype, local_files_only=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    _check_loaded(module, info, where)
    return module, info


def _outline(
    cls: type[nn.Module], config: Mapping[str, Any], dtype: torch.dtype, parts: int, stored: int, where: str
) -> nn.Module:
    """The network without values: whatever its config asks for, nothing is allocated."""
    with contextlib.ExitStack() as inside:
        for each in (alone(where), _bounds(parts, stored, where), _plain_failure(cls, where)):
            inside.enter_context(each)
        for setting in (torch.device("meta"), _default_dtype(dtype)):
            inside.enter_context(setting)
        made: nn.Module = cls(_with_dtype(config_for(cls, config, where), dtype))
    return made


def _check_sizes(outline: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises FileError where a tensor has another shape than the network's of this name, or more is asked for than is
    stored: transformers would make room for it, and fill it."""
    other = [
        f"{name} is {list(tensors[name].shape)}, the config's {list(own.shape)}"
        for name, own in sorted(_owners(outline).items())
        if name in tensors and own.shape != tensors[name].shape
    ]
    if other:
        raise FileError(f"{where}: {len(other)} tensors are of another shape than its config says ({_first(other)}).")
    _check_absent(outline, _bytes(tensors.values()), where)


def _check_absent(outline: nn.Module, stored: int, where: str) -> None:
    """Raises FileError where a parameter is far larger than all that is stored."""
    for name, own in outline.named_parameters():
        if _bytes([own]) > _ABSENT_BYTES + _ABSENT_TIMES * stored:
            raise FileError(
                f"{where}: its config asks for a parameter {quote(name)} of {_bytes([own]):,} bytes, and all of its "
                f"tensors hold {stored:,}. It is the config of another network, or damaged."
            )


def _missing(module: nn.Module, info: Mapping[str, Any]) -> list[str]:
    """Parameters and statistics without a tensor. Other buffers are computed from the config alone."""
    computed = {name for name, _ in module.named_buffers() if not name.endswith(_STATISTICS)}
    return sorted(set(info["missing_keys"]) - computed)


def rebuild_transformers(
    architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], missing_ok: Collection[str] = ()
) -> nn.Module:
    """The module that an artefact describes by a class of transformers and its config, with these tensors, which are
    not copied. Names in `missing_ok` may be absent; theirs stay on the meta device.

    Raises FileError where the description is damaged, or the tensors are those of another network.
    """
    where = "the artefact's config"
    config = architecture.get("config")
    if not isinstance(config, dict):
        raise FileError(f"{where}: is no JSON object. The file is damaged.")
    dtype = _dtype_of(architecture, where)
    cls = model_class(architecture.get("class"), where)
    plain = plain_config(config, where)
    parts, size = len(tensors) + len(missing_ok), _bytes(tensors.values())
    outline = _outline(cls, plain, dtype, parts, size, where)
    _check_fit(outline, tensors, missing_ok, where)
    _check_absent(outline, size, where)
    del outline
    # once more for the buffers' values: what is not stored can only be computed
    with alone(where), _bounds(parts, size, where, meta=True), _plain_failure(cls, where), _default_dtype(dtype):
        module: nn.Module = cls(_with_dtype(config_for(cls, plain, where), dtype))
    _put_(module, tensors)
    left = [name for name, parameter in module.named_parameters() if parameter.is_meta and name not in missing_ok]
    if left:
        raise FileError(f"{where}: the artefact holds no values for '{left[0]}'. Make it again from its source.")
    return module.eval()


def architecture_record(cls: type[nn.Module], config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What an artefact keeps to rebuild the network: {"kind", "class", "dtype", "config"}, all of it JSON. The config's
    own dtype need not be that of the files, so it does not count."""
    named = str(dtype).removeprefix("torch.")
    return {"kind": "transformers", "class": cls.__name__, "dtype": named, "config": dict(config)}


def _dtype_of(architecture: Mapping[str, Any], where: str) -> torch.dtype:
    named = str(architecture.get("dtype"))
    found = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}.get(named)
    if found is None:
        raise FileError(f"{where}: the dtype {quote(named)} is none of a network's weights. The file is damaged.")
    return found


def _with_dtype(config: Any, dtype: torch.dtype) -> Any:
    """As from_pretrained leaves a config, its parts too."""
    config.dtype = dtype
    for key in getattr(config, "sub_configs", ()):
        part = getattr(config, key, None)
        if part is not None:
            part.dtype = dtype
    return config


def _bytes(tensors: Collection[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- while transformers builds


@contextlib.contextmanager
def alone(where: str) -> Iterator[None]:
    """Inside: no network, no log lines, no progress bar, no warnings, and the same random numbers each time.
    Afterwards all is as it was."""
    log = transformers_package(where).utils.logging
    hub: Any = importlib.import_module("huggingface_hub.constants")
    offline, verbosity, bar = hub.HF_HUB_OFFLINE, log.get_verbosity(), log.is_progress_bar_enabled()
    try:
        hub.HF_HUB_OFFLINE = True
        log.set_verbosity(log.CRITICAL)
        log.disable_progress_bar()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


@contextlib.contextmanager
def _plain_failure(cls: type[nn.Module], where: str) -> Iterator[None]:
    """Whatever a model's code raises, as one line."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise FileError(f"{where}: transformers cannot build {cls.__name__} of it ({quote(said)}).") from error


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _bounds(tensors: int, stored: int, where: str, *, meta: bool = False) -> Iterator[None]:
    """Inside, a network that has far more parts than there are tensors, or buffers far larger than all that is
    stored, is a FileError. With `meta`, parameters go to the meta device as they are made; buffers stay real."""
    limit, space = _PARTS + _PARTS_A_TENSOR * tensors, _BUFFER_BYTES + stored
    counts = {"parts": 0, "bytes": 0}
    empty = WeakIdKeyDictionary()  # so that a parameter with two names stays one

    def count(_module: nn.Module, _name: str, part: object) -> nn.Parameter | None:
        counts["parts"] += 1
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            counts["bytes"] += part.numel() * part.element_size()
        if counts["parts"] > limit or counts["bytes"] > space:
            what = f"more than {limit} parts" if counts["parts"] > limit else f"buffers of more than {space} bytes"
            raise FileError(f"{where}: its config asks for {what}, and its {tensors} tensors hold no such network.")
        if not meta or not isinstance(part, nn.Parameter) or part.is_meta:
            return None
        if part not in empty:
            empty[part] = nn.Parameter(torch.empty_like(part, device="meta"), requires_grad=part.requires_grad)
        made: nn.Parameter = empty[part]
        return made

    add: Any = registry  # torch's stubs say that the hooks return nothing
    with contextlib.ExitStack() as stack:
        for kind in ("parameter", "buffer", "module"):
            stack.callback(getattr(add, f"register_module_{kind}_registration_hook")(count).remove)
        yield


# ---- what came of it


def _check_loaded(module: nn.Module, info: Mapping[str, Any], where: str) -> None:
    other = [
        f"{name} is {list(stored)}, the config's {list(own)}" for name, stored, own in sorted(info["mismatched_keys"])
    ]
    if other:
        raise FileError(f"{where}: {len(other)} tensors are of another shape than its config says ({_first(other)}).")
    if info.get("error_msgs"):
        raise FileError(f"{where}: transformers cannot read its tensors ({quote(str(info['error_msgs'][0]))}).")
    left = next((name for name, tensor in module.named_parameters() if tensor.is_meta), None)
    if left:
        raise FileError(f"{where}: transformers leaves '{left}' without a value. Save the model again.")


def _left_unread(info: Mapping[str, Any]) -> tuple[str, ...]:
    names = sorted(info["unexpected_keys"])
    return (f"left unread, as its class has no place for them: {_first(names)}",) if names else ()


def _of_other_dtypes(module: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """What transformers keeps in another dtype than the file's (T5's `wo` in fp32)."""
    other = [n for n, p in module.named_parameters() if p.is_floating_point() and p.dtype != dtype]
    kept = {str(module.get_parameter(name).dtype).removeprefix("torch.") for name in other}
    return (f"transformers keeps {_first(other)} in {', '.join(sorted(kept))}",) if other else ()


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _owners(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


def _check_fit(outline: nn.Module, tensors: Mapping[str, Tensor], missing_ok: Collection[str], where: str) -> None:
    """Raises FileError unless the tensors are those of the network, by name and shape."""
    own = _owners(outline)
    there = {id(own[name]) for name in tensors if name in own}  # a tied tensor is there if any of its names is
    lists = {
        "missing": [name for name, tensor in own.items() if id(tensor) not in there and name not in missing_ok],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": [name for name, t in tensors.items() if name in own and own[name].shape != t.shape],
    }
    faults = [f"{len(names)} {what} ({_first(names)})" for what, names in lists.items() if names]
    if faults:
        raise FileError(f"{where}: describes another network than the tensors are of: {', '.join(faults)}.")


def _put_(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Every parameter and stored buffer takes its tensor, under all of its names."""
    names: dict[int, list[str]] = {}
    own = _owners(module)
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    for same in names.values():
        given = next((tensors[name] for name in same if name in tensors), None)
        if given is None:
            continue
        old = own[same[0]]
        new = nn.Parameter(given, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else given
        for name in same:
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, new)
