"""One watched forward: who is called, in which order, on what shapes, and which layers make the output.

The watcher hangs on torch's global module hooks and a dispatch mode, never on the model: hooks on the model itself
would switch off the fast paths of torch's transformer layers, and so hide that they bypass their children.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from padconvert.walk.causal import Calls, Sequences
from padconvert.walk.found import Found
from padconvert.walk.probe import call, flat_outputs
from padconvert.walk.quiet import device_of, untouched
from padconvert.walk.spec import ProbeSpec
from padconvert.walk.ties import span_of
from padconvert.walk.trace import Chain, Memory, Trace
from padconvert.words import Kind

OUTSIDE = -1  # stands for every weight that no listed layer owns

Origins = frozenset[int]  # which layers a tensor was made by, without another layer in between
NONE: Origins = frozenset()


@dataclass(slots=True)
class Seen:
    """What was seen of one layer. Shapes are of its first call, without the batch."""

    order: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    calls: int = 0
    positions: int = 0  # in all calls and samples: output positions, tokens; input positions when transposed
    by_sample: bool = True  # in all calls: [batch, …] with the network's own positions


@dataclass(frozen=True, slots=True)
class Watched:
    """One forward, by index into the list of layers."""

    seen: Mapping[int, Seen]
    read: frozenset[int]  # layers whose weight something else computed with
    heads: frozenset[int]  # layers that make an output, with no layer after them
    chains: tuple[Chain, ...]  # what became of the outputs of layers that widen
    sequences: Calls  # what went into layers on sequences
    samples: int  # how many it was called on
    outputs: tuple[Tensor, ...]  # the floating-point ones

    def macs(self, index: int, weight_numel: int) -> int:
        """Multiply-adds per sample."""
        return math.ceil(self.seen[index].positions * weight_numel / self.samples)


def watch(root: nn.Module, layers: Sequence[Found], probe: ProbeSpec, samples: int) -> Watched:
    """Call `root` once in eval mode on `samples` samples of the probe and say what happened. Raises whatever the
    forward raises."""
    watcher = _Watcher(root, layers, Sequences(layers, probe), samples)
    args, kwargs = probe.make(samples, device_of(root))
    with untouched(root), ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(watcher.enter).remove)
        # Without `always_call` a raising layer would stay on the stack; nobody reads it then.
        stack.callback(register_module_forward_hook(watcher.leave, with_kwargs=True).remove)
        with watcher:
            output = call(root, args, kwargs)
        outputs = flat_outputs(output)
        # Before the model is put back as it was: what it keeps of the call is still on it.
        chains = watcher.trace.finish(_storage(tensor) for tensor in (*_tensors(output), *outputs))
    heads, sequences = watcher.heads(outputs), watcher.sequences.calls
    return Watched(watcher.seen, frozenset(watcher.read), heads, chains, sequences, samples, tuple(outputs))


class _Watcher(TorchDispatchMode):
    """Follows the data between the layers: `origins` maps a storage to the layers that its values come from."""

    def __init__(self, root: nn.Module, layers: Sequence[Found], sequences: Sequences, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers, self.sequences, self.samples = layers, sequences, samples
        self.masked = "attention_mask" in inspect.signature(root.forward).parameters
        self.index = {layer.module: i for i, layer in enumerate(layers)}
        self.owner = _weight_owners(root, layers)
        self.seen: dict[int, Seen] = {}
        self.read: set[int] = set()
        self.followed: set[int] = {OUTSIDE}  # layers with another layer after them
        self.origins: dict[int, Origins] = {}
        self.inside: list[int] = []
        self.trace = Trace(layers)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper would import the compiler: 1.4 s

    def enter(self, module: nn.Module, _args: Any) -> None:
        if module in self.index:
            self.inside.append(self.index[module])

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module not in self.index:
            return
        inputs, made = _memories([args, kwargs]), _memories(output)
        if inputs and isinstance(output, Tensor):
            self._called(self.index[module], inputs, made)
        self.inside.pop()

    def _called(self, index: int, inputs: list[Memory], made: list[Memory]) -> None:
        """What is computed in here counts as inside the layer."""
        given, origins = inputs[0][0], self._of(inputs)
        self._count(index, given, made[0][0])
        self.sequences.keep(index, given)
        self.followed |= origins - {index}
        self.trace.layer(index, inputs, made[0], origins)
        self._set(made, frozenset({index}))

    def _count(self, index: int, given: Tensor, output: Tensor) -> None:
        layer = self.layers[index]
        if index not in self.seen:
            shapes = (_without_batch(given, layer), _without_batch(output, layer))
            self.seen[index] = Seen(len(self.seen), *shapes)
        seen = self.seen[index]
        seen.calls += 1
        seen.by_sample &= self._is_by_sample(given)
        seen.positions += _positions(given if layer.kind is Kind.CONV_TRANSPOSE else output, layer)

    def _is_by_sample(self, given: Tensor) -> bool:
        """Samples first, and where a mask says which positions count, those positions second."""
        if len(given) != self.samples:
            return False
        return not self.masked or given.dim() != 3 or given.shape[1] in self.sequences.lengths

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.inside:
            inputs, outputs = _memories([args, kwargs or {}]), _memories(output)
            self._follow(inputs, outputs)
            self.trace.operation(func, inputs, outputs)
        return output

    def _follow(self, inputs: list[Memory], outputs: list[Memory]) -> None:
        """An operation between layers hands on its inputs' origins, unless it computes with a weight itself."""
        owners = {owner for _, memory in inputs if (owner := self.owner.get(memory)) is not None}
        origins = self._of(inputs)
        self.read |= owners - {OUTSIDE}
        if owners:
            self.followed |= origins
            origins = frozenset({OUTSIDE})
        self._set(outputs, origins)

    def _of(self, tensors: Iterable[Memory]) -> Origins:
        return NONE.union(*(self.origins.get(memory, NONE) for _, memory in tensors))

    def _set(self, tensors: Iterable[Memory], origins: Origins) -> None:
        for _, memory in tensors:
            if memory not in self.owner:  # a view of a weight stays that weight
                self.origins[memory] = origins

    def heads(self, outputs: Iterable[Tensor]) -> frozenset[int]:
        """Layers of outputs that come from layers without a follower only.

        The last block of a network without a head adds its layer to earlier ones (a residual): no head there.
        """
        origins = [self.origins.get(_storage(tensor), NONE) for tensor in outputs]
        return NONE.union(*(each for each in origins if not each & self.followed))


def _weight_owners(root: nn.Module, layers: Sequence[Found]) -> dict[int, int]:
    """Storage → layer index, of all matrices and kernels; `OUTSIDE` for those of other modules.

    A storage that several modules use (a tie, a flat buffer) says nothing about who reads what: `OUTSIDE` too.
    """
    index = {layer.module: i for i, layer in enumerate(layers)}
    owners: dict[int, int] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            if span_of(parameter) is None or parameter is None or parameter.dim() < 2:
                continue
            storage = _storage(parameter)
            owners[storage] = OUTSIDE if storage in owners else index.get(module, OUTSIDE)
    return owners


def _storage(tensor: Tensor) -> int:
    """A number for the memory that a tensor and its views stand on."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and wrapper tensors
        return -id(tensor)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memories(tree: Any) -> list[Memory]:
    return [(tensor, _storage(tensor)) for tensor in _tensors(tree)]


def _channel_axis(layer: Found) -> int:
    return -1 if layer.kind is Kind.LINEAR else -(len(layer.weight_shape) - 1)


def _positions(tensor: Tensor, layer: Found) -> int:
    """Tokens, or places of a feature map, over all samples."""
    return tensor.numel() // max(1, tensor.shape[_channel_axis(layer)])


def _without_batch(tensor: Tensor, layer: Found) -> tuple[int, ...]:
    """The shape of one sample; a layer may also be called on one sample without a batch dimension."""
    unbatched = 1 if layer.kind is Kind.LINEAR else len(layer.weight_shape) - 1
    return tuple(tensor.shape) if tensor.dim() == unbatched else tuple(tensor.shape[1:])
