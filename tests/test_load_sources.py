"""State dicts, checkpoints, safetensors, factories, and files of no known kind."""

from __future__ import annotations

import gzip
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from padconvert.errors import FileError, PadconvertError, UnsafeError, UsageError
from padconvert.load import InputKind, Source, detect, open_source, rebuild
from padconvert.load.audit import audit
from padconvert.load.safetensors_file import HeaderTensors

FACTORY = """
import torch
from torch import nn

def net(width=4, bias=True, raises=False):
    if raises:
        raise ValueError("no such width\\nsecond line")
    made = nn.Sequential(nn.Linear(3, width, bias=bias), nn.BatchNorm1d(width), nn.Linear(width, 2))
    made.register_buffer("noise", torch.randn(3), persistent=False)
    return made

def tied():
    made = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    made[1].weight = made[0].weight
    return made

def nothing():
    return 3

number = 4
"""


@pytest.fixture
def nets(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory, new for every test."""
    name = f"nets_{in_tmp.name.lower()}"
    (in_tmp / f"{name}.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    return name


def weights(width: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(1)
    made = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    return dict(made.state_dict())


def saved(thing: object, name: str = "model.pt") -> Path:
    torch.save(thing, name)
    return Path(name)


def opened(path: Path, nets: str, factory: str = "net", **arch_args: object) -> Source:
    return open_source(path, arch=f"{nets}:{factory}", arch_args=arch_args)


def assert_holds(source: Source, expected: dict[str, Tensor]) -> None:
    assert source.module is not None
    state = source.module.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert set(source.tensors) == set(expected)


# which entry is taken

CHECKPOINTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"epoch": 3, "state_dict": w, "optimizer": {"state": {}, "param_groups": []}},
    "model": lambda w: {"model": w, "best": torch.tensor(0.5)},
    "model_state_dict": lambda w: {"model_state_dict": w, "args": __import__("argparse").Namespace(lr=1)},
    "ema": lambda w: {"ema": w},
    "net": lambda w: {"net": w, "acc": np.float64(0.9)},
    "unheard_of": lambda w: {"my_weights": w, "step": 1},
    "two_deep": lambda w: {"model": {"state_dict": w, "step": 1}},
    "first_of_two": lambda w: {"model": w, "ema": {name: tensor + 1 for name, tensor in w.items()}},
    "prefix_module": lambda w: {f"module.{name}": tensor for name, tensor in w.items()},
    "prefix_both": lambda w: {f"module._orig_mod.{name}": tensor for name, tensor in w.items()},
    "prefix_inside": lambda w: {name.replace(".", "._orig_mod.", 1): tensor for name, tensor in w.items()},
    "averaged": lambda w: {"n_averaged": torch.tensor(3), **{f"module.{n}": t for n, t in w.items()}},
    "lightning": lambda w: {"state_dict": w, "pytorch-lightning_version": "2.0", "hyper_parameters": {"lr": 1}},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_a_checkpoint_gives_its_network(name: str, legacy: bool, nets: str) -> None:
    torch.save(CHECKPOINTS[name](weights()), "model.pt", _use_new_zipfile_serialization=not legacy)
    source = opened(Path("model.pt"), nets)
    assert_holds(source, weights())
    assert source.architecture == {"kind": "factory", "ref": f"{nets}:net", "args": {}}
    if name.startswith("prefix"):
        assert any("stripped" in note for note in source.notes)
    if name == "first_of_two":
        said = "more networks are in the file; --state-key ema takes 'ema' instead"
        assert source.notes == ("took 'model'; left unread: 'ema'", said)
    if name == "two_deep":
        assert source.notes[-1] == "took 'model' → 'state_dict'; left unread: 'step'"


def test_a_whole_module_inside_a_checkpoint(in_tmp: Path) -> None:
    module = nn.Linear(2, 2)
    source = open_source(saved({"epoch": 1, "model": module, "optimizer": None}))
    assert source.kind == "checkpoint"
    assert isinstance(source.module, nn.Linear)
    assert torch.equal(source.module.weight, module.weight)
    assert source.architecture["kind"] == "skeleton"
    assert in_tmp == Path.cwd()


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}, "an optimizer's state"),
        (torch.ones(3), "a single tensor"),
        ([torch.ones(3)], "a saved list"),
        ({"epoch": 3}, "none of them holds a network"),
        ({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, "more than one could be the network"),
        ({"module.w": torch.ones(1), "module._orig_mod.w": torch.ones(1)}, "two tensors have the same name"),
        (3, "a saved int"),
    ],
)
def test_files_without_a_network(thing: object, message: str, in_tmp: Path) -> None:
    with pytest.raises(FileError, match=message):
        open_source(saved(thing))
    assert in_tmp == Path.cwd()


def test_without_a_factory_the_tensors_are_listed(in_tmp: Path) -> None:
    source = open_source(saved(weights()))
    assert source.module is None
    assert source.architecture["kind"] == "none"
    assert "--arch" in source.architecture["why"]
    assert {name: tuple(t.shape) for name, t in source.tensors.items()} == {
        name: tuple(t.shape) for name, t in weights().items()
    }
    assert in_tmp == Path.cwd()


# factories


def test_arguments_reach_the_factory(nets: str) -> None:
    assert_holds(opened(saved(weights(6)), nets, width=6), weights(6))


def test_what_a_checkpoint_does_not_hold_is_the_same_every_time(nets: str) -> None:
    first, second = (opened(saved(weights()), nets).module for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first.noise, second.noise)  # type: ignore[arg-type]
    path = saved(weights())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    opened(path, nets)
    assert torch.equal(torch.rand(1), expected)  # the caller's random state is left alone


def test_a_half_precision_checkpoint_makes_a_half_precision_network(nets: str) -> None:
    half = {name: t.half() if t.is_floating_point() else t for name, t in weights().items()}
    source = opened(saved(half), nets)
    assert_holds(source, half)
    assert {t.dtype for t in source.tensors.values()} == {torch.float16, torch.int64}
    assert source.module is not None
    assert source.module.noise.dtype == torch.float16
    mixed = {name: t.half() if name.startswith("2") else t for name, t in weights().items()}
    assert_holds(opened(saved(mixed), nets), mixed)


def test_old_checkpoints_without_counters_load(nets: str) -> None:
    old = {name: t for name, t in weights().items() if not name.endswith("num_batches_tracked")}
    source = opened(saved(old), nets)
    assert source.module is not None
    assert torch.equal(source.module.state_dict()["1.running_mean"], old["1.running_mean"])


def test_one_name_of_a_tied_tensor_is_enough(nets: str) -> None:
    source = opened(saved({"0.weight": torch.ones(5, 3)}), nets, "tied")
    module: Any = source.module
    assert module[1].weight is module[0].weight
    assert module[1].weight.sum() == 15
    assert list(source.tensors) == ["0.weight"]


@pytest.mark.parametrize(
    ("arch", "args", "message"),
    [
        ("{}", {}, "package.module:function"),
        ("{}:net:x", {}, "package.module:function"),
        ("nowhere_at_all:net", {}, "no such module"),
        ("torch.hub:load", {"model": "x"}, "into a file of your own"),
        ("os:system", {}, "into a file of your own"),
        ("{}:nett", {}, "Did you mean 'net'"),
        ("{}:number", {}, "cannot be called"),
        ("{}:nothing", {}, "not a torch.nn.Module"),
        ("{}:net", {"raises": True}, "ValueError: no such width"),
        ("{}:net", {"depth": 3}, r"its arguments are \(width=4|Its arguments are \(width=4"),
        ("{}:net", {"a-b": 3}, "--arch-arg"),
        ("{}:net", {"width": object()}, "--arch-arg"),
    ],
)
def test_a_factory_that_does_not_work_is_one_clear_line(
    arch: str, args: dict[str, object], message: str, nets: str
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        open_source(saved(weights()), arch=arch.format(nets), arch_args=args)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_another_architecture_lists_what_differs(nets: str) -> None:
    other = {"0.weight": torch.ones(9, 3), "head.weight": torch.ones(1)}
    with pytest.raises(FileError) as raised:
        opened(saved(other), nets)
    message = str(raised.value)
    assert "checkpoint of another architecture: 7 missing (0.bias, 1.weight, 1.bias, 1.running_mean, …)" in message
    assert "1 unexpected (head.weight)" in message
    assert "1 of another shape (0.weight is [9, 3], the factory's [4, 3])" in message
    assert "--arch" in message


def test_nan_in_a_loaded_parameter_is_named(nets: str) -> None:
    broken = weights()
    broken["2.weight"][0, 0] = float("nan")
    with pytest.raises(FileError, match=r"'2\.weight' holds NaN"):
        opened(saved(broken), nets)
    buffer = weights()
    buffer["1.running_mean"][0] = float("nan")
    assert opened(saved(buffer), nets).module is not None


def test_arch_and_a_whole_model_contradict_each_other(nets: str) -> None:
    with pytest.raises(UsageError, match="Leave --arch away"):
        opened(saved(nn.Linear(2, 2)), nets)
    with pytest.raises(UsageError, match="--arch-arg needs --arch"):
        open_source(saved(weights()), arch_args={"width": 1})


def test_a_factory_is_rebuilt_only_with_trust(nets: str) -> None:
    source = opened(saved(weights()), nets)
    with pytest.raises(UnsafeError, match=rf"--trust {nets}.*into="):
        rebuild(source.architecture, source.tensors)
    assert source.module is not None
    again = rebuild(source.architecture, source.tensors, trust=(nets,)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in source.module.state_dict().items())
    kept = {name: tensor for name, tensor in source.tensors.items() if name != "0.weight"}
    partly: Any = rebuild(source.architecture, kept, trust=(nets,), missing_ok={"0.weight"})
    assert partly[0].weight.is_meta
    assert not partly[2].weight.is_meta
    with pytest.raises(FileError, match=r"1 missing \(0\.weight\)"):
        rebuild(source.architecture, kept, trust=(nets,))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [({"kind": "none", "why": "it was lost"}, "it was lost.*into="), ({"kind": "x"}, "'x'")],
)
def test_an_architecture_that_cannot_be_rebuilt(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=message):
        rebuild(architecture, {})


# safetensors


def test_safetensors_with_and_without_a_factory(nets: str) -> None:
    save_file({f"module.{name}": tensor for name, tensor in weights().items()}, "model.safetensors")
    source = open_source("model.safetensors")
    assert (source.kind, source.module) == ("safetensors", None)
    assert torch.equal(source.tensors["0.weight"], weights()["0.weight"])
    assert source.notes == ("stripped the prefix 'module.'",)
    assert_holds(opened(Path("model.safetensors"), nets), weights())


def test_a_huge_safetensors_file_is_not_read(in_tmp: Path) -> None:
    """40 GB of holes: reading or hashing them would take minutes."""
    size = 40 << 30
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path = in_tmp / "huge.bin"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    try:
        source = open_source(path, hash=False)
    finally:
        path.unlink()
    assert source.bytes == 8 + len(header) + size
    assert list(source.tensors) == ["w"]
    assert isinstance(source.tensors, HeaderTensors)
    assert source.tensors.slots["w"].shape == (size // 4,)


# what a file is


def test_a_file_is_known_by_its_content(in_tmp: Path) -> None:
    torch.save(nn.Linear(2, 2), "model.safetensors")
    assert detect("model.safetensors") is InputKind.PICKLE
    save_file({"w": torch.ones(1)}, "model.pt")
    assert detect("model.pt") is InputKind.SAFETENSORS
    (in_tmp / "folder").mkdir()
    (in_tmp / "folder" / "config.json").write_text("{}", encoding="utf-8")
    assert detect("folder") is InputKind.TRANSFORMERS
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), "exported.pt2")
    assert detect("exported.pt2") is InputKind.EXPORTED
    with zipfile.ZipFile("scripted.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
        archive.writestr("m/code/__torch__.py", b"")
    assert detect("scripted.pt") is InputKind.TORCHSCRIPT


def write(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


def script(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/code/net.py", b"")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (write(b""), "the file is empty"),
        (write(b"these are not weights\n" * 9), "a text file"),
        (write("ä".encode() * 600), "a text file"),
        (write(gzip.compress(b"x")), "gzip"),
        (write(b"\x00\x01\x02" * 99), "not a file of any kind"),
        (write(b"\x80\x02K\x01."), "not one that torch.save wrote"),
        (write(b"PK\x03\x04" + bytes(40)), r"damaged or cut off \(the directory at its end is missing\)"),
        (write(b"\x93NUMPY"), "NumPy"),
        (tar, "tar"),
        (lambda path: np.savez(path.open("wb"), x=np.ones(2)), "holds arrays, not a model"),
        (lambda path: path.mkdir(), "without config.json"),
        (lambda path: None, "cannot be read"),  # noqa: ARG005
        (script, "export the model again.*state dict and --arch"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_other_files_are_one_clear_line(make: Callable[[Path], object], message: str, in_tmp: Path) -> None:
    path = in_tmp / "model.pt"
    make(path)
    with pytest.raises(FileError, match=message) as raised:
        open_source(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


# the audit


def test_an_audit_lists_names_and_says_what_would_happen(in_tmp: Path, nets: str) -> None:
    report = audit(saved(nn.Sequential(nn.Conv2d(1, 1, 1))))
    assert report.kind == "module"
    assert report.refused == []
    assert report.verdict == "loads"
    assert "torch.nn.modules.conv.Conv2d" in report.names
    assert audit(saved({"state_dict": weights()})).kind == "checkpoint"
    assert audit(saved({"epoch": 1})).verdict.endswith("name that file.")
    (in_tmp / "model.pt").write_bytes(b"text")
    with pytest.raises(PadconvertError):
        audit(in_tmp / "model.pt")
    assert nets


def test_a_header_length_that_spells_pk_is_no_zip(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    length = int.from_bytes(b"PK", "little")
    path = tmp_path / "m.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + b"\0\0\0\0")
    assert detect(path) is InputKind.SAFETENSORS
    assert list(open_source(path).tensors) == ["a"]
