"""What transformers makes of a directory artefact: with the plug-in the same as padconvert, without it nothing."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padconvert.checkpoint.folder import METHOD
from padconvert.checkpoint.header import quote
from padconvert.checkpoint.read import Checkpoint
from padconvert.errors import PadconvertError, UsageError
from padconvert.load.directory_build import alone
from padconvert.results import Check
from padconvert.walk.probe import call, flat_outputs
from padconvert.walk.quiet import device_of, untouched

LOADER = "hf"
_WITHOUT = "fails without padconvert.hf"

Call = tuple[tuple[Tensor, ...], Mapping[str, Tensor]]


def check_loader(loader: str | None, checkpoint: Checkpoint) -> None:
    """Raises UsageError for a loader that there is not, or that cannot read this artefact."""
    if loader not in (None, LOADER):
        raise UsageError(f"--loader {loader}: '{LOADER}' (transformers) is the only one beside padconvert's own.")
    if loader is not None and not (
        checkpoint.path.is_dir() and checkpoint.manifest.architecture["kind"] == "transformers"
    ):
        raise UsageError(
            f"--loader {LOADER}: {checkpoint.path} is no transformers directory, which is all that transformers loads. "
            "Leave it away."
        )


def transformers_checks(checkpoint: Checkpoint, model: nn.Module, inputs: Call | None) -> Iterator[Check]:
    """That config.json names the manifest's class. `from_pretrained` with the plug-in: that it loads, and gives the
    outputs of `model` exactly; and without the plug-in: that it ends with an error, for otherwise the converted layers
    would be random (not held where there are none).

    `inputs` are (args, kwargs) of a call, where one is known. The two are loaded one after the other.
    """
    importlib.import_module("padconvert.hf")
    yield _same_class(checkpoint)
    name = "loads through transformers"
    loaded: nn.Module | None = None
    try:
        loaded = _from_pretrained(checkpoint)
        yield Check(name, True, None, None, "from_pretrained after 'import padconvert.hf'")
    except PadconvertError as error:
        yield Check(name, False, None, None, str(error))
    except Exception as error:  # whatever transformers raises
        yield Check(name, False, None, None, f"{type(error).__name__}: {error}".splitlines()[0])
    if loaded is not None:
        yield _same_outputs(model, loaded.to(device_of(model)), inputs)
    del loaded
    yield _fails_without(checkpoint) if checkpoint.manifest.layers else _plain()


def _same_class(checkpoint: Checkpoint) -> Check:
    """The class is in the manifest, under its checksum; tools around transformers go by config.json."""
    architecture = checkpoint.manifest.architecture
    named = architecture["config"].get("architectures")
    why = f"config.json: {quote(str(named))}, the manifest: {quote(str(architecture['class']))}"
    return Check("class in config.json", named == [architecture["class"]], None, None, why)


def _from_pretrained(checkpoint: Checkpoint) -> nn.Module:
    cls: Any = getattr(importlib.import_module("transformers"), str(checkpoint.manifest.architecture["class"]))
    with alone(str(checkpoint.path)):
        loaded: nn.Module = cls.from_pretrained(_path(checkpoint), local_files_only=True)
    return aligned_(loaded)


def aligned_(model: nn.Module) -> nn.Module:
    """Its tensors in memory of their own: transformers leaves them where the file has them, and products of numbers
    that begin elsewhere in a cache line are rounded in another order."""
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _path(checkpoint: Checkpoint) -> str:
    return str(Path(checkpoint.path).resolve())  # a relative name could be one on the hub


def _same_outputs(model: nn.Module, loaded: nn.Module, inputs: Call | None) -> Check:
    name = "same outputs through transformers"
    if inputs is None:
        return Check(name, True, None, None, "no inputs are recorded to call it with", held=False)
    with untouched(model), untouched(loaded):
        one, two = flat_outputs(call(model, *inputs)), flat_outputs(call(loaded, *inputs))
    same = len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    largest = max((float((a.double() - b.double()).abs().max()) for a, b in zip(one, two, strict=False)), default=0.0)
    return Check(name, same, largest, 0.0, "max|Δ| between padconvert.load and from_pretrained")


def _fails_without(checkpoint: Checkpoint) -> Check:
    """transformers as it is before anybody imports padconvert.hf."""
    try:
        with _unregistered():
            _from_pretrained(checkpoint)
    except RuntimeError as error:
        return Check(_WITHOUT, True, None, None, f"from_pretrained: {type(error).__name__}, as it should")
    except Exception as error:  # a failure too, but not the one that the placeholders are for
        return Check(_WITHOUT, True, None, None, f"from_pretrained: {type(error).__name__}")
    why = "from_pretrained without it makes up the converted layers at random, and only warns"
    return Check(_WITHOUT, False, None, None, why)


def _plain() -> Check:
    why = "no layer is converted, so transformers alone loads it as it is"
    return Check(_WITHOUT, True, None, None, why, held=False)


@contextmanager
def _unregistered() -> Iterator[None]:
    auto: Mapping[str, Any] = vars(importlib.import_module("transformers.quantizers.auto"))
    known: dict[str, Any] = auto["AUTO_QUANTIZATION_CONFIG_MAPPING"]
    kept = known.pop(METHOD)
    try:
        yield
    finally:
        known[METHOD] = kept
