"""What a conversion starts from: a static source, or an artefact to go on from. Both look alike from here on."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padconvert.checkpoint.folder import CONFIG, INDEX, examine_folder
from padconvert.checkpoint.manifest import Manifest
from padconvert.checkpoint.read import read_checkpoint
from padconvert.checkpoint.tensor_bytes import place_of
from padconvert.checksum import Checksum, sha256_of_all
from padconvert.errors import FileError, UsageError
from padconvert.fold import plain_layer
from padconvert.layers.facts import LayerFacts
from padconvert.layers.packed import UnitView
from padconvert.layers.padding import ignore_padding_
from padconvert.load import open_source
from padconvert.load.artefact import load_checkpoint
from padconvert.load.detect import InputKind, detect
from padconvert.load.factory import architecture_of, build_factory
from padconvert.load.source import Source, own_tensors
from padconvert.options import ConvertOptions
from padconvert.plan import Plan, TensorSizes
from padconvert.policy import Rule
from padconvert.precision import upcast_
from padconvert.rewrite import names_of, pad_layers, rewrite_, swap_
from padconvert.words import Routing


@dataclass(frozen=True, slots=True)
class Opened:
    """`module` computes what the input computes; `static` is its network with static layers only (the same object,
    unless the input is a trained artefact), which is what is walked and planned."""

    path: Path
    kind: str
    module: nn.Module
    static: nn.Module
    bytes: int
    checksum: str | Checksum
    architecture: dict[str, Any]
    extra_tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]
    rules: tuple[Rule, ...] = ()  # of a trained artefact: its partition

    @property
    def sha256(self) -> str:
        """The source's checksum; waits until it is known."""
        return self.checksum if isinstance(self.checksum, str) else self.checksum.value()

    @property
    def goes_on(self) -> bool:
        """Whether the partition is done already and only training goes on."""
        return self.static is not self.module

    @property
    def sizes(self) -> TensorSizes:
        """Shape and bytes per number of every tensor of the static network, each once."""
        tensors = own_tensors(self.static)
        return {name: (tuple(tensor.shape), tensor.element_size()) for name, tensor in tensors.items()}

    @property
    def repeated_bytes(self) -> int:
        """Bytes that `sizes` counts again for tensors that lie on the very memory of another; a file has them once."""
        places: set[tuple[object, ...]] = set()
        repeated = 0
        for tensor in own_tensors(self.static).values():
            place = place_of(tensor)
            repeated += tensor.numel() * tensor.element_size() if place and place in places else 0
            places |= {place} if place else set()
        return repeated

    def dynamic_copy(self, plan: Plan) -> nn.Module:
        """A copy to train, in fp32 where the input is in half precision: rewritten by the plan, or opened again."""
        model = upcast_(copy.deepcopy(self.module))
        if not self.goes_on:
            rewrite_(model, plan)
            return model
        scaled = {entry.info.name for entry in plan.converted if entry.choice and entry.choice.scales == "both"}
        for name, layer in pad_layers(model).items():
            if name in scaled:
                layer.add_scales_()
        return model


def open_input(path: Path, options: ConvertOptions, device: torch.device, checksum: Checksum | None = None) -> Opened:
    """Open a saved model or an artefact on `device`. `checksum` is its own, where it is a file and that was begun
    already. Raises as `open_source` and `load` do."""
    beside = checksum or (Checksum(path) if path.is_file() else None)
    if detect(path) is InputKind.ARTEFACT and options.state_key is None:
        return _opened_artefact(path, options, device, beside)
    source = open_source(
        path,
        arch=options.arch,
        arch_args=options.arch_args,
        trust=options.trust,
        state_key=options.state_key,
        hash=beside is None,
    )
    module = module_of(source).to(device)
    known = beside or source.sha256
    assert known is not None, "open_source hashes unless told not to"
    return Opened(
        path=path,
        kind=source.kind,
        module=module,
        static=module,
        bytes=source.bytes,
        checksum=known,
        architecture=source.architecture,
        extra_tensors=source.extra_tensors,
        notes=source.notes,
    )


def module_of(source: Source) -> nn.Module:
    """The source's network. Raises FileError where the file holds tensors and no architecture was named."""
    if source.module is None:
        raise FileError(
            f"{source.path}: holds tensors but no architecture, so there is no network to convert. "
            "Name the function that builds it: --arch package.module:factory (its arguments by --arch-arg name=value)."
        )
    return source.module


def _opened_artefact(path: Path, options: ConvertOptions, device: torch.device, checksum: Checksum | None) -> Opened:
    """An artefact that was never fine-tuned is its source in another form, so the whole line starts again from it."""
    checkpoint = read_checkpoint(path)
    into = build_factory(architecture_of(options.arch, options.arch_args)) if options.arch else None
    module = load_checkpoint(checkpoint, into=into, trust=options.trust).to(device)
    extra = {name: checkpoint.tensor(name, copy=True) for name in checkpoint.manifest.extra_tensors}
    size, sha256 = (path.stat().st_size, checksum) if checksum is not None else _measured(path)
    opened = Opened(
        path=path,
        kind="artefact",
        module=module,
        static=static_twin(module),
        bytes=size,
        checksum=sha256,
        architecture=checkpoint.manifest.architecture,
        extra_tensors=extra,
        notes=(),
    )
    if not checkpoint.manifest.trained:
        note = "the artefact was never fine-tuned: its partition is chosen anew"
        return replace(opened, module=opened.static, notes=(note,))
    if options.dynamic_ratio is not None or options.experts is not None or options.granularity is not None:
        raise UsageError(
            f"{path}: a fine-tuned artefact keeps its partition, so --dynamic-ratio, --experts and --granularity "
            "cannot change it. Convert the source again to get another one."
        )
    return replace(opened, rules=rules_of(checkpoint.manifest), notes=("training goes on; the partition stays",))


def _measured(path: Path) -> tuple[int, str]:
    """Bytes of a folder's weight files, and one checksum for these, config and index."""
    weights = [path / name for name in examine_folder(path).files]
    described = [path / name for name in (CONFIG, INDEX) if (path / name).exists()]
    return sum(file.stat().st_size for file in weights), sha256_of_all([*described, *weights])


def static_twin(module: nn.Module) -> nn.Module:
    """A copy with every Pad layer as the plain layer of its first expert: the source's network, its weights only
    where the experts are equal."""
    twin = copy.deepcopy(module)
    plain: dict[str, nn.Module] = {}
    for layer in pad_layers(twin).values():
        plain |= dict.fromkeys(names_of(twin, layer), plain_layer(layer))
    swap_(twin, plain)
    ignore_padding_(twin)
    return twin


def rules_of(manifest: Manifest) -> tuple[Rule, ...]:
    """The artefact's partition as policy rules, one a layer, so that a plan describes what is there."""
    return tuple(_rule_of(entry.name, entry.facts) for entry in manifest.layers)


def _rule_of(name: str, facts: LayerFacts) -> Rule:
    view = UnitView(facts.weight_shape, facts.granularity, facts.unit_dim)
    return Rule(
        name="re:" + re.escape(name),
        convert=True,
        dynamic_ratio=(Decimal(facts.n_dynamic) / view.units).quantize(Decimal(10) ** -20),
        num_experts=facts.num_experts,
        granularity=facts.granularity.value,
        router=facts.router,
        routing="sequence" if facts.routing is Routing.SEQUENCE else "token",
        top_k=facts.top_k,
        level="ffn" if facts.group else "linear",
    )
