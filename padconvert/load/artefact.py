"""An artefact → a trainable module: the source's network rebuilt, its converted layers swapped in and filled."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from padconvert.checkpoint.fill import all_names_inside, filled_layer
from padconvert.checkpoint.layout import join
from padconvert.checkpoint.manifest import LayerEntry
from padconvert.checkpoint.read import Checkpoint, read_checkpoint
from padconvert.errors import FileError, UnsafeError
from padconvert.layers.ffn import join_groups_
from padconvert.load import rebuild
from padconvert.rewrite import swap_


def load(path: str | os.PathLike[str], *, into: nn.Module | None = None, trust: Sequence[str] = ()) -> nn.Module:
    """The model of an artefact in eval mode, on the CPU; it can be trained on.

    `into` is a module of the source's architecture, with its static layers: it is changed and returned. Without it
    the network is rebuilt from the manifest; a factory is imported only where `trust` names its package.
    Raises FileError (damaged, another architecture), UnsafeError (needs code that nobody trusts).
    """
    return load_checkpoint(read_checkpoint(Path(path)), into=into, trust=trust)


def load_checkpoint(
    checkpoint: Checkpoint, *, into: nn.Module | None = None, trust: Sequence[str] = (), mapped: bool = False
) -> nn.Module:
    """As `load`, of an open checkpoint. `mapped`: on the file's pages, equal experts as one, so that it takes hardly
    any memory; to be called, not to be trained."""
    try:
        return _loaded(checkpoint, into, trust, mapped)
    except (FileError, UnsafeError) as error:
        said = str(error).removeprefix(f"{checkpoint.path}: ")
        if isinstance(error, UnsafeError) and "into=" not in said:
            said += " Or hand over a module of yours: padconvert.load(path, into=module)."
        raise type(error)(f"{checkpoint.path}: {said}") from error


def _loaded(checkpoint: Checkpoint, into: nn.Module | None, trust: Sequence[str], mapped: bool) -> nn.Module:
    manifest = checkpoint.manifest
    inside = {name for entry in manifest.layers for name in all_names_inside(entry)}
    kept = {name: tensor for name, tensor in checkpoint.tensors(copy=not mapped).items() if name not in inside}
    absent = {join(name, part) for e in manifest.layers for name in (e.name, *e.aliases) for part in ("weight", "bias")}
    if into is None:
        model = rebuild(manifest.architecture, kept, trust, missing_ok=absent)
    else:
        model = into
        _fill(model, {name: t for name, t in kept.items() if name not in manifest.extra_tensors}, absent, mapped)
    built = {
        entry.name: filled_layer(entry, _reader(checkpoint, entry.name, copy=not mapped), shared=mapped)
        for entry in manifest.layers
    }
    _check_places(model, manifest.layers)
    swap_(model, {name: built[entry.name] for entry in manifest.layers for name in (entry.name, *entry.aliases)})
    join_groups_(model)
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        raise FileError("it holds no values for a part of its network. Make it again from its source.")
    if manifest.architecture["kind"] == "transformers" and not mapped:
        _attach_(model, checkpoint)
    return model.eval()


def _attach_(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Without it `model.save_pretrained` would write what transformers loads at random."""
    from padconvert.hf import attach_

    attach_(model, checkpoint.manifest, {name: (s.dtype, s.shape) for name, s in checkpoint.header.tensors.items()})


def _reader(checkpoint: Checkpoint, layer: str, *, copy: bool) -> Callable[[str], Tensor]:
    return lambda name: checkpoint.tensor(join(layer, name), copy=copy)


def _check_places(model: nn.Module, entries: Sequence[LayerEntry]) -> None:
    """Every converted layer has a static layer of its shape to take the place of."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in entries:
        weight = getattr(modules.get(entry.name), "weight", None)
        # transformers' Conv1D stores [in, out]
        order = -1 if entry.facts.transposed else 1
        if weight is None or tuple(weight.shape)[::order] != entry.facts.weight_shape:
            there = "no layer" if weight is None else f"a layer of shape {list(weight.shape)}"
            raise FileError(
                f"the module has {there} named '{entry.name}', the artefact one of shape "
                f"{list(entry.facts.weight_shape)}. Give the architecture that the artefact was made from."
            )


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, Tensor], absent: set[str], mapped: bool) -> None:
    """Put the tensors that are not in a converted layer into the caller's module: copied, or `mapped` themselves."""
    own = model.state_dict(keep_vars=True)
    missing = sorted(own.keys() - tensors.keys() - absent)
    unexpected = sorted(tensors.keys() - own.keys())
    shapes = sorted(name for name, t in tensors.items() if name in own and own[name].shape != t.shape)
    faults = [
        f"{len(names)} {what} ({', '.join(names[:3])})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise FileError(
            f"the module is of another architecture than the artefact: {'; '.join(faults)}. "
            "Give the architecture that the artefact was made from."
        )
    for name, tensor in tensors.items():
        if mapped and tensor.dtype == own[name].dtype:
            own[name].data = tensor
        else:
            own[name].copy_(tensor)
