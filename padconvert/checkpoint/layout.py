"""Which tensors a checkpoint holds: names, dtypes and shapes out of the manifest, held against the header.

Nothing here needs a tensor's values, so a file is refused before anything is allocated. The format's table is
`expected_tensors`; the writer checks itself against it too, so the two directions cannot drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from padconvert.checkpoint.header import Header, quote
from padconvert.checkpoint.manifest import LayerEntry, Manifest
from padconvert.errors import FileError
from padconvert.layers.facts import LayerFacts, beyond_networks
from padconvert.words import Granularity, Kind, Place, Routing

Spec = tuple[str, tuple[int, ...]]

_RANK = {Kind.CONV1D: 3, Kind.CONV2D: 4, Kind.CONV3D: 5, Kind.LINEAR: 2}
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def join(prefix: str, name: str) -> str:
    """A dotted name; the root module's own is empty."""
    return f"{prefix}.{name}" if prefix else name


def channels(facts: LayerFacts) -> int:
    """How many input channels (or features) the layer's router sees."""
    return facts.weight_shape[1] * facts.groups


def expected_tensors(entry: LayerEntry) -> dict[str, Spec]:
    """Full name → (dtype, shape) of every tensor that this layer has in a checkpoint. Parts without units are absent.

    Raises FileError where the facts contradict themselves, or name a router that is not there.
    """
    facts = entry.facts
    check_facts(entry)
    parts = _part("weight", entry, facts.weight_shape, facts.n_dynamic)
    if facts.has_bias:
        parts |= _part("bias", entry, facts.weight_shape[:1], facts.n_bias_dynamic)
    parts |= _where_dynamic(facts)
    router = _router_shapes(facts)
    if facts.has_router:
        parts |= {f"router.{name}": ("float32", shape) for name, shape in router.items()}
    return {join(entry.name, name): spec for name, spec in parts.items()}


def _part(part: str, entry: LayerEntry, shape: tuple[int, ...], n_dynamic: int) -> dict[str, Spec]:
    """The static and the dynamic units of one tensor: entries in a row, whole rows, or whole columns."""
    facts = entry.facts
    if facts.granularity is Granularity.ELEMENT:
        shape = (math.prod(shape),)
    dim = facts.unit_dim if part == "weight" else 0
    before, units, after = shape[:dim], shape[dim], shape[dim + 1 :]
    specs: dict[str, Spec] = {}
    if n_dynamic < units:
        specs[f"{part}_static"] = (facts.dtype, (*before, units - n_dynamic, *after))
    if n_dynamic:
        specs[f"{part}_dynamic"] = (facts.dtype, (entry.stored_experts, *before, n_dynamic, *after))
    return specs


def _where_dynamic(facts: LayerFacts) -> dict[str, Spec]:
    """Bitmasks or the index, where there are both static and dynamic units to tell apart. Hidden units of a block are
    listed once, under its first layer."""
    rows, numel = facts.weight_shape[0], math.prod(facts.weight_shape)
    specs: dict[str, Spec] = {}
    if facts.granularity is not Granularity.ELEMENT:
        listed = facts.granularity is Granularity.CHANNEL or facts.place is Place.FIRST
        if listed and 0 < facts.n_dynamic < rows:
            specs["dynamic_index"] = ("int32", (facts.n_dynamic,))
        return specs
    if 0 < facts.n_dynamic < numel:
        specs["dynamic_bitmask"] = ("uint8", (-(-numel // 8),))
    if facts.has_bias and 0 < facts.n_bias_dynamic < rows:
        specs["bias_dynamic_bitmask"] = ("uint8", (-(-rows // 8),))
    return specs


def _router_shapes(facts: LayerFacts) -> dict[str, tuple[int, ...]]:
    # a router's name becomes a module's name: nothing but a plain word may get that far
    if not (facts.router.isascii() and facts.router.isidentifier()):
        raise FileError(f"{quote(facts.router)} is no router's name.")
    from padconvert.layers.routers import tensor_shapes

    try:
        return tensor_shapes(facts.router, channels(facts), facts.num_experts)
    except (ImportError, AttributeError):
        raise FileError(f"no router {quote(facts.router)} here; is a newer padconvert needed?") from None


def check_facts(entry: LayerEntry) -> None:
    """Raises FileError where the facts of a layer cannot be true together."""
    faults = chain(_faults(entry.facts), _block_faults(entry), _choice_faults(entry.facts))
    if fault := next(faults, None):
        raise FileError(f"layer {quote(entry.name)}: {fault}.")


def _faults(facts: LayerFacts) -> Iterator[str]:
    shape, spatial = facts.weight_shape, max(len(facts.weight_shape) - 2, 0)
    if facts.kind not in _RANK or len(shape) != _RANK[facts.kind] or not all(0 < n < 2**63 for n in shape):
        yield f"a weight of shape {list(shape)[:8]} is none of a {facts.kind}"
        return
    if facts.dtype not in _DTYPES:
        yield f"dtype {quote(facts.dtype)} is none of {', '.join(_DTYPES)}"
    if facts.num_experts < 2:
        yield f"{facts.num_experts} experts; 2 are the fewest"
    if facts.groups < 1 or shape[0] % facts.groups or (facts.groups > 1 and not spatial):
        yield f"{facts.groups} groups do not divide {shape[0]} filters"
    units = math.prod(shape) if facts.granularity is Granularity.ELEMENT else shape[facts.unit_dim]
    if not 0 <= facts.n_dynamic <= units:
        yield f"{facts.n_dynamic} dynamic units out of {units}"
    yield from _bias_faults(facts)
    if (facts.routing is Routing.MAP) != (facts.kind is not Kind.LINEAR):
        yield f"a {facts.kind} layer is not routed by {facts.routing}"
    if facts.padding_mode not in _PADDING_MODES:
        yield f"padding mode {quote(facts.padding_mode)} is none of {', '.join(_PADDING_MODES)}"
    for name in ("stride", "padding", "dilation"):
        value, least = getattr(facts, name), 0 if name == "padding" else 1
        if isinstance(value, str) and value in ("same", "valid") and spatial:
            continue
        if isinstance(value, str) or len(value) != spatial or min(value, default=least) < least:
            yield f"{name} {value!r:.60} is none of a {facts.kind}"
            return
    beyond = beyond_networks(facts.weight_shape[2:], facts.stride, facts.padding, facts.dilation)
    if beyond:
        yield beyond


def _bias_faults(facts: LayerFacts) -> Iterator[str]:
    rows = facts.weight_shape[0]
    if not facts.has_bias and facts.n_bias_dynamic:
        yield f"{facts.n_bias_dynamic} dynamic bias entries without a bias"
    elif not 0 <= facts.n_bias_dynamic <= rows:
        yield f"{facts.n_bias_dynamic} dynamic bias entries out of {rows}"
    elif facts.unit_dim and facts.n_bias_dynamic:
        yield f"{facts.n_bias_dynamic} dynamic bias entries where units are columns"
    elif not facts.has_bias or facts.unit_dim or facts.granularity is Granularity.ELEMENT:
        return
    elif facts.n_bias_dynamic != facts.n_dynamic:
        yield f"{facts.n_bias_dynamic} dynamic bias entries for {facts.n_dynamic} dynamic filters"


def _block_faults(entry: LayerEntry) -> Iterator[str]:
    """What is wrong with a layer's place in a feed-forward block; `check_blocks` looks at the block."""
    facts = entry.facts
    if (facts.place is Place.ALONE) != (facts.group == ""):
        yield f"place {facts.place} in the block {quote(facts.group)}"
    if (facts.place is Place.FIRST) != (facts.group == entry.name and facts.group != ""):
        yield f"place {facts.place} in a block that is named {quote(facts.group)} for its first layer"
    if facts.place is not Place.ALONE and facts.kind is not Kind.LINEAR:
        yield f"a {facts.kind} layer is in no feed-forward block"
    if facts.place is Place.ALONE and facts.granularity is Granularity.NEURON:
        yield "hidden units are those of a feed-forward block, and it is in none"
    if facts.transposed and facts.kind is not Kind.LINEAR:
        yield f"a {facts.kind} layer is not transposed"


def _choice_faults(facts: LayerFacts) -> Iterator[str]:
    """What is wrong with how many experts are computed."""
    if not 0 <= facts.top_k <= facts.num_experts:
        yield f"top-k {facts.top_k} of {facts.num_experts} experts"
    if facts.top_k and facts.kind is not Kind.LINEAR:
        yield f"top-k {facts.top_k}, but a {facts.kind} layer mixes all experts"
    if facts.place is not Place.ALONE and not facts.top_k and facts.routing is not Routing.SEQUENCE:
        yield f"a feed-forward block that is routed by {facts.routing} does not mix all experts"


def check_blocks(layers: Iterable[LayerEntry]) -> None:
    """Raises FileError where the layers of a feed-forward block do not make one."""
    blocks: dict[str, list[LayerFacts]] = {}
    for entry in layers:
        if entry.facts.group:
            blocks.setdefault(entry.facts.group, []).append(entry.facts)
    for name, members in blocks.items():
        if fault := _block_fault(members):
            raise FileError(f"the feed-forward block {quote(name)}: {fault}.")


def _block_fault(members: Sequence[LayerFacts]) -> str | None:
    places = [facts.place for facts in members]
    for place, most in ((Place.FIRST, 1), (Place.LAST, 1), (Place.PEER, 1)):
        found = places.count(place)
        if found > most or (found == 0 and place is not Place.PEER):
            return f"{found} layers have the place {place}"
    ups = {facts.weight_shape for facts in members if facts.place is not Place.LAST}
    (down,) = (facts.weight_shape for facts in members if facts.place is Place.LAST)
    if ups != {down[::-1]}:
        shapes = ", ".join(str(list(shape)) for shape in (*sorted(ups), down))
        return f"weights of shapes {shapes} are no block's"
    for name in ("num_experts", "top_k", "granularity", "routing", "router"):
        if len(found_values := {getattr(facts, name) for facts in members}) > 1:
            return f"its layers differ in {name}: {', '.join(sorted(map(str, found_values)))}"
    counts = {facts.n_dynamic for facts in members}
    if members[0].granularity is Granularity.NEURON and len(counts) > 1:
        return f"its layers differ in how many hidden units are dynamic: {', '.join(map(str, sorted(counts)))}"
    return None


def check_layout(manifest: Manifest, header: Header) -> None:
    """Holds the manifest against the header, both ways. Raises FileError at the first difference."""
    _check_names(manifest)
    for entry in manifest.layers:
        check_facts(entry)
    check_blocks(manifest.layers)
    for entry in manifest.layers:
        _check_layer(entry, header)
    _check_inside(manifest, header)
    _check_listed(manifest, header)
    for alias, kept in manifest.aliases.items():
        if alias in header.tensors or kept not in header.tensors:
            raise FileError(f"{quote(alias)} cannot stand for {quote(kept)}: the one must be stored, the other not.")
    for name in manifest.extra_tensors:
        if name not in header.tensors and name not in manifest.aliases:
            raise FileError(f"the extra tensor {quote(name)} is missing.")


def _check_names(manifest: Manifest) -> None:
    seen: set[str] = set()
    for name in (name for entry in manifest.layers for name in (entry.name, *entry.aliases)):
        if name in seen:
            raise FileError(f"layer {quote(name)} stands in the manifest twice.")
        seen.add(name)


def _check_layer(entry: LayerEntry, header: Header) -> None:
    expected = expected_tensors(entry)
    for name, spec in expected.items():
        slot = header.tensors.get(name)
        if slot is None:
            raise FileError(f"tensor {quote(name)} is missing.")
        if (slot.dtype, slot.shape) != spec:
            found = f"{slot.dtype} {list(slot.shape)}"
            raise FileError(f"tensor {quote(name)} is {found}, the manifest says {spec[0]} {list(spec[1])}.")


def _check_inside(manifest: Manifest, header: Header) -> None:
    """Under a dynamic layer's name nothing may stand that the layer does not know."""
    known = all_expected(manifest).keys() | set(manifest.extra_tensors)
    standing_in = placeholders(manifest.layers)
    layers = {entry.name for entry in manifest.layers}
    for name in (*header.tensors, *manifest.aliases):
        parts = name.split(".")
        owners = [owner for n in range(len(parts)) if (owner := ".".join(parts[:n])) in layers]
        slot = header.tensors.get(name)
        if slot is not None and standing_in.get(name) == (slot.dtype, slot.shape):
            continue
        if owners and name not in known:
            raise FileError(f"tensor {quote(name)} is unexpected in the dynamic layer {quote(owners[0])}.")


def _check_listed(manifest: Manifest, header: Header) -> None:
    stored, listed = header.tensors.keys(), manifest.crc32.keys()
    if missing := sorted(listed - stored):
        raise FileError(f"tensor {quote(missing[0])} is missing.")
    if unexpected := sorted(stored - listed):
        raise FileError(f"tensor {quote(unexpected[0])} is unexpected: the manifest does not list it.")


def all_expected(manifest: Manifest) -> Mapping[str, Spec]:
    """`expected_tensors` of all layers."""
    return {name: spec for entry in manifest.layers for name, spec in expected_tensors(entry).items()}


def placeholders(entries: Iterable[LayerEntry]) -> dict[str, Spec]:
    """`p.weight` of shape [0] for each converted layer p, which a file may hold. A reader that does not know these
    layers and looks for a weight there finds one of a wrong shape, and cannot go on with one that it made up."""
    return {join(entry.name, "weight"): (entry.facts.dtype, (0,)) for entry in entries}
