"""Plain attributes of torch's layers against their tensors and against what any network has.

A pickle states a layer's sizes beside its weight, and the two may contradict one another: torch would not notice before
a forward, and whoever makes inputs by the stated sizes would allocate them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from padconvert.errors import FileError, printable
from padconvert.layers.facts import MOST_DILATION, MOST_STEPS, SPARE_PADDING

# Beyond any network's.
_SIDE = 1_024
_SCALE = 64
_COUNT = 2**40
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _Fault(Exception):
    """The attribute's name and why it cannot be."""


def check_attributes(root: nn.Module, where: str) -> None:
    """Raises FileError, naming the layer, where a layer of torch's states sizes that its tensors contradict or that no
    network has."""
    for name, module in root.named_modules():
        for kind, check in _CHECKS:
            if isinstance(module, kind):
                try:
                    check(module)
                except _Fault as fault:
                    layer = f"layer '{printable(name)}'" if name else "its layer"
                    raise FileError(
                        f"{where}: {layer} is a {type(module).__name__} whose {fault}. The file is damaged; save the "
                        "model again."
                    ) from None


def _stated(module: nn.Module, key: str) -> Any:
    try:
        return getattr(module, key)
    except AttributeError:
        raise _Fault(f"{key} is absent") from None


def _is_count(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _count(module: nn.Module, key: str, low: int = 0, high: int = _COUNT) -> int:
    value = _stated(module, key)
    if not _is_count(value, low, high):
        raise _Fault(f"{key} is {_shown(value)}, which no network has")
    return int(value)


def _counts(module: nn.Module, key: str, dimensions: int, low: int, high: int) -> tuple[int, ...]:
    value = _stated(module, key)
    plain = isinstance(value, tuple) and len(value) == dimensions and all(_is_count(each, low, high) for each in value)
    if not plain:
        raise _Fault(f"{key} is {_shown(value)}, which no network has")
    return tuple(value)


def _shown(value: object) -> str:
    """A plain value as it is; of anything else only its class, for how it prints itself is the file's to say."""
    inside = value if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(each, int | float | str | None) for each in inside):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _weight(module: nn.Module, dimensions: int) -> tuple[int, ...] | None:
    """The shape of its weight, where it has one of its own: not pruned, parametrised or lazy, and of torch's class, for
    a subclass may keep its weight otherwise."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not type(module).__module__.startswith("torch.nn."):
        return None
    if weight.dim() != dimensions:
        raise _Fault(f"weight has {weight.dim()} dimensions, not {dimensions}")
    return tuple(weight.shape)


def _agree(stated: dict[str, int], shape: tuple[int, ...] | None) -> None:
    for (key, value), size in zip(stated.items(), shape or stated.values(), strict=False):
        if value != size:
            raise _Fault(f"{key} is {value}, but its weight is {list(shape or ())}")


def _convolution(module: nn.Module) -> None:
    kernel = _stated(module, "kernel_size")
    size = len(kernel) if isinstance(kernel, tuple) and len(kernel) in MOST_DILATION else 0
    kernel = _counts(module, "kernel_size", size, 1, MOST_STEPS)
    groups = _count(module, "groups", 1)
    inputs, outputs = _count(module, "in_channels", 1), _count(module, "out_channels", 1)
    if inputs % groups or outputs % groups:
        raise _Fault(f"groups is {groups}, which divides {inputs} and {outputs} channels not at all")
    _counts(module, "stride", size, 1, MOST_STEPS)
    dilation = _counts(module, "dilation", size, 1, MOST_DILATION[size])
    if _stated(module, "padding_mode") not in _PADDING_MODES:
        raise _Fault(f"padding_mode is {_shown(_stated(module, 'padding_mode'))}, which torch does not know")
    spans = [step * (width - 1) for step, width in zip(dilation, kernel, strict=True)]
    _padding(module, spans)
    shape = _weight(module, size + 2)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    names = ("in_channels", "out_channels") if transposed else ("out_channels", "in_channels")
    if shape is not None:
        whole = (shape[0], shape[1] * groups)
        if whole != (first, second):
            wrong = 0 if whole[0] != first else 1
            raise _Fault(f"{names[wrong]} is {(first, second)[wrong]}, but its weight is {list(shape)}")
        if shape[2:] != kernel:
            raise _Fault(f"kernel_size is {kernel}, but its weight is {list(shape)}")
    _bias(module, outputs)


def _padding(module: nn.Module, spans: list[int]) -> None:
    stated = _stated(module, "padding")
    if isinstance(stated, str):
        if stated not in ("same", "valid"):
            raise _Fault(f"padding is {_shown(stated)}, which torch does not know")
        sides = [(span // 2, span - span // 2) if stated == "same" else (0, 0) for span in spans]
    else:
        padding = _counts(module, "padding", len(spans), 0, _COUNT)
        for each, span in zip(padding, spans, strict=True):
            if each > span + SPARE_PADDING:
                raise _Fault(f"padding is {_shown(stated)}, which reaches far past its kernel")
        sides = [(each, each) for each in padding]
    # what torch computes with in every mode but zeros
    twice = getattr(module, "_reversed_padding_repeated_twice", None)
    wanted = [side for pair in reversed(sides) for side in pair]
    if twice is not None and (not isinstance(twice, tuple | list) or list(twice) != wanted):
        raise _Fault(f"padding is {_shown(stated)}, but it would be padded by {_shown(twice)}")


def _bias(module: nn.Module, outputs: int) -> None:
    bias = module._parameters.get("bias")
    if bias is not None and type(module).__module__.startswith("torch.nn.") and tuple(bias.shape) != (outputs,):
        raise _Fault(f"bias is {list(bias.shape)}, not [{outputs}]")


def _linear(module: nn.Module) -> None:
    stated = {key: _count(module, key) for key in ("out_features", "in_features")}
    _agree(stated, _weight(module, 2))
    _bias(module, stated["out_features"])


def _embedding(module: nn.Module) -> None:
    _agree({key: _count(module, key) for key in ("num_embeddings", "embedding_dim")}, _weight(module, 2))


def _batch_norm(module: nn.Module) -> None:
    features = _count(module, "num_features")
    _agree({"num_features": features}, _weight(module, 1))
    for key in ("running_mean", "running_var"):
        buffer = module._buffers.get(key)
        if isinstance(buffer, Tensor) and tuple(buffer.shape) != (features,):
            raise _Fault(f"num_features is {features}, but its {key} is {list(buffer.shape)}")


def _group_norm(module: nn.Module) -> None:
    groups, channels = _count(module, "num_groups", 1), _count(module, "num_channels", 1)
    if channels % groups:
        raise _Fault(f"num_groups is {groups}, which does not divide {channels} channels")
    _agree({"num_channels": channels}, _weight(module, 1))


def _layer_norm(module: nn.Module) -> None:
    shape = _stated(module, "normalized_shape")
    if not isinstance(shape, tuple) or not all(_is_count(each, 1, _COUNT) for each in shape):
        raise _Fault(f"normalized_shape is {_shown(shape)}, which no network has")
    found = _weight(module, len(shape))
    if found is not None and found != tuple(shape):
        raise _Fault(f"normalized_shape is {_shown(shape)}, but its weight is {list(found)}")


def _recurrent(module: nn.Module) -> None:
    for key in ("input_size", "hidden_size", "num_layers"):
        _count(module, key, 1)
    first = module._parameters.get("weight_ih_l0")
    if isinstance(first, Tensor) and first.dim() == 2 and first.shape[1] != module.input_size:
        raise _Fault(f"input_size is {module.input_size}, but its weight is {list(first.shape)}")


def _sides(key: str, high: int) -> Callable[[nn.Module], None]:
    """Sizes of an output that nothing in the file is as large as."""

    def check(module: nn.Module) -> None:
        value = getattr(module, key, None)
        for each in value if isinstance(value, tuple | list) else (value,):
            if each is not None and (type(each) not in (int, float) or not abs(each) <= high):
                raise _Fault(f"{key} is {_shown(value)}, which no network has")

    return check


class _Check(NamedTuple):
    kind: type[nn.Module] | tuple[type[nn.Module], ...]
    check: Callable[[nn.Module], None]


_CHECKS = (
    _Check(nn.modules.conv._ConvNd, _convolution),
    _Check(nn.Linear, _linear),
    _Check((nn.Embedding, nn.EmbeddingBag), _embedding),
    _Check(nn.modules.batchnorm._NormBase, _batch_norm),
    _Check(nn.GroupNorm, _group_norm),
    _Check((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    _Check(nn.RNNBase, _recurrent),
    _Check(nn.modules.pooling._AdaptiveAvgPoolNd, _sides("output_size", _SIDE)),
    _Check(nn.modules.pooling._AdaptiveMaxPoolNd, _sides("output_size", _SIDE)),
    _Check(nn.Upsample, _sides("scale_factor", _SCALE)),
    _Check(nn.Upsample, _sides("size", 8 * _SIDE)),
    _Check((nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
            nn.modules.padding._ReplicationPadNd), _sides("padding", _SIDE)),
)  # fmt: skip
