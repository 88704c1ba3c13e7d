"""transformers' own loader for directories that padconvert wrote. Importing this module registers it there:

    import padconvert.hf
    from transformers import AutoModel

    model = AutoModel.from_pretrained("OUT")

Before transformers loads the weights, every converted layer gives way to room for its stored tensors; afterwards the
layer that they make up takes its place. The model can be trained, and `save_pretrained` writes such a directory again;
so does that of a model of transformers which `padconvert.load` returns.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import padconvert
from padconvert.checkpoint.bitmask import PlacementChecks
from padconvert.checkpoint.fill import filled_layer, names_inside
from padconvert.checkpoint.folder import METHOD, config_with, merged, metadata_in
from padconvert.checkpoint.header import encode_header, read_header
from padconvert.checkpoint.layout import Spec, check_layout, expected_tensors, join, placeholders
from padconvert.checkpoint.manifest import KEY, LayerEntry, Manifest, check_seal, manifest_from_json
from padconvert.checkpoint.save import directory_tensors, entries_of
from padconvert.checkpoint.write import survey
from padconvert.errors import FileError, UsageError
from padconvert.layers.ffn import PadLinearMember, join_groups_
from padconvert.rewrite import pad_layers, swap_
from padconvert.words import Place

try:
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("padconvert.hf needs the package transformers: pip install 'padconvert[hf]'") from error


@register_quantization_config(METHOD)
class PadConvertConfig(QuantizationConfigMixin):
    """The `quantization_config` of a config.json as transformers keeps it: the manifest, not read yet."""

    def __init__(self, quant_method: str = METHOD, **document: Any) -> None:
        self.quant_method: Any = quant_method
        self.document = document

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, **copy.deepcopy(self.document)}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    @property
    def metadata(self) -> dict[str, str]:
        """The manifest's text and checksum."""
        return metadata_in(self.document)

    def manifest(self) -> Manifest:
        """Raises FileError where it is damaged or newer than this code."""
        return manifest_from_json(self.metadata[KEY])


class Incoming(nn.Module):
    """Room for the stored tensors of a converted layer. It computes nothing; the layer takes its place."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        super().__init__()
        for name, (dtype, shape) in specs.items():
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            self._put(name.split("."), nn.Parameter(tensor) if tensor.is_floating_point() else tensor)
        # what a model's own initialisation looks for in a layer, and leaves alone
        self.weight = self.bias = torch.empty(0, device="cpu")
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def _put(self, path: Sequence[str], tensor: Tensor) -> None:
        home: nn.Module = self
        for part in path[:-1]:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            home.register_parameter(path[-1], tensor)
        else:
            home.register_buffer(path[-1], tensor)

    def loaded(self, name: str) -> Tensor:
        """A tensor that transformers has loaded. Raises FileError where it has not."""
        path, _, own = name.rpartition(".")
        tensor: Tensor = getattr(self.get_submodule(path), own)
        if tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False):
            raise FileError(f"transformers did not load '{name}' of a converted layer. Please report it.")
        return tensor.detach()


@register_quantizer(METHOD)
class PadConvertQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model of ours."""

    requires_calibration = True  # there is no converting on the fly: that is `padconvert convert`

    def __init__(self, quantization_config: PadConvertConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stated = quantization_config
        self.manifest = quantization_config.manifest()
        self._places: dict[str, str] = {}
        self._dtype: torch.dtype | None = None

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raises UsageError for a device_map that spreads the model over devices."""
        if device_map is None or (isinstance(device_map, dict) and set(device_map) == {""}):
            return
        raise UsageError(
            f"device_map={device_map!r}: a model of padconvert is loaded whole, onto one device. Leave it away "
            "and move the model: model.to(device)."
        )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Notes the dtype that was asked for; the weights get it, routers, bitmasks and indices keep theirs."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Raises FileError where the files are not what the manifest says, or the model has none of its layers."""
        if checkpoint_files:
            _check_files(checkpoint_files, self.manifest, self.stated.metadata)
        self._places = _places(model, self.manifest.layers)
        rooms: dict[str, nn.Module] = {}
        for entry in self.manifest.layers:
            if entry.name not in self._places:
                continue
            rooms[self._places[entry.name]] = Incoming(_specs(entry, self._dtype))
            rooms |= {self._places[alias]: nn.Module() for alias in entry.aliases if alias in self._places}
        swap_(model, rooms)
        ignored = {rf"(^|\.){re.escape(name)}$" for name in placeholders(self.manifest.layers)}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        checks = PlacementChecks(self.manifest)
        layers: dict[str, nn.Module] = {}
        for entry in self.manifest.layers:
            if entry.name in self._places:
                layer = _layer_of(model.get_submodule(self._places[entry.name]), entry, checks)
                names = (entry.name, *entry.aliases)
                layers |= {self._places[name]: layer for name in names if name in self._places}
        swap_(model, layers)
        join_groups_(model)
        _as_ordinary_(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that `save_pretrained` writes; the manifest of what they are now goes into the model's config.

        Where a tensor is another than the one that was loaded, the model counts as trained, and the outputs that were
        recorded of the former one are left out. Routers that `model.half()` has cast are fp32 again afterwards.
        Raises UsageError where a layer is not folded, FileError where no reader would take what would be written.
        """
        _name_blocks_(model)
        _keep_routers_(model)
        manifest, specs, tensors = _manifest_now(model, self.manifest)
        self.manifest = manifest
        part = config_with({}, manifest, specs)["quantization_config"]
        self.stated = PadConvertConfig(**part)
        model.config.quantization_config = self.quantization_config = self.stated
        # what is stored of equal experts is a part of a larger tensor, which would be counted as a whole
        whole = {name for name in specs if tensors[name].untyped_storage().nbytes() == tensors[name].nbytes}
        return {name: tensors[name] if name in whole else tensors[name].clone() for name in specs}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Every parameter is an ordinary one; transformers' Trainer asks for this word."""
        return True


def attach_(model: nn.Module, manifest: Manifest, specs: Mapping[str, Spec]) -> None:
    """Lets `save_pretrained` write a directory artefact of a model that padconvert and not transformers has rebuilt.

    `manifest` and `specs` (of all stored tensors) are those of its artefact. A module that is no model of transformers
    stays as it is.
    """
    if not isinstance(model, PreTrainedModel):
        return
    stated = PadConvertConfig(**config_with({}, manifest, specs)["quantization_config"])
    quantizer = PadConvertQuantizer(stated, pre_quantized=True)
    quantizer.manifest = manifest
    of_transformers: Any = model
    of_transformers.hf_quantizer = quantizer
    _as_ordinary_(model)


def _as_ordinary_(model: Any) -> None:
    # saved under the names it has in memory
    model._weight_conversions = []
    # its parameters are ordinary ones: `model.float()` and training need no permission
    model.is_quantized = False


def _check_files(files: Sequence[str], manifest: Manifest, metadata: Mapping[str, str]) -> None:
    """Raises FileError where the files' headers are not those that the manifest was written with."""
    folder = Path(files[0]).parent
    try:
        header = merged({Path(file).name: read_header(file) for file in files}, None, metadata)
        check_seal(metadata, {name: (slot.dtype, slot.shape) for name, slot in header.tensors.items()})
        check_layout(manifest, header)
    except FileError as error:
        raise FileError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from None


def _places(model: Any, entries: Sequence[LayerEntry]) -> dict[str, str]:
    """Name in the manifest → name in this model, which may have a head on top of the stored one, or none."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    places: dict[str, str] = {}
    for name in (name for entry in entries for name in (entry.name, *entry.aliases)):
        found = [each for each in (name, prefix + name, name.removeprefix(prefix)) if each in modules]
        places |= {name: found[0]} if found else {}
    if not places and entries:
        raise FileError(
            f"{type(model).__name__} has no layer named '{entries[0].name}', which the artefact converted. "
            "Load it with the class that its config.json names under 'architectures'."
        )
    return places


def _specs(entry: LayerEntry, dtype: torch.dtype | None) -> dict[str, Spec]:
    """The layer's stored tensors by their names in it, its weights in the dtype that was asked for."""
    asked = entry.facts.dtype if dtype is None else str(dtype).removeprefix("torch.")
    specs = zip(names_inside(entry), expected_tensors(entry).values(), strict=True)
    weights = ("_static", "_dynamic")
    return {name: (asked if name.endswith(weights) else stored, shape) for name, (stored, shape) in specs}


def _layer_of(room: nn.Module, entry: LayerEntry, checks: PlacementChecks) -> nn.Module:
    assert isinstance(room, Incoming)
    tensors = {name: room.loaded(name) for name in names_inside(entry)}
    for name, tensor in tensors.items():
        checks.check(join(entry.name, name), tensor)
    dtype = next(tensor.dtype for name, tensor in tensors.items() if name.startswith("weight_"))
    facts = dataclasses.replace(entry.facts, dtype=str(dtype).removeprefix("torch."))
    layer = filled_layer(entry, tensors.__getitem__, facts)
    return layer.to(next(iter(tensors.values())).device).eval()


def _manifest_now(model: Any, before: Manifest) -> tuple[Manifest, dict[str, Spec], dict[str, Tensor]]:
    """What the model is now: its manifest with checksums, and its tensors."""
    architecture = {**before.architecture, "class": type(model).__name__}
    if "dtype" in architecture:
        architecture["dtype"] = str(model.dtype).removeprefix("torch.")
    manifest, specs, tensors = _surveyed(model, dataclasses.replace(before, architecture=architecture))
    if _same_values(manifest, before) and architecture == before.architecture:
        return manifest, specs, tensors
    provenance = dataclasses.replace(before.provenance, route="trained")
    changed = dataclasses.replace(manifest, probe=None, trained=True, provenance=provenance)
    return _surveyed(model, changed)


def _surveyed(model: Any, manifest: Manifest) -> tuple[Manifest, dict[str, Spec], dict[str, Tensor]]:
    entries = entries_of(model, trained=manifest.trained)
    tensors, aliases = directory_tensors(model, entries)
    specs, made = survey(
        tensors, dataclasses.replace(manifest, padconvert=padconvert.__version__, layers=entries, aliases=aliases)
    )
    # before transformers has written anything: config.json would be left behind alone
    check_layout(made, encode_header(specs, {})[1])
    return made, specs, cast(dict[str, Tensor], tensors)


def _same_values(now: Manifest, before: Manifest) -> bool:
    """Whether all stored tensors are what they were. A single file has no placeholders, and may have stored a tied
    tensor under another of its names."""
    standing_in = placeholders(now.layers)
    stored = {name: crc32 for name, crc32 in now.crc32.items() if name not in standing_in}
    return stored == {name: before.crc32.get(before.aliases.get(name, name)) for name in stored}


def _name_blocks_(model: nn.Module) -> None:
    """A feed-forward block is named for its first layer, whose name is another one under another class."""
    for name, layer in pad_layers(model).items():
        if isinstance(layer, PadLinearMember) and layer.place is Place.FIRST:
            for member in layer.block.members:
                member.group = name


def _keep_routers_(model: nn.Module) -> None:
    """Routers are fp32 whatever the weights are; `model.half()` does not know that."""
    for layer in pad_layers(model).values():
        for module in layer.children():
            module.float()
