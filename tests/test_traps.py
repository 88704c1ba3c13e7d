"""Files as people have them: each loads, and converts to the same function, or is refused with the next step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
import zoo_traps as traps
from padconvert.__main__ import main
from padconvert.convert import convert
from padconvert.errors import FileError, PadconvertError, UnsafeError, UsageError
from padconvert.load import open_source
from padconvert.load.artefact import load
from padconvert.load.examine import examine
from padconvert.options import ConvertOptions
from zoo_traps import optimizer_of

FACTORY = "trapnets"
INPUT = (3, 16, 16)


@pytest.fixture
def here(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (in_tmp / f"{FACTORY}.py").write_text("import zoo_traps\n\ndef net():\n    return zoo_traps.SmallCNN()\n")
    monkeypatch.syspath_prepend(str(in_tmp))
    return in_tmp


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return traps.SmallCNN().eval()


def saved(thing: object, path: str = "model.pt") -> Path:
    torch.save(thing, path)
    return Path(path)


def converted(path: Path, **options: Any) -> tuple[nn.Module, int]:
    """The artefact's model, and how many layers became dynamic."""
    result = convert(path, ConvertOptions(output=Path("out.st"), force=True, trust=("zoo_traps",), **options))
    assert result.equality is not None
    assert result.equality.passed
    return load("out.st", trust=("zoo_traps", FACTORY)), sum(layer.n_dynamic is not None for layer in result.layers)


def same(module: nn.Module, expected: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        found, wanted = module(x), expected(x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# ---- every trap of the zoo

#: how many layers become dynamic, or the exit code of the refusal and its next step
ENDS: dict[str, int | tuple[int, str]] = {
    "tied weights": 1, "a module used twice": 2, "shared storages": 2, "a shared buffer": 2, "half precision": 2,
    "bfloat16": 2, "non-contiguous tensors": 2, "meta tensors": (6, "load the weights"),
    "a sparse tensor": (6, ".to_dense()"), "DataParallel": 2, "an EMA copy": 2,
    "an averaged model": (6, "model.module"), "an optimizer beside the model": 2,
    "an optimizer alone": (4, "file that holds the model"), "a script's own class": (6, "--trust"),
    "a compiled module": (6, "torch.save(model._orig_mod, path)"),
}  # fmt: skip

SAVE = (
    "import sys, torch, zoo_traps\n"
    "zoo_traps.Net.__module__ = '__main__'; Net = zoo_traps.Net\n"
    "torch.manual_seed(0); torch.save(zoo_traps.SAVED[sys.argv[1]](), 'model.pt')"
)


@pytest.mark.parametrize("name", traps.SAVED)
def test_a_trap_is_converted_or_refused_with_the_next_step(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved by another process, as a user's file is."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", SAVE, name]
    subprocess.run(command, check=True, cwd=here, env={**os.environ, "PYTHONPATH": path})
    code = main(["convert", "model.pt", "-o", "out.st", "--trust", "zoo_traps", "--json"])
    out, err = capsys.readouterr()
    expected = ENDS[name]
    if isinstance(expected, tuple):
        assert (code, err.count("\n"), Path("out.st").exists()) == (expected[0], 1, False)
        assert expected[1] in err
    else:
        assert code == 0, err
        layers = json.loads(out)["layers"]
        assert sum(layer["verdict"] == "convert" for layer in layers) == expected
        assert json.loads(out)["equality"]["passed"]


# ---- modules that load


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("weight_tied", 1),
        ("module_reused", 2),
        ("double_precision", 2),
        ("non_contiguous", 2),
        ("overlapping_views", 2),
    ],
)
def test_a_saved_module_converts_to_the_same_function(name: str, layers: int) -> None:
    module, probe = zoo.build(name)
    shape = probe.inputs[0].shape
    dtype = torch.float64 if name == "double_precision" else torch.float32
    model, found = converted(saved(module), input_shape=shape)
    assert found == layers
    same(model, module, *shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(dtype: torch.dtype, here: Path) -> None:
    module = net().to(dtype)
    model, found = converted(saved(module), input_shape=INPUT)
    assert found == 2
    stored = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert {kind for name, kind in stored.items() if ".router." not in name} == {dtype}
    x = torch.randn(2, *INPUT, generator=torch.Generator().manual_seed(0))
    # the weights are the source's to the bit: in fp32 both networks agree as fp32 networks do
    torch.testing.assert_close(model.float()(x), module.float()(x), atol=1e-5, rtol=1e-4)
    assert here == Path.cwd()


def test_overlapping_views_keep_their_values(here: Path) -> None:
    """Rows 4 to 8 of one storage are two layers' weights; neither may be partitioned, both are stored whole."""
    module, probe = zoo.build("overlapping_views")
    result = convert(
        saved(module),
        ConvertOptions(output=here / "out.st", trust=("zoo_traps",), input_shape=probe.inputs[0].shape),
    )
    reasons = {layer.name: layer.reason.value for layer in result.layers}
    assert (reasons["first"], reasons["second"]) == ("tied_weight", "tied_weight")
    loaded = load("out.st", trust=("zoo_traps",))
    for name, tensor in module.state_dict().items():
        if name.startswith(("first", "second")):
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_data_parallel_wrapper_is_taken_off(here: Path) -> None:
    module = net()
    for thing in (nn.DataParallel(module), {"epoch": 1, "model": nn.DataParallel(module)}):
        source = open_source(saved(thing), trust=("zoo_traps",))
        assert source.notes[-1] == "took the network inside DataParallel"
        assert type(source.module) is traps.SmallCNN
    model, found = converted(saved(nn.DataParallel(module)), input_shape=INPUT)
    assert found == 2
    same(model, module, *INPUT)
    assert examine("model.pt", ("zoo_traps",)).verdict == "safe"
    with pytest.raises(UnsafeError, match=r"save the network inside the wrapper \(model\.module\)"):
        open_source(saved(nn.Sequential(nn.DataParallel(module))), trust=("zoo_traps",))
    assert here == Path.cwd()


# ---- state dicts that load

State = dict[str, Tensor]


def nested(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


PREFIXES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "data parallel": (lambda m: nn.DataParallel(m).state_dict(), "stripped the prefix 'module.'"),
    "compiled": (lambda m: nested(m.state_dict(), "_orig_mod."), "stripped '_orig_mod.'"),
    "lightning": (
        lambda m: {"state_dict": nested(m.state_dict(), "model."), "pytorch-lightning_version": "2.4", "epoch": 3},
        "stripped the prefix 'model.'",
    ),
    "two deep": (lambda m: nested(m.state_dict(), "net.encoder."), "stripped the prefix 'net.encoder.'"),
    "lightning and compiled": (lambda m: nested(m.state_dict(), "model._orig_mod."), "stripped the prefix 'model.'"),
    "averaged": (
        lambda m: torch.optim.swa_utils.AveragedModel(m).state_dict(), "stripped the prefix 'module.'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PREFIXES))
def test_a_prefix_of_a_wrapper_is_stripped_and_said(name: str, here: Path) -> None:
    make, note = PREFIXES[name]
    module = net()
    path = saved(make(module))
    source = open_source(path, arch=f"{FACTORY}:net")
    assert note in source.notes
    assert source.module is not None
    assert all(torch.equal(tensor, module.state_dict()[key]) for key, tensor in source.module.state_dict().items())
    model, found = converted(path, arch=f"{FACTORY}:net", input_shape=INPUT)
    assert found == 2
    same(model, module, *INPUT)
    assert here == Path.cwd()


@pytest.mark.parametrize(
    "state",
    [
        {**nested(net().state_dict(), "model."), "loss.weight": torch.ones(2)},
        {f"model.{name}": tensor[..., :1] for name, tensor in net().state_dict().items()},
        dict(list(nested(net().state_dict(), "model.").items())[:-1]),
        {f"{'model' if 'conv' in name else 'head'}.{name}": tensor for name, tensor in net().state_dict().items()},
    ],
)
def test_a_prefix_that_is_not_all_that_is_wrong_stays(state: State, here: Path) -> None:
    with pytest.raises(FileError, match=r"another architecture.*missing.*unexpected \(model\."):
        open_source(saved(state), arch=f"{FACTORY}:net")
    assert here == Path.cwd()


def test_an_optimizer_beside_the_model_is_left_unread(here: Path) -> None:
    module = net()
    made = optimizer_of(module)
    for state in (made.state_dict(), made):  # the object itself is pickled by some scripts
        source = open_source(
            saved({"model": module.state_dict(), "optimizer": state, "step": 1}), arch=f"{FACTORY}:net"
        )
        assert source.notes == ("took 'model'; left unread: 'optimizer', 'step'",)
        assert torch.equal(source.tensors["fc2.bias"], module.state_dict()["fc2.bias"])
    assert here == Path.cwd()


# ---- copies that were averaged


@pytest.mark.parametrize("key", ["ema", "model_ema", "ema_state_dict", "state_dict_ema", "shadow"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_model_is_taken_before_its_average_and_the_other_by_its_key(key: str, whole: bool, here: Path) -> None:
    model, average = net(1), net(2)
    both: Mapping[str, Any] = {key: average, "model": model} if whole else {
        key: average.state_dict(), "model": model.state_dict(),
    }  # fmt: skip
    arch = None if whole else f"{FACTORY}:net"
    path = saved(both)
    source = open_source(path, trust=("zoo_traps",), arch=arch)
    assert source.notes[1] == f"more networks are in the file; --state-key {key} takes {key!r} instead"
    assert torch.equal(source.tensors["fc1.weight"], model.state_dict()["fc1.weight"])
    other = open_source(path, trust=("zoo_traps",), state_key=key, arch=arch)
    assert other.notes == (f"took {key!r}; left unread: 'model'",)
    assert torch.equal(other.tensors["fc1.weight"], average.state_dict()["fc1.weight"])
    assert here == Path.cwd()


def test_the_key_goes_through_the_whole_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved({"model": net(1), "ema": {"epoch": 3, "module": net(2)}})
    words = ["--trust", "zoo_traps", "--state-key", "ema"]
    assert main(["convert", str(path), "-o", "out.st", "--input-shape", "1,3,16,16", *words]) == 0
    same(load("out.st", trust=("zoo_traps",)), net(2), *INPUT)
    assert main(["verify", "out.st", "--against", str(path), *words]) == 0
    assert main(["verify", "out.st", "--against", str(path), *words[:2]]) == 7  # that is the other network
    assert main(["inspect", str(path), *words]) == 0
    capsys.readouterr()
    assert main(["inspect", str(path), *words[:2], "--state-key", "epoch"]) == 2
    assert "Networks are under 'model', 'ema'" in capsys.readouterr().err
    assert main(["convert", "out.st", "-o", "more.st", "--state-key", "ema"]) == 2
    assert "--state-key ema: out.st is no checkpoint" in capsys.readouterr().err
    assert not (here / "more.st").exists()


def test_a_run_is_not_resumed_with_another_network_of_the_same_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved({"model": net(1), "ema": net(2)})
    np.savez("data.npz", x=np.random.RandomState(0).randn(32, *INPUT).astype("float32"), y=np.arange(32) % 4)
    words = ["convert", str(path), "-o", "out.st", "--force", "-q", "--trust", "zoo_traps", "--work-dir", "work"]
    words += ["--data", "data.npz", "--steps", "10", "--batch-size", "8"]
    assert main(words) == 0
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--state-key", "ema"]) == 2
    assert "--state-key" in capsys.readouterr().err
    assert here == Path.cwd()


def test_an_average_and_an_optimizer_beside_the_model_go_through_the_whole_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training checkpoint as it lies on disk: the model, its average, two optimizers, a scheduler, numbers."""
    made = optimizer_of(net(1))
    path = saved({
        "epoch": 3, "ema": net(2).state_dict(), "optimizer": made.state_dict(), "optimizer_itself": made,
        "scheduler": torch.optim.lr_scheduler.StepLR(made, 3).state_dict(), "model": net(1).state_dict(),
    })  # fmt: skip
    words = ["--arch", f"{FACTORY}:net", "--input-shape", "1,3,16,16", "--force", "-q"]
    for more, seed in ((), 1), (("--state-key", "ema"), 2):
        assert main(["convert", str(path), "-o", "out.st", *words, *more]) == 0
        same(load("out.st", trust=(FACTORY,)), net(seed), *INPUT)
    capsys.readouterr()
    assert main(["convert", str(path), "-o", "out.st", *words, "--state-key", "optimizer"]) == 2
    assert "Networks are under 'ema', 'model'" in capsys.readouterr().err
    assert here == Path.cwd()


def test_several_networks_without_a_known_key_ask_for_one(here: Path) -> None:
    path = saved({"generator": net(1), "discriminator": net(2)})
    with pytest.raises(FileError, match=r"more than one could be the network\. Name one with --state-key"):
        open_source(path, trust=("zoo_traps",))
    found = open_source(path, trust=("zoo_traps",), state_key="discriminator")
    assert torch.equal(found.tensors["fc2.bias"], net(2).state_dict()["fc2.bias"])
    with pytest.raises(UsageError, match="no network under any key"):
        open_source(saved(net().state_dict()), state_key="conv1.weight")
    assert here == Path.cwd()


# ---- what cannot be converted


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})
    return made


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(3))


class Packed(Tensor):
    """A tensor class of somebody's own, as quantising libraries make them."""


REFUSED: dict[str, tuple[Callable[[], object], type[PadconvertError], tuple[str, ...]]] = {
    "a meta module": (traps.meta_weights, UnsafeError, ("meta device", "load the weights")),
    "a meta state dict": (lambda: net().to("meta").state_dict(), UnsafeError, ("meta device", "load the weights")),
    "a sparse buffer": (traps.sparse_buffer, UnsafeError, ("sparse", ".to_dense()")),
    "a sparse state dict": (lambda: traps.sparse_buffer().state_dict(), UnsafeError, ("sparse", ".to_dense()")),
    "lazy modules": (lazy, UnsafeError, ("Uninitialized", "run the model once")),
    "a lazy state dict": (lambda: lazy().state_dict(), UnsafeError, ("Uninitialized", "run the model once")),
    "quantised modules": (quantised, UnsafeError, ("quantised", "float model")),
    "a quantised state dict": (lambda: quantised().state_dict(), UnsafeError, ("quantised", "float model")),
    "an averaged model": (traps.averaged_model, UnsafeError, ("AveragedModel", "model.module")),
    "a tuple of modules": (lambda: (net(), net(1)), FileError, ("tuple of 2", "each model to its own file")),
    "a list of one": (lambda: [net()], FileError, ("a saved list", "by itself")),
    "a bare tensor": (lambda: torch.ones(3), FileError, ("a single tensor", "state dict")),
    "a bare parameter": (lambda: nn.Parameter(torch.ones(3)), FileError, ("a single tensor", "state dict")),
    "an optimizer": (lambda: optimizer_of(net()).state_dict(), FileError, ("optimizer", "file that holds the model")),
    "an optimizer under its key": (
        lambda: {"optimizer": optimizer_of(net()).state_dict(), "epoch": 3}, FileError, ("optimizer", "no model"),
    ),
    "an optimizer itself": (
        lambda: optimizer_of(net()), FileError, ("a saved optimizer (AdamW)", "torch.save(model.state_dict(), path)"),
    ),
    "an optimizer itself under its key": (
        lambda: {"optimizer": optimizer_of(net()), "epoch": 3}, FileError, ("optimizer", "save(model.state_dict()"),
    ),
    "optimizers in a list": (lambda: [optimizer_of(net())], FileError, ("list of optimizers", "model.state_dict()")),
    "optimizers in a list under their key": (
        lambda: {"optimizer_states": [optimizer_of(net()).state_dict()]}, FileError, ("optimizer", "no model"),
    ),
    "a scheduler": (
        lambda: torch.optim.lr_scheduler.StepLR(optimizer_of(net()), 3), FileError, ("a saved StepLR", "state_dict()"),
    ),
    "a tensor class": (lambda: {"w": torch.ones(2).as_subclass(Packed)}, UnsafeError, ("Packed", "--arch")),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_converted_is_refused_with_what_to_do(name: str, legacy: bool, here: Path) -> None:
    make, error, said = REFUSED[name]
    thing = make()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(thing, "model.pt", _use_new_zipfile_serialization=not legacy)
    except (RuntimeError, AttributeError, NotImplementedError):
        assert legacy, "only the old format may be unable to hold it"
        return
    with pytest.raises(error) as raised:
        open_source("model.pt", trust=("zoo_traps",))
    message = str(raised.value)
    assert [word for word in said if word not in message] == []
    assert "\n" not in message
    assert examine("model.pt", ("zoo_traps",)).exit_code == error.exit_code
    assert here == Path.cwd()


def test_a_compiled_module_is_refused_with_what_to_save(here: Path) -> None:
    """As torch pickles it, the compiler comes along, ten names of it: the message is about the first."""
    from load_attacks import module_file

    inside = b"".join(b"X\x01\x00\x00\x00" + bytes([97 + i]) + b"c" + name.replace(".", "\n").encode() + b"\n"
                      for i, name in enumerate(["contextlib.nullcontext", "posix.system"]))  # fmt: skip
    module_file(here / "model.pt", "torch._dynamo.eval_frame.OptimizedModule", inside)
    with pytest.raises(UnsafeError) as raised:
        open_source(here / "model.pt")
    assert str(raised.value) == (
        "model.pt: a module that torch.compile wrapped, which brings the compiler along. "
        "Save the one below torch.compile: torch.save(model._orig_mod, path), and name that file."
    ).replace("model.pt", str(here / "model.pt"), 1)
    assert {name.name for name in examine("model.pt").names if not name.allowed} == {
        "torch._dynamo.eval_frame.OptimizedModule", "contextlib.nullcontext", "posix.system",
    }  # fmt: skip


def test_a_module_that_torch_compile_really_wrapped(here: Path) -> None:
    """In a process of its own: the compiler changes torch for good."""
    code = (
        "import sys, torch; from torch import nn; from padconvert.__main__ import main\n"
        "net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))\n"
        "made = torch.compile(net, backend='eager'); made(torch.ones(1, 4))\n"
        "torch.save(made, 'compiled.pt'); torch.save(made._orig_mod, 'inside.pt')\n"
        "assert main(['convert', 'compiled.pt', '-o', 'c.st']) == 6\n"
        "sys.exit(main(['convert', 'inside.pt', '-o', 'i.st', '-q']))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Save the one below torch.compile" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (here / "i.st").exists()


def test_torchao_is_refused_with_what_to_do_and_no_advice_to_trust_it(here: Path) -> None:
    from load_attacks import module_file

    for name in ("torchao.quantization.linear.Int8Linear", "bitsandbytes.nn.modules.Linear8bitLt"):
        module_file(here / "model.pt", name)
        with pytest.raises(UnsafeError, match="quantised models cannot be converted; start from the float model") as e:
            open_source(here / "model.pt")
        assert "--trust" not in str(e.value)


def test_torchscript_and_traced_parts(here: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(nn.Linear(8, 8), torch.zeros(1, 8))
        torch.jit.save(traced, here / "script.pt")
        with pytest.raises(RuntimeError):  # torch itself cannot save a module with a traced part in it
            torch.save(nn.Sequential(traced, nn.Linear(8, 2)), here / "part.pt")
    with pytest.raises(FileError, match=r"TorchScript.*torch\.export\.save.*--arch"):
        open_source(here / "script.pt")
    state = open_source(saved(nn.Sequential(traced, nn.Linear(8, 2)).state_dict()))  # but its state dict can be used
    assert torch.equal(state.tensors["0.weight"], traced.weight)


SCRIPT = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

if __name__ == "__main__":
    torch.manual_seed(0)
    net = Net()
    torch.save(net, "script.pt")
    torch.save(net.state_dict(), "state.pt")
"""


def test_a_class_of_a_script_is_refused_and_both_ways_out_work(here: Path) -> None:
    (here / "trapscript.py").write_text(SCRIPT)
    subprocess.run([sys.executable, "trapscript.py"], check=True)
    with pytest.raises(UnsafeError, match=r"__main__\.Net.*into a module \(net\.py\).*--trust net.*--arch net:make"):
        open_source("script.pt")
    with pytest.raises(UsageError, match="--trust __main__"):
        open_source("script.pt", trust=("__main__",))
    again = "import torch, trapscript\nfrom trapscript import Net\ntorch.manual_seed(0); torch.save(Net(), 'again.pt')"
    subprocess.run([sys.executable, "-c", again], check=True)
    first = open_source("again.pt", trust=("trapscript",))
    second = open_source("state.pt", arch="trapscript:Net")
    assert first.module is not None
    assert second.module is not None
    assert all(torch.equal(a, b) for a, b in zip(first.tensors.values(), second.tensors.values(), strict=True))
