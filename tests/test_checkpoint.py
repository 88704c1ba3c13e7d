"""Checkpoint format 1, whole files: what is written is read back, and nothing that contradicts itself is."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from checkpoint_cases import (
    block,
    blocks,
    entry,
    facts,
    layer_facts,
    manifest,
    names,
    random_tensor,
    same_bits,
    specs,
    tensors_of,
)
from padconvert.checkpoint.bitmask import count_bits
from padconvert.checkpoint.header import encode_header, read_header
from padconvert.checkpoint.layout import expected_tensors
from padconvert.checkpoint.manifest import LayerEntry, Manifest, manifest_from_json, manifest_to_json, sealed
from padconvert.checkpoint.read import Checkpoint, is_artefact, read_checkpoint
from padconvert.checkpoint.tensor_bytes import view_bytes
from padconvert.checkpoint.write import write_checkpoint
from padconvert.errors import FileError, PadconvertError
from padconvert.layers.build import build_layer
from padconvert.layers.packed import assemble, pack_bits
from padconvert.layers.pad import PadLayer
from padconvert.words import Granularity, Kind, Place, Routing

Tensors = dict[str, Tensor]
FORMAT_DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"


def small() -> tuple[Manifest, Tensors]:
    """An element layer, a channel layer, and an untouched tensor."""
    layers = [entry("a"), entry("body.b", facts(Kind.LINEAR, Granularity.CHANNEL), equal=True)]
    tensors = {name: tensor for layer in layers for name, tensor in tensors_of(layer).items()}
    return manifest(*layers), tensors | {"head.weight": torch.arange(6.0).view(2, 3)}


def write(folder: Path, whole: Manifest, tensors: Tensors) -> Checkpoint:
    write_checkpoint(folder / "x.safetensors", tensors, whole, force=True)
    return read_checkpoint(folder / "x.safetensors")


def forge(path: Path, document: dict[str, Any], tensors: Tensors) -> Path:
    """A file with any manifest and any tensors, past the writer's own checks."""
    stored = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
    encoded, header = encode_header(stored, sealed(json.dumps(document), stored))
    path.write_bytes(encoded + b"".join(view_bytes(tensors[name]) for name in header.tensors))
    return path


def use(path: Path) -> None:
    """All that a reader may do with a file."""
    checkpoint = read_checkpoint(path)
    checkpoint.tensors()
    checkpoint.verify_crc()


@given(st.lists(layer_facts(), max_size=3), st.booleans(), specs, st.dictionaries(names, names, max_size=2), st.data())
def test_read_of_write_is_the_same(
    layers: list[Any],
    equal: bool,
    untouched: dict[str, tuple[str, tuple[int, ...]]],
    policy: dict[str, str],
    data: st.DataObject,
) -> None:
    entries = [LayerEntry(f"layer{n}", (f"again{n}",), equal, layer) for n, layer in enumerate(layers)]
    tensors = {f"other.{name}": random_tensor(*spec, 9) for name, spec in untouched.items()}
    tensors |= {name: tensor for layer in entries for name, tensor in tensors_of(layer).items()}
    full = sorted(name for name, tensor in tensors.items() if tensor.numel())
    tied = {f"zz.{name}": name for name in data.draw(st.sets(st.sampled_from(full) if full else st.nothing()))}
    whole = manifest(*entries, policy=policy)
    with tempfile.TemporaryDirectory() as folder:
        read = write(Path(folder), whole, tensors | {alias: tensors[name] for alias, name in tied.items()})
        assert dataclasses.replace(read.manifest, crc32={}) == dataclasses.replace(whole, aliases=tied)
        assert read.header.tensors.keys() == read.manifest.crc32.keys() == tensors.keys()
        assert read.tensors().keys() == tensors.keys() | tied.keys()
        assert all(same_bits(tensor, tensors[tied.get(name, name)]) for name, tensor in read.tensors().items())
        assert all(check.passed for check in read.verify_crc())
        library = safetensors.torch.load_file(Path(folder) / "x.safetensors")
        assert all(same_bits(library[name], tensors[name]) for name in tensors)


@given(layer_facts(), st.booleans())
def test_expected_tensors_are_those_of_the_layer(layer: Any, equal: bool) -> None:
    state = build_layer(layer).state_dict()
    built = {name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in state.items()}
    for name in ("weight_dynamic", "bias_dynamic"):
        if equal and name in built:
            built[name] = (built[name][0], (1, *built[name][1][1:]))
    assert expected_tensors(LayerEntry("", (), equal, layer)) == built


def test_expected_tensors_of_a_layer_written_out() -> None:
    assert expected_tensors(entry("p", facts(router="mlp", groups=3, dtype="bfloat16"))) == {
        "p.weight_static": ("bfloat16", (125,)),
        "p.weight_dynamic": ("bfloat16", (4, 10)),
        "p.dynamic_bitmask": ("uint8", (17,)),
        "p.bias_static": ("bfloat16", (2,)),
        "p.bias_dynamic": ("bfloat16", (4, 1)),
        "p.bias_dynamic_bitmask": ("uint8", (1,)),
        "p.router.reduce.weight": ("float32", (4, 15)),
        "p.router.reduce.bias": ("float32", (4,)),
        "p.router.expand.weight": ("float32", (4, 4)),
        "p.router.expand.bias": ("float32", (4,)),
    }
    assert expected_tensors(entry("q", facts(granularity=Granularity.CHANNEL, has_bias=False, n_bias_dynamic=0))) == {
        "q.weight_static": ("float32", (2, 5, 3, 3)),
        "q.weight_dynamic": ("float32", (4, 1, 5, 3, 3)),
        "q.dynamic_index": ("int32", (1,)),
        "q.router.weight": ("float32", (4, 5)),
        "q.router.bias": ("float32", (4,)),
    }


def shapes_of(layers: list[LayerEntry]) -> dict[str, tuple[int, ...]]:
    return {name: shape for layer in layers for name, (_, shape) in expected_tensors(layer).items()}


def test_a_block_has_one_router_and_lists_its_hidden_units_once() -> None:
    router = {"up.router.weight": (4, 3), "up.router.bias": (4,)}
    assert shapes_of(block("up", Granularity.NEURON, gated=True)) == router | {
        "up.weight_static": (3, 3),
        "up.weight_dynamic": (4, 2, 3),
        "up.dynamic_index": (2,),
        "up.bias_static": (3,),
        "up.bias_dynamic": (4, 2),
        "gate.weight_static": (3, 3),
        "gate.weight_dynamic": (4, 2, 3),
        "gate.bias_static": (3,),
        "gate.bias_dynamic": (4, 2),
        "down.weight_static": (3, 3),
        "down.weight_dynamic": (4, 3, 2),
        "down.bias_static": (3,),
    }
    assert shapes_of(block("up", Granularity.CHANNEL, has_bias=False, n_bias_dynamic=0)) == router | {
        "up.weight_static": (3, 3),
        "up.weight_dynamic": (4, 2, 3),
        "up.dynamic_index": (2,),
        "down.weight_static": (1, 5),
        "down.weight_dynamic": (4, 2, 5),
        "down.dynamic_index": (2,),
    }
    assert shapes_of(block("up", has_bias=False, n_bias_dynamic=0, equal=True)) == router | {
        "up.weight_static": (13,),
        "up.weight_dynamic": (1, 2),
        "up.dynamic_bitmask": (2,),
        "down.weight_static": (13,),
        "down.weight_dynamic": (1, 2),
        "down.dynamic_bitmask": (2,),
    }
    all_dynamic = shapes_of(block("up", Granularity.NEURON, n_dynamic=5))
    assert {name: shape for name, shape in all_dynamic.items() if name.startswith("down.")} == {
        "down.weight_dynamic": (4, 3, 5),
        "down.bias_static": (3,),
    }
    assert "up.dynamic_index" not in all_dynamic


@given(blocks())
def test_blocks_are_read_as_they_were_written(layers: list[LayerEntry]) -> None:
    tensors = {name: tensor for layer in layers for name, tensor in tensors_of(layer).items()}
    built = {}  # type: ignore[var-annotated]
    for layer in layers:
        state = build_layer(layer.facts).state_dict()
        built |= {f"{layer.name}.{name}": tuple(value.shape) for name, value in state.items()}
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    equal = layers[0].equal_experts
    assert stored == {name: (1, *s[1:]) if equal and name.endswith("_dynamic") else s for name, s in built.items()}
    with tempfile.TemporaryDirectory() as folder:
        read = write(Path(folder), manifest(*layers), tensors)
        assert read.manifest.layers == tuple(layers)
        assert all(same_bits(tensor, tensors[name]) for name, tensor in read.tensors().items())


def changed(layers: list[LayerEntry], at: int, **values: Any) -> list[LayerEntry]:
    one = layers[at]
    return [
        *layers[:at],
        dataclasses.replace(one, facts=dataclasses.replace(one.facts, **values)),
        *layers[at + 1 :],
    ]


NEURON = Granularity.NEURON
TWO, GATED = block(), block(gated=True)
BLOCK_FAULTS: dict[str, list[LayerEntry]] = {
    "0 layers have the place first": TWO[1:],
    "0 layers have the place last": TWO[:1],
    "2 layers have the place peer": [*GATED, dataclasses.replace(GATED[1], name="gate2")],
    "2 layers have the place last": [*TWO, dataclasses.replace(TWO[1], name="down2")],
    r"weights of shapes \[5, 3\], \[5, 3\] are no block's": changed(TWO, 1, weight_shape=(5, 3)),
    r"weights of shapes \[5, 3\], \[6, 3\], \[3, 5\] are no": changed(GATED, 1, weight_shape=(6, 3)),
    "its layers differ in num_experts: 3, 4": changed(TWO, 1, num_experts=3),
    "its layers differ in top_k: 1, 2": changed(TWO, 1, top_k=1),
    "its layers differ in granularity: channel, element": changed(TWO, 1, granularity=Granularity.CHANNEL),
    "its layers differ in routing: sequence, token": changed(TWO, 1, routing=Routing.SEQUENCE),
    "its layers differ in router: linear, mlp": changed(TWO, 1, router="mlp"),
    "its layers differ in how many hidden units are dynamic: 2, 3": changed(block("up", NEURON), 1, n_dynamic=3),
    "layer 'down': top-k 5 of 4 experts": changed(TWO, 1, top_k=5),
    "layer 'down': a feed-forward block that is routed by token does not mix": changed(TWO, 1, top_k=0),
    "layer 'down': place alone in the block 'up'": changed(TWO, 1, place=Place.ALONE),
    "layer 'down': place last in the block ''": changed(TWO, 1, group=""),
    "layer 'down': place last in a block that is named 'down'": changed(TWO, 1, group="down"),
    "layer 'up': place first in a block that is named 'other' for": changed(TWO, 0, group="other"),
    "layer 'up': hidden units are those of a feed-forward block": [
        entry("up", facts(Kind.LINEAR, NEURON, weight_shape=(5, 3), n_dynamic=1))
    ],
    "layer 'down': 6 dynamic units out of 5": changed(block("up", NEURON), 1, n_dynamic=6),
    "layer 'down': 1 dynamic bias entries where units are columns": changed(block("up", NEURON), 1, n_bias_dynamic=1),
    "layer 'up': 1 dynamic bias entries for 2 dynamic": changed(block("up", NEURON), 0, n_bias_dynamic=1),
    "layer 'a': top-k 1, but a conv2d layer mixes": [entry("a", facts(top_k=1))],
    "layer 'a': a conv2d layer is not transposed": [entry("a", facts(transposed=True))],
    "layer 'a': a conv2d layer is in no feed-forward block": [
        entry("a", facts(group="a", place=Place.FIRST, routing=Routing.MAP))
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", BLOCK_FAULTS)
def test_a_block_that_cannot_be_is_refused(message: str, tmp_path: Path) -> None:
    good = block()
    write(tmp_path, manifest(*good), {name: t for layer in good for name, t in tensors_of(layer).items()})
    document = json.loads(manifest_to_json(manifest(*BLOCK_FAULTS[message])))
    with pytest.raises(FileError, match=message):
        read_checkpoint(
            forge(tmp_path / "forged", document, dict(read_checkpoint(tmp_path / "x.safetensors").tensors()))
        )


def test_same_bytes_from_two_processes(tmp_path: Path) -> None:
    script = (
        "import sys; from test_checkpoint import small; from padconvert.checkpoint.write import write_checkpoint\n"
        "m, t = small(); names = list(set(t)); t = {n: t[n] for n in names} | {'tied': t['head.weight']}\n"
        "print(names, file=sys.stderr); print(write_checkpoint(sys.argv[1], t, m))"
    )
    runs = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", script, str(tmp_path / seed)]
        runs.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True))
    assert runs[0].stderr != runs[1].stderr  # the tensors really came in two orders
    assert runs[0].stdout == runs[1].stdout
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_awkward_tensors(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 7),
        "conjugate": torch.complex(base, base).conj(),
        "parameter": torch.nn.Parameter(base[1]),
        "inf": torch.tensor([float("-inf"), float("nan")]),
    }
    read = write(tmp_path, manifest(), tensors).tensors()
    assert all(same_bits(read[name], tensor.detach().resolve_conj()) for name, tensor in tensors.items())


def test_a_tied_tensor_is_stored_once_under_its_layers_name(tmp_path: Path) -> None:
    layer, parts = entry("z"), tensors_of(entry("z"))
    shared, apart = torch.randn(1000), torch.randn(1000)
    again = {name.replace("z.", "a."): tensor for name, tensor in parts.items()}
    tensors = parts | again | {"n": shared, "m": shared.view(1000), "reshaped": shared.view(10, 100), "o": apart}
    checkpoint = write(tmp_path, manifest(layer, aliases={"given": "o"}), tensors)
    expected = {name.replace("z.", "a."): name for name in parts} | {"n": "m", "given": "o"}
    assert checkpoint.manifest.aliases == expected
    assert checkpoint.header.tensors.keys() == parts.keys() | {"m", "o", "reshaped"}
    read = checkpoint.tensors()
    assert read["n"] is read["m"]
    assert same_bits(checkpoint.tensor("n"), shared)
    with pytest.raises(FileError, match="there is no tensor 'never'"):
        checkpoint.tensor("never")
    assert same_bits(read["a.weight_dynamic"], parts["z.weight_dynamic"])


def test_layers_that_share_a_tensor_each_store_it(tmp_path: Path) -> None:
    parts = tensors_of(entry("a"))
    tensors = parts | {name.replace("a.", "b."): tensor for name, tensor in parts.items()}
    checkpoint = write(tmp_path, manifest(entry("a"), entry("b")), tensors)
    assert checkpoint.manifest.aliases == {}
    assert all(same_bits(checkpoint.tensor(name), tensors[name]) for name in tensors)


def test_tensors_at_one_address_at_different_times_are_not_tied(tmp_path: Path) -> None:
    class OnDemand(dict[str, Tensor]):
        addresses: ClassVar[list[int]] = []

        def __getitem__(self, name: str) -> Tensor:
            made = super().__getitem__(name).clone()
            self.addresses.append(made.data_ptr())
            return made

    tensors = {f"t{n:03}": torch.full((64,), float(n)) for n in range(500)}
    checkpoint = write(tmp_path, manifest(), OnDemand(tensors))
    assert len(set(OnDemand.addresses)) < len(OnDemand.addresses)  # addresses really came again
    assert checkpoint.manifest.aliases == {}
    assert all(same_bits(checkpoint.tensor(name), tensors[name]) for name in tensors)


def test_a_tensor_handed_out_may_be_written_to(tmp_path: Path) -> None:
    whole, tensors = small()
    checkpoint = write(tmp_path, whole, tensors)
    before = (tmp_path / "x.safetensors").read_bytes()
    checkpoint.tensor("head.weight", copy=True).zero_()
    assert same_bits(checkpoint.tensor("head.weight"), tensors["head.weight"])
    checkpoint.tensor("head.weight").zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert all(check.passed for check in checkpoint.verify_crc())


def test_truncation_at_every_byte_is_seen(tmp_path: Path) -> None:
    write(tmp_path, manifest(), {"a": torch.arange(3.0), "b": torch.tensor(True)})
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"empty|too few|cut short"):
            read_checkpoint(tmp_path / "cut")


def test_any_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    whole, tensors = small()
    header = write(tmp_path, whole, tensors).header
    path, chance = tmp_path / "x.safetensors", random.Random(0)
    content = path.read_bytes()
    for name, slot in header.tensors.items():
        for at in {slot.begin, slot.end - 1, chance.randrange(slot.begin, slot.end)}:
            damaged = bytearray(content)
            damaged[header.data_start + at] ^= 1 << chance.randrange(8)
            (tmp_path / "damaged").write_bytes(damaged)
            checks = read_checkpoint(tmp_path / "damaged").verify_crc()
            assert [check.name for check in checks if not check.passed] == [f"crc32 {name}"]


def test_is_artefact(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(tmp_path, *small())
    assert is_artefact(path)
    os.truncate(path, path.stat().st_size - 1)
    assert is_artefact(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    assert not is_artefact(path)
    with pytest.raises(FileError, match="not an artefact of padconvert"):
        read_checkpoint(path)
    path.write_text("some text, and more of it")
    assert not is_artefact(path)
    assert not is_artefact(tmp_path / "missing")


def test_manifest_text_is_compact_and_sorted() -> None:
    whole = manifest(entry())
    text = manifest_to_json(whole)
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert manifest_from_json(text) == whole


Change = Callable[[dict[str, Any], Tensors], object]


def set_facts(**changed: Any) -> Change:
    return lambda document, _: document["layers"][0]["facts"].update(changed)


def put(name: str, tensor: Tensor) -> Change:
    def change(document: dict[str, Any], tensors: Tensors) -> None:
        tensors[name] = tensor
        document["crc32"].setdefault(name, 0)

    return change


def bits(*dynamic: int, total: int = 136) -> Tensor:
    return pack_bits(torch.tensor([n in dynamic for n in range(total)]))


#: message → a change to `small()`'s manifest and tensors that asks for it
FAULTS: dict[str, Change] = {
    "format 2; a newer padconvert is needed": lambda d, _: d.update(format=2),
    "names no format: 'None'": lambda d, _: d.pop("format"),
    "names no format: 'True'": lambda d, _: d.update(format=True),
    "a key unknown here, 'neurons': it was written by padconvert '9.0'": lambda d, _: d.update(
        neurons=1, padconvert="9.0"
    ),
    "damaged: 'trained': ": lambda d, _: d.update(trained=1),
    "damaged: 'layers.0.facts.granularity'": set_facts(granularity="tensor"),
    "damaged: 'crc32.head.weight'": lambda d, _: d["crc32"].update({"head.weight": 2**32}),
    "damaged: 'provenance.route'": lambda d, _: d["provenance"].update(route="guessed"),
    "tensor 'head.weight' is missing": lambda _, t: t.pop("head.weight"),
    "tensor 'a.weight_static' is missing": lambda _, t: t.pop("a.weight_static"),
    "tensor 'extra' is unexpected: the manifest does not list it": lambda _, t: t.update(extra=torch.zeros(1)),
    "tensor 'a.weight' is unexpected in the dynamic layer 'a'": put("a.weight", torch.zeros(1)),
    "tensor 'body.b.x.y' is unexpected in the dynamic layer 'body.b'": put("body.b.x.y", torch.zeros(1)),
    "tensor 'a.alias' is unexpected in the dynamic layer 'a'": lambda d, _: d["aliases"].update(
        {"a.alias": "head.weight"}
    ),
    "'tied' cannot stand for 'nothing'": lambda d, _: d["aliases"].update(tied="nothing"),
    "'head.weight' cannot stand for 'a.bias_static'": lambda d, _: d["aliases"].update(
        {"head.weight": "a.bias_static"}
    ),
    "the extra tensor 'position' is missing": lambda d, _: d.update(extra_tensors=["position"]),
    "layer 'a' stands in the manifest twice": lambda d, _: d["layers"].append(d["layers"][0]),
    r"'a.weight_static' is float32 .125., the manifest says float32 .124.": set_facts(n_dynamic=11),
    r"'a.weight_static' is float64 .125., the manifest says float32": put("a.weight_static", torch.zeros(125).double()),
    r"'body.b.weight_dynamic' is float32 .1, 1, 5., the manifest says float32 .4, 1, 5.": lambda d, _: d["layers"][
        1
    ].update(equal_experts=False),
    "layer 'a': 136 dynamic units out of 135": set_facts(n_dynamic=136),
    "layer 'a': -1 dynamic units": set_facts(n_dynamic=-1),
    "layer 'a': 4 dynamic bias entries out of 3": set_facts(n_bias_dynamic=4),
    "layer 'a': 1 dynamic bias entries without a bias": set_facts(has_bias=False),
    "layer 'a': 1 experts": set_facts(num_experts=1),
    "layer 'a': 2 groups do not divide 3 filters": set_facts(groups=2),
    "layer 'a': dtype 'int8' is none of": set_facts(dtype="int8"),
    "layer 'a': padding mode 'mirror' is none of": set_facts(padding_mode="mirror"),
    r"layer 'a': stride \(1,\) is none of a conv2d": set_facts(stride=[1]),
    r"layer 'a': dilation \(0, 1\) is none of a conv2d": set_facts(dilation=[0, 1]),
    "layer 'a': padding 'most' is none of a conv2d": set_facts(padding="most"),
    r"layer 'a': padding \(20000, 1\) reaches far past its kernel": set_facts(padding=[20_000, 1]),
    r"layer 'a': stride \(1, 100000\) and dilation .* which no network has": set_facts(stride=[1, 100_000]),
    r"layer 'a': stride .* and dilation \(257, 1\), which no network has": set_facts(dilation=[257, 1]),
    r"layer 'a': a weight of shape \[3, 5\] is none of a conv2d": set_facts(weight_shape=[3, 5]),
    r"layer 'a': a weight of shape \[0, 5, 3, 3\]": set_facts(weight_shape=[0, 5, 3, 3]),
    "layer 'a': a weight of shape .* is none of a conv_transpose": set_facts(kind="conv_transpose"),
    "layer 'a': a conv2d layer is not routed by token": set_facts(routing="token"),
    "no router 'quantum' here; is a newer padconvert needed": set_facts(router="quantum"),
    "'linear.weight' is no router's name": set_facts(router="linear.weight"),
    "'a.dynamic_bitmask': 11 bits are set, the manifest says 10": put("a.dynamic_bitmask", bits(*range(11))),
    "'a.dynamic_bitmask': bits are set past its end at bit 135": put("a.dynamic_bitmask", bits(*range(126, 136))),
    "'a.bias_dynamic_bitmask': 0 bits are set, the manifest": put("a.bias_dynamic_bitmask", bits(total=8)),
    "'body.b.dynamic_index': it names a row outside 0 to 2": put("body.b.dynamic_index", torch.tensor([3]).int()),
    "'body.b.dynamic_index': it names a row outside": put("body.b.dynamic_index", torch.tensor([-1]).int()),
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_a_file_that_contradicts_itself_is_refused(message: str, tmp_path: Path) -> None:
    whole, tensors = small()
    document = json.loads(manifest_to_json(write(tmp_path, whole, tensors).manifest))
    use(forge(tmp_path / "forged", document, tensors))  # as it is, the forged file is fine
    FAULTS[message](document, tensors)
    with pytest.raises(FileError, match=message) as caught:
        use(forge(tmp_path / "forged", document, tensors))
    assert str(caught.value).startswith(f"{tmp_path / 'forged'}: ")
    assert "\n" not in str(caught.value)


def test_an_index_out_of_order_is_refused(tmp_path: Path) -> None:
    layer = entry("p", facts(Kind.LINEAR, Granularity.CHANNEL, n_dynamic=2, n_bias_dynamic=2))
    for rows in ([1, 0], [1, 1]):
        with pytest.raises(FileError, match=r"'p.dynamic_index': its rows are not in strictly rising order"):
            write(tmp_path, manifest(layer), tensors_of(layer) | {"p.dynamic_index": torch.tensor(rows).int()})


def test_the_header_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    whole, tensors = small()
    document = json.loads(manifest_to_json(write(tmp_path, whole, tensors).manifest))
    document["layers"][0]["facts"].update(weight_shape=[3 * 2**40, 2**20, 3, 3], num_experts=2**62)
    with pytest.raises(FileError, match="the manifest says float32"):
        read_checkpoint(forge(tmp_path / "forged", document, tensors))


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    for key in list(value if isinstance(value, dict) else range(len(value))):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from nodes(value[key])


NUMBERS = [-1, 0, 1, 7, 2**31, 2**63, 2**70, 1e300]
WORDS = ["", "a", "element", "mlp", "__init__"]
STRANGE: list[Any] = [*NUMBERS, *WORDS, None, True, [], {}, [[]], [2**40] * 9]


def test_a_changed_manifest_never_gives_a_traceback(tmp_path: Path) -> None:
    whole, tensors = small()
    text = manifest_to_json(write(tmp_path, whole, tensors).manifest)
    chance, refused = random.Random(1), 0
    for _ in range(300):
        document = json.loads(text)
        container, key = chance.choice(list(nodes(document)))
        container[key] = chance.choice(STRANGE)
        try:
            use(forge(tmp_path / "forged", document, tensors))
        except PadconvertError:
            refused += 1
    assert 150 < refused < 300


@given(st.binary(max_size=40))
def test_count_bits(data: bytes) -> None:
    expected = int.from_bytes(data, "little").bit_count()
    assert count_bits(torch.tensor(list(data), dtype=torch.uint8)) == expected


def test_the_header_of_an_artefact_is_read_without_torch(tmp_path: Path) -> None:
    write(tmp_path, *small())
    script = (
        "import sys; from padconvert.checkpoint.header import read_header; header = read_header(sys.argv[1])\n"
        "assert 'torch' not in sys.modules; print(*header.tensors)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(read_header(tmp_path / "x.safetensors").tensors)


@pytest.mark.parametrize("granularity", [Granularity.ELEMENT, Granularity.CHANNEL])
def test_the_reader_in_the_document(granularity: Granularity, tmp_path: Path) -> None:
    """The recipe of docs/format.md gives the weight that the layer itself would compute with."""
    layer = entry("body.conv", facts(granularity=granularity))
    tensors = tensors_of(layer) | {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(7))
        for name, (dtype, shape) in expected_tensors(layer).items()
        if dtype == "float32"
    }
    write(tmp_path, manifest(layer), tensors)
    recipe = re.search(r"```python\n(.*?)```", FORMAT_DOCUMENT.read_text(), re.DOTALL)
    assert recipe is not None
    scope: dict[str, Any] = {"path": tmp_path / "x.safetensors", "name": "body.conv", "expert": 2}
    exec(recipe[1], scope)  # our own document
    built = build_layer(layer.facts)
    built.load_state_dict({name.removeprefix("body.conv."): tensor for name, tensor in tensors.items()})
    routing = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    assert torch.equal(torch.from_numpy(scope["weight"]), effective_weight(built, routing))


@pytest.mark.parametrize("place", ["up", "down"])
def test_the_reader_in_the_document_reads_blocks(place: str, tmp_path: Path) -> None:
    """A `neuron` block in the recipe: rows of one layer, columns of the other, one index."""
    torch.manual_seed(3)
    members = block(granularity=Granularity.NEURON, gated=False)
    tensors = {name: tensor for member in members for name, tensor in tensors_of(member).items()}
    tensors |= {name: torch.randn_like(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    write(tmp_path, manifest(*members), tensors)
    recipe = re.search(r"```python\n(.*?)```", FORMAT_DOCUMENT.read_text(), re.DOTALL)
    assert recipe is not None
    first, last = members
    member = first if place == "up" else last
    scope: dict[str, Any] = {"path": tmp_path / "x.safetensors", "name": member.name, "expert": 1}
    exec(recipe[1], scope)  # our own document
    static, dynamic = (tensors[f"{member.name}.weight_{part}"] for part in ("static", "dynamic"))
    index = tensors[f"{first.name}.dynamic_index"].tolist()
    expected = torch.empty(member.facts.weight_shape)
    by_unit = expected if place == "up" else expected.T
    by_unit[index] = dynamic[1] if place == "up" else dynamic[1].T
    by_unit[[i for i in range(len(by_unit)) if i not in index]] = static if place == "up" else static.T
    assert torch.equal(torch.from_numpy(scope["weight"].copy()), expected)


def effective_weight(layer: PadLayer, routing: Tensor) -> Tensor:
    static, dynamic = layer.weight_static, layer.weight_dynamic
    assert static is not None
    assert dynamic is not None
    units = layer.units("weight")
    view = layer.view("weight")
    full = assemble(view.cut_packed(static), view.cut_packed(dynamic), units, layer.num_experts)
    return torch.einsum("bk,kus->us", routing, full).reshape(layer.weight_shape)
