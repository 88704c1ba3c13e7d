"""Small manifests with tensors that fit them, for the checkpoint tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from padconvert.checkpoint.layout import expected_tensors
from padconvert.checkpoint.manifest import LayerEntry, Manifest, Provenance
from padconvert.layers.facts import LayerFacts
from padconvert.layers.packed import pack_bits
from padconvert.words import Granularity, Kind, Place, Routing

SPATIAL = {Kind.CONV1D: 1, Kind.CONV2D: 2, Kind.CONV3D: 3, Kind.LINEAR: 0}
PROVENANCE = Provenance("ab" * 32, "pickle", {"torch": "2", "padconvert": "0", "python": "3"}, "cpu", 1, 0, "trained")


def facts(kind: Kind = Kind.CONV2D, granularity: Granularity = Granularity.ELEMENT, **changed: Any) -> LayerFacts:
    """A layer with 3 filters; 10 entries (or 1 filter) of its weight and 1 of its bias are dynamic."""
    spatial = SPATIAL[kind]
    values: dict[str, Any] = {
        "num_experts": 4,
        "weight_shape": (3, 5, *(3,) * spatial),
        "dtype": "float32",
        "has_bias": True,
        "n_dynamic": 10 if granularity is Granularity.ELEMENT else 1,
        "n_bias_dynamic": 1,
        "router": "linear",
        "routing": Routing.MAP if spatial else Routing.TOKEN,
        "stride": (1,) * spatial,
        "padding": (1,) * spatial,
        "dilation": (1,) * spatial,
    }
    return LayerFacts(kind, granularity, **(values | changed))


def entry(name: str = "body.conv", layer: LayerFacts | None = None, *, equal: bool = False) -> LayerEntry:
    return LayerEntry(name, (), equal, layer or facts())


def manifest(*layers: LayerEntry, **changed: Any) -> Manifest:
    values: dict[str, Any] = {"architecture": {"kind": "none"}, "policy": {"version": 1}, "trained": True}
    return Manifest(padconvert="0.1.0", layers=layers, provenance=PROVENANCE, **(values | changed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random bits (or truth values), so NaN and denormals are among them."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    size = math.prod(shape) * torch_dtype.itemsize
    top = 2 if dtype == "bool" else 256
    bits = torch.randint(0, top, (size,), dtype=torch.uint8, generator=seeded(seed))
    return bits.view(torch_dtype).reshape(shape)


def tensors_of(layer: LayerEntry, seed: int = 0) -> dict[str, Tensor]:
    """A tensor for every expected one, with bitmasks and indices of the counts that the facts name."""
    made = {name: random_tensor(*spec, seed + n) for n, (name, spec) in enumerate(expected_tensors(layer).items())}
    prefix = f"{layer.name}." if layer.name else ""
    numel, rows = math.prod(layer.facts.weight_shape), layer.facts.weight_shape[0]
    # of a block's hidden units only the first layer, whose rows they are, says which are dynamic
    weight = _choose(numel if layer.facts.granularity is Granularity.ELEMENT else rows, layer.facts.n_dynamic, seed)
    placed = {
        "dynamic_bitmask": pack_bits(weight),
        "bias_dynamic_bitmask": pack_bits(_choose(rows, layer.facts.n_bias_dynamic, seed)),
        "dynamic_index": weight.nonzero()[:, 0].int(),
    }
    return made | {prefix + name: value for name, value in placed.items() if prefix + name in made}


def _choose(total: int, n: int, seed: int) -> Tensor:
    order = torch.randperm(total, generator=seeded(seed))
    return torch.zeros(total, dtype=torch.bool).index_fill(0, order[:n], True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


@st.composite
def layer_facts(draw: st.DrawFn) -> LayerFacts:
    kind = draw(st.sampled_from(list(SPATIAL)))
    granularity = draw(st.sampled_from([Granularity.ELEMENT, Granularity.CHANNEL]))
    spatial = SPATIAL[kind]
    groups = draw(st.sampled_from([1, 2])) if spatial else 1
    rows = groups * draw(st.integers(1, 4))
    shape = (rows, draw(st.integers(1, 5)), *(draw(st.integers(1, 3)) for _ in range(spatial)))
    units = math.prod(shape) if granularity is Granularity.ELEMENT else rows
    n_dynamic, has_bias = draw(st.integers(0, units)), draw(st.booleans())
    n_bias = draw(st.integers(0, rows)) if granularity is Granularity.ELEMENT else n_dynamic
    return facts(
        kind,
        granularity,
        weight_shape=shape,
        groups=groups,
        num_experts=draw(st.integers(2, 5)),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"])),
        has_bias=has_bias,
        n_dynamic=n_dynamic,
        n_bias_dynamic=n_bias if has_bias else 0,
        router=draw(st.sampled_from(["linear", "mlp"])),
    )


def block(
    name: str = "up",
    granularity: Granularity = Granularity.ELEMENT,
    *,
    d: int = 3,
    h: int = 5,
    gated: bool = False,
    n_dynamic: int = 2,
    equal: bool = False,
    **changed: Any,
) -> list[LayerEntry]:
    """The layers of a feed-forward block d → h → d that is converted as a whole; `n_dynamic` units of each."""
    shapes = {name: (Place.FIRST, (h, d)), "gate": (Place.PEER, (h, d)), "down": (Place.LAST, (d, h))}
    places = {key: value for key, value in shapes.items() if gated or key != "gate"}
    made = []
    for key, (place, shape) in places.items():
        by_column = granularity is Granularity.NEURON and place is Place.LAST
        values = {"weight_shape": shape, "n_dynamic": n_dynamic, "n_bias_dynamic": 0 if by_column else n_dynamic}
        layer = facts(Kind.LINEAR, granularity, **({"top_k": 2, "group": name, "place": place} | values | changed))
        made.append(entry(key, layer, equal=equal))
    return made


@st.composite
def blocks(draw: st.DrawFn) -> list[LayerEntry]:
    d, h = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    granularity = draw(st.sampled_from(list(Granularity)))
    most = {Granularity.ELEMENT: min(d, h), Granularity.CHANNEL: min(d, h), Granularity.NEURON: h}[granularity]
    return block(
        granularity=granularity,
        d=d,
        h=h,
        gated=draw(st.booleans()),
        n_dynamic=draw(st.integers(0, most)),
        equal=draw(st.booleans()),
        top_k=draw(st.integers(1, 4)),
        transposed=draw(st.booleans()),
    )


#: names with the traps of JSON and Unicode in them
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]
INTEGERS = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
STORABLE = [*INTEGERS, *FLOAT8, "float16", "bfloat16", "float32", "float64", "complex64"]
specs = st.dictionaries(names, st.tuples(st.sampled_from(STORABLE), shapes), max_size=6)
