"""Guesses at a model's inputs, likeliest first. `probe.find_probe` tries them; none is trusted untried."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from padconvert.walk.spec import InputSpec

Guess = tuple[tuple[InputSpec, ...], str]

TOKENS = 16
FRAMES = 16
# Sides of images and lengths of signals that networks are usually made for; the commonest first.
IMAGE_SIDES = (32, 64, 96, 224, 28, 48, 24, 12, 112, 128, 160, 299)
SIGNAL_LENGTHS = (256, 1024, 16000)
VIDEO_SHAPES = ((8, 32, 32), (16, 64, 64), (16, 112, 112))
LATENT_SIDES = (1, 4, 8)
UNKNOWN_VOCABULARY = 2  # ids 0 and 1 exist in every vocabulary


def float_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter or buffer; torch's default without one."""
    tensors = (tensor for group in (module.parameters(), module.buffers()) for tensor in group)
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())


def guesses(module: nn.Module) -> Iterator[Guess]:
    """The inputs that an exported program brings along; from a transformers config; else from the first layers."""
    known = getattr(module, "known_inputs", ())
    if isinstance(known, tuple) and known and all(isinstance(each, InputSpec) for each in known):
        yield known, "the inputs that the program was exported with"
    if hasattr(module, "config") and isinstance(getattr(module, "main_input_name", None), str):
        yield from _transformers_guesses(module)
    copies = _required_arguments(module)
    for inputs, origin in _layer_guesses(module):
        yield inputs * copies, origin + (f", for each of {copies} inputs" if copies > 1 else "")


def guesses_of_shape(module: nn.Module, shape: tuple[int, ...]) -> list[Guess]:
    """A given shape, batch first, as numbers and as token ids; ids come first where an embedding comes first."""
    where = f"the given input shape {','.join(map(str, shape))}"
    first = next(_first_layers(module), None)
    high = first.num_embeddings if isinstance(first, nn.Embedding) else UNKNOWN_VOCABULARY
    numbers: Guess = (_floats(module, shape[1:]), f"{where}, as numbers")
    ids: Guess = ((InputSpec(None, shape[1:], "int64", high),), f"{where}, as token ids below {high}")
    return [ids, numbers] if isinstance(first, nn.Embedding) else [numbers, ids]


def _required_arguments(module: nn.Module) -> int:
    """How many arguments a call must have (a Siamese network has two); at least 1."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    return max(1, len(needed))


def _floats(module: nn.Module, shape: tuple[int, ...], name: str | None = None) -> tuple[InputSpec, ...]:
    return (InputSpec(name, shape, str(float_dtype(module)).removeprefix("torch.")),)


# ---- any module: from its first layers -----------------------------------------------------------------------------


def _layer_guesses(module: nn.Module) -> Iterator[Guess]:
    """Inputs that suit the first layer of each kind, in module order."""
    sequences = any(isinstance(child, nn.MultiheadAttention | nn.RNNBase) for child in module.modules())
    for layer in _first_layers(module):
        shapes = _shapes_for(layer)
        for shape in reversed(shapes) if sequences else shapes:
            size = "x".join(map(str, shape))
            yield _floats(module, shape), f"assumed {size}, to suit the first {type(layer).__name__}"
        if isinstance(layer, nn.Embedding):
            high = min(e.num_embeddings for e in module.modules() if isinstance(e, nn.Embedding))
            for bound in dict.fromkeys((layer.num_embeddings, high)):
                ids = InputSpec(None, (TOKENS,), "int64", bound)
                yield (ids,), f"assumed {TOKENS} token ids below {bound}, to suit the first Embedding"


KINDS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Embedding,
    nn.RNNBase,
)


def _first_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The first layer of each kind, in module order."""
    seen: set[type[nn.Module]] = set()
    for child in module.modules():
        kind = next((kind for kind in KINDS if isinstance(child, kind)), None)
        if kind is not None and kind not in seen:
            seen.add(kind)
            yield child


def _shapes_for(layer: nn.Module) -> list[tuple[int, ...]]:
    """Input shapes, without the batch, that the layer takes."""
    match layer:
        case nn.Conv1d():
            return [(layer.in_channels, length) for length in SIGNAL_LENGTHS]
        case nn.Conv2d():
            return [(layer.in_channels, side, side) for side in IMAGE_SIDES]
        case nn.Conv3d():
            return [(layer.in_channels, *shape) for shape in VIDEO_SHAPES]
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            return [(layer.in_channels, *(side,) * len(layer.kernel_size)) for side in LATENT_SIDES]
        case nn.Linear():
            return [(layer.in_features,), (TOKENS, layer.in_features)]
        case nn.RNNBase():
            return [(TOKENS, layer.input_size)]
        case _:
            return []


# ---- transformers: from the config ---------------------------------------------------------------------------------


def _transformers_guesses(module: nn.Module) -> Iterator[Guess]:
    """Inputs by the names that transformers' models give them; masks are left to their defaults."""
    name = str(module.main_input_name)
    accepted = set(inspect.signature(module.forward).parameters)
    for inputs, what in _main_inputs(module, name):
        origin = f"the model's config: {what}"
        if name != "pixel_values" and "pixel_values" in accepted:  # image and text together
            for image, how in _image_inputs(module, "pixel_values"):
                yield (*inputs, *image), f"{origin} and {how}"
        if "decoder_input_ids" in accepted:
            decoder = _token_inputs(module, "decoder_input_ids")
            for ids, how in decoder:
                yield (*inputs, *ids), f"{origin} and {how}"
        yield inputs, origin


def _main_inputs(module: nn.Module, name: str) -> Iterator[Guess]:
    makers: dict[str, Callable[[nn.Module, str], Iterator[Guess]]] = {
        "input_ids": _token_inputs,
        "pixel_values": _image_inputs,
        "input_values": _signal_inputs,
        "input_features": _feature_inputs,
    }
    return makers[name](module, name) if name in makers else iter(())


def _setting(module: nn.Module, *names: str) -> Any:
    """The first of these settings that the config or one of its parts has."""
    config = module.config
    parts = [config, *(getattr(config, part, None) for part in ("text_config", "vision_config", "audio_config"))]
    found = (getattr(part, name, None) for part in parts if part is not None for name in names)
    return next((value for value in found if value is not None), None)


def _token_inputs(module: nn.Module, name: str) -> Iterator[Guess]:
    high = _setting(module, "vocab_size") or UNKNOWN_VOCABULARY
    for length in (TOKENS, 4):
        yield (InputSpec(name, (length,), "int64", int(high)),), f"{length} {name} below {high}"


def _image_inputs(module: nn.Module, name: str) -> Iterator[Guess]:
    channels = int(_setting(module, "num_channels", "in_channels", "in_chans") or 3)
    frames = _setting(module, "num_frames")
    stated = _setting(module, "image_size", "input_size")
    pair = tuple(stated) if isinstance(stated, list | tuple) else (stated, stated)
    sides = [pair] if stated else []
    for height, width in dict.fromkeys([*sides, *((side, side) for side in IMAGE_SIDES[:4])]):
        for lead in ((int(frames),), ()) if frames else ((),):
            shape = (*lead, channels, int(height), int(width))
            yield _floats(module, shape, name), f"{name} of {'x'.join(map(str, shape))}"


def _signal_inputs(module: nn.Module, name: str) -> Iterator[Guess]:
    bins = _setting(module, "num_mel_bins")
    spectra = [(int(_setting(module, "max_length") or TOKENS), int(bins))] if bins else []
    for shape in [*spectra, *((length,) for length in (1024, 16000))]:
        yield _floats(module, shape, name), f"{name} of {'x'.join(map(str, shape))}"


def _feature_inputs(module: nn.Module, name: str) -> Iterator[Guess]:
    bins = int(_setting(module, "num_mel_bins", "feature_size", "input_feat_per_channel") or 80)
    positions = _setting(module, "max_source_positions")
    shapes = [(bins, 2 * int(positions))] if positions else []
    for shape in [*shapes, (FRAMES, bins), (128, bins)]:
        yield _floats(module, shape, name), f"{name} of {'x'.join(map(str, shape))}"
