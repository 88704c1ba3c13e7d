"""What torch.save wrote comes back exactly: networks of every kind, both formats, all protocols; the real files."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zoo
from padconvert.errors import FileError, UnsafeError
from padconvert.load import open_source
from padconvert.walk.probe import call, flat_outputs

# the classes of the tests' own zoo are not on the list, so the tests trust their modules
TRUST = ("zoo_convolutions", "zoo_sequences", "zoo_traps")
# the reader refuses what these are made of (hooks of old norms; classes made at run time)
REFUSED = {"old_weight_and_spectral_norm"}
WRITTEN = [name for name in zoo.ZOO if name not in zoo.UNPICKLABLE | REFUSED]


def assert_same(found: nn.Module, source: nn.Module, *, strides: bool = True) -> None:
    expected, state = source.state_dict(), found.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert not strides or state[name].stride() == tensor.stride()
        assert torch.equal(state[name], tensor), name
    assert repr(found) == repr(source)
    assert [m.training for m in found.modules()] == [m.training for m in source.modules()]
    assert {n: p.requires_grad for n, p in found.named_parameters()} == {
        n: p.requires_grad for n, p in source.named_parameters()
    }


@pytest.mark.parametrize("name", WRITTEN)
def test_a_network_comes_back_exactly(name: str, tmp_path: Path) -> None:
    source, probe = zoo.build(name)
    torch.save(source, tmp_path / "model.pt")
    opened = open_source(tmp_path / "model.pt", trust=TRUST)
    assert opened.module is not None
    assert_same(opened.module, source)
    args, kwargs = probe.make(2)
    with torch.no_grad():
        expected = flat_outputs(call(source, args, kwargs))
        found = flat_outputs(call(opened.module, args, kwargs))
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    shared = {id(p): n for n, p in source.named_parameters(remove_duplicate=False)}
    again = {id(p): n for n, p in opened.module.named_parameters(remove_duplicate=False)}
    assert list(again.values()) == list(shared.values())  # ties are ties


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["weight_tied", "lstm_linear", "bert", "t5_encoder_decoder", "resnet"])
def test_both_formats_and_all_protocols(name: str, legacy: bool, protocol: int, tmp_path: Path) -> None:
    source, _ = zoo.build(name)
    path = tmp_path / "model.pt"
    torch.save(source, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    opened = open_source(path, trust=TRUST)
    assert opened.module is not None
    assert_same(opened.module, source)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16, torch.bool])
def test_a_state_dict_of_protocol_0_that_torch_itself_cannot_read(
    dtype: torch.dtype, legacy: bool, tmp_path: Path
) -> None:
    """There a storage is named by Python's text of a tuple: `('storage', <class 'torch.FloatStorage'>, …)`."""
    base = torch.arange(12).to(dtype)
    state = {"w": base.view(3, 4), "part": base[4:8]}
    path = tmp_path / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=0)
    with pytest.raises(AssertionError, match="saved_id must be a tuple"):
        torch.load(path, weights_only=False)
    tensors = open_source(path).tensors
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {"w": dtype, "part": dtype}
    assert torch.equal(tensors["w"], state["w"])
    assert torch.equal(tensors["part"], state["part"])


def attributes() -> dict[str, Any]:
    shared = [1, 2]
    return {
        "numbers": (1, -(2**70), 2.5, float("inf"), 1j, True, None),
        "text": "ü",
        "raw": b"\x00\xff",
        "array": bytearray(b"ab"),
        "ordered": OrderedDict(a=1, b=[2]),
        "default": defaultdict(list, {"x": [1]}),
        "counter": Counter("aab"),
        "queue": deque([1, 2], maxlen=3),
        "chosen": {3, 1, 2},
        "frozen": frozenset({"a"}),
        "slices": [slice(1, None, 2), range(0, 9, 3)],
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "function": [torch.tanh, functional.gelu, functional.relu],
        "norm": nn.LayerNorm,
        "twice": [shared, shared],
        "nested": ((1, (2, (3,))), {(1, "a"): 2}),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_plain_attributes_come_back(protocol: int, tmp_path: Path) -> None:
    source = nn.Linear(2, 2)
    expected = attributes()
    source.__dict__.update(copy.copy(expected))
    ring: list[Any] = []
    ring.append((ring, 1))
    source.__dict__["ring"] = ring
    torch.save(source, tmp_path / "model.pt", pickle_protocol=protocol)
    found = vars(open_source(tmp_path / "model.pt").module)
    for key, value in expected.items():
        assert found[key] == value, key
        assert type(found[key]) is type(value), key
    assert found["queue"].maxlen == 3
    assert found["default"].default_factory is list
    assert found["twice"][0] is found["twice"][1]
    assert found["ring"][0][0] is found["ring"]


def test_tensors_that_share_memory_still_do(tmp_path: Path) -> None:
    source = nn.Linear(4, 4, bias=False)
    source.register_buffer("view", source.weight.detach()[1:, ::2])
    source.register_buffer("turned", source.weight.detach().t())
    torch.save(source, tmp_path / "model.pt")
    found: Any = open_source(tmp_path / "model.pt").module
    assert found.view.stride() == (4, 2)
    with torch.no_grad():
        found.weight.fill_(7)
    assert found.view.tolist() == [[7.0, 7.0]] * 3
    assert found.turned.tolist() == [[7.0] * 4] * 4


def test_what_is_trained_in_memory_never_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(256, 256), path)  # large enough to be mapped
    before = path.read_bytes()
    module = open_source(path).module
    assert module is not None
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before


def test_storages_of_a_gpu_load_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"X\x03\x00\x00\x00cpu") == 1
    path.write_bytes(data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:3"))
    weight = open_source(path).tensors["w"]
    assert weight.device.type == "cpu"
    assert weight.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.float64])
def test_dtypes_of_every_storage(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([0.0, 1.0, 1.0, 0.0]).to(dtype)
    torch.save({"w": values, "part": values[1:3]}, tmp_path / "model.pt")
    tensors = open_source(tmp_path / "model.pt").tensors
    assert tensors["w"].dtype == dtype
    assert tensors["w"].to(torch.complex64).tolist() == [0, 1, 1, 0]
    assert tensors["part"].to(torch.complex64).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["nan", "inf", "-inf"])
def test_a_broken_parameter_is_named_and_a_buffer_may_hold_infinity(name: str, tmp_path: Path) -> None:
    source: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    source.register_buffer("bias_mask", torch.full((2,), float("-inf")))
    torch.save(source, tmp_path / "model.pt")
    assert open_source(tmp_path / "model.pt").module is not None
    with torch.no_grad():
        source[1].weight[0, 1] = float(name)
    torch.save(source, tmp_path / "model.pt")
    with pytest.raises(FileError, match=r"parameter '1\.weight' holds NaN or infinity"):
        open_source(tmp_path / "model.pt")


def test_hooks_of_old_norms_are_refused_with_the_next_step(tmp_path: Path) -> None:
    source, _ = zoo.build("old_weight_and_spectral_norm")
    torch.save(source, tmp_path / "model.pt")
    with pytest.raises(UnsafeError, match="remove_weight_norm"):
        open_source(tmp_path / "model.pt", trust=TRUST)


def test_a_module_is_read_after_torch_compile_was_used(tmp_path: Path) -> None:
    """The compiler replaces nn.Module.__setstate__ for the whole process."""
    import torch._dynamo.mutation_guard as guard

    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "model.pt")
    own = nn.Module.__setstate__
    init = nn.Module.__init__
    try:
        guard.install_generation_tagging_init()
        assert nn.Module.__setstate__ is not own
        assert isinstance(open_source(tmp_path / "model.pt").module, nn.Sequential)
    finally:
        nn.Module.__setstate__ = own  # type: ignore[method-assign]
        nn.Module.__init__ = init  # type: ignore[method-assign]


def test_the_checksum_and_size_are_the_files(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), path)
    source = open_source(path)
    assert source.bytes == len(path.read_bytes())
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_source(path, hash=False).sha256 is None


@pytest.mark.parametrize(
    ("file", "kind", "count"),
    [("resnet20-12fca82f.th", "checkpoint", 97), ("fashion_net_ex.pt", "state_dict", 8), ("onet.pt", "state_dict", 21)],
)
def test_real_files_against_torchs_own_reader(file: str, kind: str, count: int, data_dir: Path) -> None:
    path = data_dir / "weights" / file
    if not path.is_file():
        pytest.skip(f"no {file} among the real data")
    source = open_source(path)
    assert (source.kind, len(source.tensors)) == (kind, count)
    expected: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = expected.get("state_dict", expected)
    assert [name.removeprefix("module.") for name in state] == list(source.tensors)
    for name, tensor in state.items():
        assert torch.equal(source.tensors[name.removeprefix("module.")], tensor), name
    if kind == "checkpoint":
        assert source.notes == ("took 'state_dict'; left unread: 'best_prec1'", "stripped the prefix 'module.'")
