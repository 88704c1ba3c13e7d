"""Exported programs (`.pt2`): in as any model, out as a trainable module, and back to a program."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import zoo
from padconvert import ConvertOptions
from padconvert import export as export_artefact
from padconvert.__main__ import main
from padconvert.checkpoint.read import read_checkpoint
from padconvert.convert import convert
from padconvert.errors import FileError, UsageError, VerificationError
from padconvert.inspection import inspect_file
from padconvert.load import open_source
from padconvert.load.artefact import load
from padconvert.load.audit import audit
from padconvert.load.exported_lift import ExportedModule
from padconvert.rewrite import pad_layers
from padconvert.verify import distance, verify
from padconvert.walk import walk
from padconvert.walk.probe import ProbeSpec, call, find_probe, flat_outputs
from padconvert.words import Verdict

EVERYTHING = "rules=[{name: '*', convert: true}]"
#: entries of the zoo, and how many layers of each become modules again
NETS = {
    "albert_shared_layers": None,
    "audio_1d_dilated": None,
    "autoencoder_transposed": 2,
    "bert": None,
    "bert_masked_lm_tied": None,
    "densenet": None,
    "efficientnet_se": None,
    "frozen": 4,
    "grouped_dilated": 4,
    "half_precision": 4,
    "lstm_linear": 2,
    "module_reused": 4,
    "padding_modes": None,
    "segmentation_dict_output": None,
    "siamese_called_twice": None,
    "transformers_resnet": None,
    "video_3d": None,
    "vit": None,
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2}
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def export(model: nn.Module, probe: ProbeSpec, path: Path, *, dynamic: bool = True) -> ExportedProgram:
    """The program of a model, saved; the first dimension of every input is dynamic."""
    args, kwargs = probe.make(3)
    batch = {0: Dim.DYNAMIC} if dynamic else None
    shapes: Any = tuple(batch for _ in args) if not kwargs else dict.fromkeys(kwargs, batch)
    program = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes)
    torch.export.save(program, path)
    return program


def outputs(model: nn.Module, probe: ProbeSpec, batch: int) -> list[Tensor]:
    args, kwargs = probe.make(batch)
    with torch.no_grad():
        return flat_outputs(call(model, args, kwargs))


def opened(path: Path) -> ExportedModule:
    module = open_source(path).module
    assert isinstance(module, ExportedModule)
    return module


# torch says so of recurrent layers, whose weights it looks at
@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("name", list(NETS))
def test_a_program_is_the_same_function_before_and_after_conversion(name: str, tmp_path: Path) -> None:
    model, probe = zoo.build(name)
    path = tmp_path / "model.pt2"
    program = export(model, probe, path).module()
    module = opened(path)
    for batch in (3, 5):
        wanted = outputs(program, probe, batch)
        assert distance(wanted, outputs(module, probe, batch)) == (0.0, 0.0)
    state = module.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert {k: p.requires_grad for k, p in module.named_parameters()} == {
        k: p.requires_grad for k, p in model.named_parameters() if k in dict(module.named_parameters())
    }
    lifted = {layer for layer in module.modules() if isinstance(layer, LAYERS)}
    assert len(lifted) == (NETS[name] or len({layer for layer in model.modules() if isinstance(layer, LAYERS)}))
    for granularity in ("element", "channel"):
        check_conversion(path, granularity, probe, wanted)


def check_conversion(path: Path, granularity: str, probe: ProbeSpec, wanted: list[Tensor]) -> None:
    output = path.with_name(f"{granularity}.pad.safetensors")
    result = convert(path, ConvertOptions(output=output, sets=(EVERYTHING,), granularity=granularity))
    assert result.source.kind == "exported"
    assert result.equality is not None
    assert (result.equality.method, result.equality.passed) == ("forward", True)
    converted = {layer.name for layer in result.layers if layer.verdict is Verdict.CONVERT}
    reloaded = load(output)
    assert converted
    assert set(pad_layers(reloaded)) == converted
    found = outputs(reloaded, probe, 5)
    assert distance(wanted, found)[1] <= TOLERANCE[wanted[0].dtype]
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in wanted]


class Traps(nn.Module):
    """A buffer that nobody reads, one that is not saved, a constant, a dict in a tuple, arguments left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("unread", torch.arange(3.0))
        self.register_buffer("unsaved", torch.tensor([2.0, 3.0]), persistent=False)
        self.constant = torch.tensor([0.5, -0.5])
        self.norm.running_mean = torch.rand(4)

    def forward(self, x: Tensor, scale: float = 2.0, nothing: None = None) -> tuple[dict[str, Tensor], list[Tensor]]:
        del nothing
        hidden = torch.relu(self.norm(self.conv(x))).masked_fill(x[:, :1] > 1e9, float("-inf"))
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            weights = torch.arange(4, device=x.device).to(hidden.dtype) * scale
        out = self.head(hidden.mean((2, 3)) * weights) * self.unsaved + self.constant
        return {"logits": out, "twice": torch.cat([out, out])}, [hidden]


@pytest.fixture
def traps(tmp_path: Path) -> tuple[Traps, Path]:
    torch.manual_seed(0)
    model = Traps().eval()
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC}, None, None)
    program = torch.export.export(model, (torch.randn(4, 3, 8, 8), 2.0, None), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    return model, tmp_path / "model.pt2"


def test_everything_of_the_model_comes_back(traps: tuple[Traps, Path]) -> None:
    model, path = traps
    module = copy.deepcopy(opened(path))
    x = torch.randn(7, 3, 11, 8)
    (wanted, [hidden]), (found, [same]) = model(x), module(x)
    assert list(found) == ["logits", "twice"]
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert torch.equal(hidden, same)
    assert list(module.state_dict()) == list(model.state_dict())
    assert module.extra_tensors().keys() == {"unsaved", "constant"}
    module.train()
    module(x)[0]["logits"].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_graph_follows_its_module_to_another_device(traps: tuple[Traps, Path]) -> None:
    module = opened(traps[1])
    twin = copy.deepcopy(module).to("meta")
    (found, _) = twin(torch.empty(2, 3, 8, 8, device="meta"))
    assert found["logits"].device.type == "meta"
    assert module(torch.ones(2, 3, 8, 8))[0]["logits"].device.type == "cpu"


def test_a_program_brings_its_inputs_along(traps: tuple[Traps, Path], tmp_path: Path) -> None:
    probe = find_probe(opened(traps[1]), None)
    assert probe is not None
    assert (probe.inputs[0].shape, probe.inputs[0].dtype) == ((3, 8, 8), "float32")
    model, given = zoo.build("bert")
    named = dataclasses.replace(given, inputs=(*given.inputs, zoo.ids(2, name="attention_mask")))
    export(model, named, tmp_path / "bert.pt2")
    found = find_probe(opened(tmp_path / "bert.pt2"), None)
    assert found is not None
    assert [(spec.name, spec.high, spec.low) for spec in found.inputs] == [
        ("input_ids", 50, 0), ("attention_mask", 2, 1)
    ]  # fmt: skip


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.block = nn.Linear(4, 4)
        self.again = self.block
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.again(self.block(self.table(ids))))
        return out


def test_ties_come_back_as_one_parameter_and_a_module_used_twice_as_one_module(tmp_path: Path) -> None:
    probe = ProbeSpec((zoo.ids(10),), 0, "test")
    export(Tied(), probe, tmp_path / "model.pt2")
    module = opened(tmp_path / "model.pt2")
    assert module.get_parameter("head.weight") is module.get_parameter("table.weight")
    assert module.get_submodule("block") is module.get_submodule("again")
    result = convert(tmp_path / "model.pt2", ConvertOptions(sets=(EVERYTHING,)))
    layers = {layer.name: (layer.aliases, layer.verdict, layer.reason) for layer in result.layers}
    assert layers["block"][:2] == (("again",), Verdict.CONVERT)
    assert layers["head"][1:] == (Verdict.INELIGIBLE, "tied_weight")
    reloaded = load(tmp_path / "model.pad.safetensors")
    assert reloaded.get_submodule("block") is reloaded.get_submodule("again")
    assert distance(outputs(module, probe, 3), outputs(reloaded, probe, 3))[1] <= 1e-5


def test_roles_are_those_of_the_module_itself(tmp_path: Path) -> None:
    for name in ("bert", "vit", "transformers_resnet"):
        model, probe = zoo.build(name)
        export(model, probe, tmp_path / f"{name}.pt2")
        wanted = {layer.name: layer.role for layer in walk(model, probe).layers}
        assert {layer.name: layer.role for layer in walk(opened(tmp_path / f"{name}.pt2"), probe).layers} == wanted


def test_a_trained_conversion_of_a_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(8, 2),
    )  # fmt: skip
    export(model, ProbeSpec((zoo.floats(1, 8, 8),), 0, "test"), tmp_path / "model.pt2")
    x = np.random.default_rng(0).normal(size=(128, 1, 8, 8)).astype("float32")
    np.savez(tmp_path / "train.npz", x=x, y=(x.mean((1, 2, 3)) > 0).astype("int64"))
    options = ConvertOptions(data=(str(tmp_path / "train.npz"),), steps=20, batch_size=16, lr=0.05, dynamic_ratio=0.3)
    result = convert(tmp_path / "model.pt2", options)
    assert result.route == "trained"
    artefact = tmp_path / "model.pad.safetensors"
    before, after = opened(tmp_path / "model.pt2"), load(artefact)
    assert not torch.equal(after.get_parameter("7.weight"), before.get_parameter("7.weight"))
    (converted,) = [layer for layer in result.layers if layer.verdict is Verdict.CONVERT]
    assert (converted.name, converted.n_dynamic) == ("2", round(0.3 * 288))
    assert verify(artefact).passed
    # and on from the artefact, which holds no code either
    more = dataclasses.replace(options, output=tmp_path / "more.pad.safetensors", dynamic_ratio=None)
    assert convert(artefact, more).route == "trained"
    assert read_checkpoint(tmp_path / "more.pad.safetensors").manifest.architecture["kind"] == "graph"


def test_inspect_and_audit_list_what_is_in_a_program(traps: tuple[Traps, Path]) -> None:
    found = inspect_file(traps[1], ConvertOptions())
    assert {layer.name: layer.type for layer in found.layers} == {"conv": "Conv2d", "head": "Linear"}
    report = audit(traps[1])
    assert (report.kind, report.refused, report.verdict) == ("exported", [], "loads")
    assert "operation torch.ops.aten.conv2d.default" in report.names
    assert any(name.startswith("size Symbol('s") for name in report.names)
    assert any(name.endswith("data/sample_inputs/model.pt") for name in report.names)


def test_a_program_of_training_mode_is_refused_with_the_next_step(tmp_path: Path) -> None:
    for layer in (nn.BatchNorm1d(4), nn.Dropout(0.5)):
        program = torch.export.export(nn.Sequential(nn.Linear(4, 4), layer).train(), (torch.randn(3, 4),))
        torch.export.save(program, tmp_path / "model.pt2")
        with pytest.raises(FileError, match=r"training mode.*after model\.eval"):
            open_source(tmp_path / "model.pt2")


def test_a_fixed_batch_is_said(tmp_path: Path) -> None:
    model, probe = zoo.build("mlp")
    export(model, probe, tmp_path / "model.pt2", dynamic=False)
    assert any("batch of 3" in note for note in open_source(tmp_path / "model.pt2").notes)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, while it decomposes
def test_decomposed_programs_load_and_what_is_no_layer_there_stays_in_the_graph(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    program = torch.export.export(model, (torch.randn(3, 3, 8, 8),), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(program.run_decompositions(), tmp_path / "model.pt2")
    module = opened(tmp_path / "model.pt2")
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(module(x), program.run_decompositions().module()(x))
    assert [type(layer) for layer in module.modules() if isinstance(layer, LAYERS)] == [nn.Conv2d]


# ---- and back ----------------------------------------------------------------------------------------------------

ALONE = """
import sys
sys.modules["padconvert"] = sys.modules["transformers"] = None
import torch
module = torch.export.load(sys.argv[1]).module()
given = torch.load(sys.argv[2])
wanted = given.pop("wanted")
args, kwargs = given["args"], given["kwargs"]
found = module(*args, **kwargs)
found = next(iter(found.values())) if isinstance(found, dict) else found
assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (found - wanted).abs().max()
print("same")
"""


@pytest.mark.parametrize(("name", "granularity"), [("grouped_dilated", "element"), ("bert", "channel")])
def test_an_artefact_becomes_a_program_that_needs_neither_padconvert_nor_transformers(
    name: str, granularity: str, tmp_path: Path
) -> None:
    model, probe = zoo.build(name)
    torch.save(model, tmp_path / "model.pt")
    artefact, program = tmp_path / "model.pad.safetensors", tmp_path / "out.pt2"
    # a few layers do: torch takes its time for each operation
    some = f"rules=[{{name: '{'body.*' if name == 'grouped_dilated' else '*.1.output.dense'}', convert: true}}]"
    args, kwargs = probe.make(6)
    options = ConvertOptions(sets=(some,), granularity=granularity, trust=("zoo_convolutions",))
    convert(tmp_path / "model.pt", options)
    differ_(artefact, kwargs or args[0])
    result = export_artefact(artefact, program, trust=("zoo_convolutions",))
    assert result.passed
    assert [check.value for check in result.checks if check.name == "batch"] == ["dynamic"]
    with torch.no_grad():
        wanted = flat_outputs(load(artefact, trust=("zoo_convolutions",))(*args, **kwargs))[0]
    assert not torch.allclose(wanted, outputs(model, probe, 6)[0], atol=1e-4)
    torch.save({"args": args, "kwargs": kwargs, "wanted": wanted}, tmp_path / "given.pt")
    command = [sys.executable, "-c", ALONE, str(program), str(tmp_path / "given.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr
    # a program of ours is an input again
    again = opened(program)
    assert distance([wanted], outputs(again, probe, 6)[:1])[1] <= 1e-5


def differ_(artefact: Path, inputs: Any) -> None:
    """Give the artefact's experts values of their own, so that a wrong mix shows."""
    from padconvert import save

    model = load(artefact, trust=("zoo_convolutions",))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in pad_layers(model).values():
            for part in layer.parts:
                dynamic = getattr(layer, f"{part}_dynamic")
                if dynamic is not None:
                    dynamic.add_(torch.randn(dynamic.shape, generator=generator) * 0.3)
    save(model, artefact, inputs=inputs, force=True, trust=("zoo_convolutions",))


def test_mixing_outputs_is_the_same_as_mixing_weights() -> None:
    """What an export computes, against what the layer computes otherwise."""
    from padconvert.layers.build import upcycle
    from padconvert.layers.paths import aggregate, mix
    from padconvert.words import Granularity, Routing

    for groups, mode in ((1, "zeros"), (2, "circular")):
        source = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, padding_mode=mode).double()  # type: ignore[arg-type]
        layer = upcycle(
            source, num_experts=3, granularity=Granularity.ELEMENT, router="linear", routing=Routing.MAP,
            learned_scales=True, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter))
        x = torch.randn(5, 4, 7, 7, dtype=torch.float64)
        mixed, aggregated = mix.convolve(layer, x), aggregate.convolve(layer, x)  # type: ignore[arg-type]
        torch.testing.assert_close(mixed, aggregated, rtol=0, atol=1e-10)
        assert (aggregated - source(x)).abs().max() > 0.1


def test_a_program_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = zoo.build("mlp")
    torch.save(model, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", ConvertOptions(sets=(EVERYTHING,), trust=("zoo_sequences", "zoo_traps")))
    exported = torch.export.export

    def wrong(module: nn.Module, *args: Any, **kwargs: Any) -> ExportedProgram:
        module = copy.deepcopy(module)
        with torch.no_grad():
            next(module.parameters()).mul_(1.5)
        return exported(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", wrong)
    before = set(tmp_path.iterdir())
    with pytest.raises(VerificationError, match="does not compute what the model computes"):
        export_artefact(tmp_path / "model.pad.safetensors", tmp_path / "out.pt2", trust=("zoo_traps",))
    assert set(tmp_path.iterdir()) == before


def test_the_command_writes_one_document(
    traps: tuple[Traps, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(traps[1], ConvertOptions(sets=(EVERYTHING,)))
    artefact, program = str(tmp_path / "model.pad.safetensors"), str(tmp_path / "out.pt2")
    assert main(["export", artefact, "--format", "pt2", "-o", program, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["passed"]) == ("padconvert.export/1", True)
    x = torch.randn(3, 3, 8, 8)
    found = torch.export.load(program).module()(x)[0]["logits"]
    torch.testing.assert_close(found, traps[0](x)[0]["logits"], rtol=1e-4, atol=1e-5)
    assert main(["export", artefact, "-o", program]) == UsageError.exit_code
    assert main(["export", artefact, "-o", program, "--force"]) == 0
    assert main(["export", str(traps[1]), "-o", str(tmp_path / "x.pt2")]) == FileError.exit_code
