"""Tiny transformers models, converted and written as directories."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import padconvert
from directories import saved
from padconvert.checkpoint.save import provenance_of
from padconvert.export.directory import save_directory
from padconvert.fold import fold_
from padconvert.load import open_source
from padconvert.partition import Partitioner
from padconvert.policy import load_policy
from padconvert.rewrite import pad_layers, rewrite_
from padconvert.walk.probe import ProbeSpec, call, find_probe, flat_outputs


def converted(model: nn.Module, *, trained: bool = True, **settings: object) -> nn.Module:
    """A folded copy, half of whose units are dynamic in each layer that the policy converts; with `trained` the experts
    differ. `settings` are the policy's, with `__` for a dot."""
    policy = load_policy(overrides={name.replace("__", "."): value for name, value in settings.items()})
    plan = padconvert.plan(model, policy, route="data-free")
    made = copy.deepcopy(model)
    rewrite_(made, plan)
    Partitioner(made, plan).round_(1, [])
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in pad_layers(made).values() if trained else ():
            for name, parameter in layer.named_parameters():
                if name.endswith("_dynamic"):
                    # with experts all the same nothing would show that one took another's place
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise).to(parameter))
    return fold_(made).eval()


def write(model: nn.Module, source: Path, out: Path, *, trained: bool = True, **options: Any) -> Path:
    """The model as a directory artefact; `source` is the directory that it was converted from."""
    opened = open_source(source)
    provenance = provenance_of(
        source_sha256=opened.sha256, source_kind=opened.kind, device="cpu", seed=0, trained=trained
    )
    given: dict[str, Any] = {
        "architecture": opened.architecture,
        "provenance": provenance,
        "policy": {},
        "trained": trained,
        "probe": probe_of(model),
    }
    save_directory(model, out, source_dir=source, **(given | options))
    return out


def artefact(model: Any, folder: Path, *, trained: bool = True, **settings: object) -> Path:
    """`folder`/out, converted from `folder`/source, which holds the model."""
    source = saved(model, folder / "source")
    return write(converted(model, trained=trained, **settings), source, folder / "out", trained=trained)


def probe_of(model: nn.Module) -> ProbeSpec:
    found = find_probe(model, None)
    assert found is not None
    return found


def outputs(model: nn.Module, probe: ProbeSpec) -> list[Tensor]:
    with torch.no_grad():
        return flat_outputs(call(model, *probe.make(3)))
