"""Which layers a module holds: one `Found` a layer object, with all its names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from padconvert.words import Kind

# In this order: a lazy or parametrised layer is an instance of its parent class too.
KINDS: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.ConvTranspose1d, Kind.CONV_TRANSPOSE),
    (nn.ConvTranspose2d, Kind.CONV_TRANSPOSE),
    (nn.ConvTranspose3d, Kind.CONV_TRANSPOSE),
    (nn.Conv1d, Kind.CONV1D),
    (nn.Conv2d, Kind.CONV2D),
    (nn.Conv3d, Kind.CONV3D),
    (nn.Linear, Kind.LINEAR),
)
CONVOLUTIONS = frozenset({Kind.CONV1D, Kind.CONV2D, Kind.CONV3D})


@dataclass(frozen=True, slots=True)
class Found:
    """One layer of the module tree.

    `base` is the class that it is an instance of, torch's or transformers' `Conv1D`; a Pad layer's is None.
    `weight_shape` is [out, in, ...] also where the layer stores [in, out].
    """

    module: nn.Module
    names: tuple[str, ...]
    kind: Kind
    base: type[nn.Module] | None
    weight_shape: tuple[int, ...]  # () where a lazy layer does not know it yet

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def groups(self) -> int:
        return int(getattr(self.module, "groups", 1))


def is_pad_layer(module: nn.Module) -> bool:
    """Whether padconvert made it. By name: the walk comes before the layers and knows only torch's own."""
    kind = type(module)
    return kind.__module__.startswith("padconvert.layers") and kind.__name__.startswith(("PadConv", "PadLinear"))


def conv1d_base(module: nn.Module) -> type[nn.Module] | None:
    """transformers' `Conv1D` (a linear layer that stores its weight as [in, out]) among a module's classes.

    By name: the walk never imports transformers. A forward that somebody patched into the class is not it.
    """
    for kind in type(module).__mro__:
        if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
            forward = kind.__dict__.get("forward")
            home = (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", ""))
            return kind if home == (kind.__module__, "Conv1D.forward") else None
    return None


def find_layers(module: nn.Module) -> list[Found]:
    """Every convolution and linear layer in module order, also the ones that cannot be converted.

    The insides of a Pad layer (its router's linears) are not listed.
    """
    names: dict[nn.Module, list[str]] = {}
    inside_pad: tuple[str, ...] = ()
    for name, child in module.named_modules(remove_duplicate=False):
        if name.startswith(inside_pad):
            continue
        if is_pad_layer(child):
            inside_pad = (*inside_pad, f"{name}." if name else "")
        names.setdefault(child, []).append(name)
        if not all(inside_pad):  # the module itself is a Pad layer
            break
    found = (_found(child, tuple(its_names)) for child, its_names in names.items())
    return [layer for layer in found if layer is not None]


def _found(module: nn.Module, names: tuple[str, ...]) -> Found | None:
    if is_pad_layer(module):
        return Found(module, names, Kind(module.kind), None, tuple(module.weight_shape))  # type: ignore[arg-type]
    for base, kind in KINDS:
        if isinstance(module, base):
            return Found(module, names, kind, base, _weight_shape(module))
    if (conv1d := conv1d_base(module)) is not None:
        return Found(module, names, Kind.LINEAR, conv1d, _weight_shape(module)[::-1])
    return None


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The weight's own shape, or from the attributes: reading a parametrised weight computes it, and may change it."""
    weight = module._parameters.get("weight")
    if weight is not None and not is_lazy(weight):
        return tuple(weight.shape)
    if conv1d_base(module) is not None:
        return (int(module.nx), int(module.nf))  # type: ignore[arg-type]
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (module.out_features, module.in_features)
    else:
        assert isinstance(module, nn.modules.conv._ConvNd)
        first, second = module.out_channels, module.in_channels
        if module.transposed:
            first, second = second, first
        shape = (first, second // module.groups, *module.kernel_size)
    return shape if all(shape) else ()
