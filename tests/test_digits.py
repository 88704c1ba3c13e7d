"""Trained conversions on the UCI digits as two sensors see them: determinism, scores, comparison, going on, halves."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import nets
from padconvert import ConvertOptions
from padconvert.checkpoint.read import Checkpoint, read_checkpoint
from padconvert.convert import convert
from padconvert.finetune.data.sources import open_data
from padconvert.finetune.loop import scoring_losses
from padconvert.finetune.train import Trainer
from padconvert.layers.pad import PadLayer
from padconvert.load.artefact import load
from padconvert.partition.evidence import measure
from padconvert.partition.scores import Need, score_named
from padconvert.plan import make_plan
from padconvert.policy import load_policy
from padconvert.progress import Silent
from padconvert.results import Conversion
from padconvert.rewrite import pad_layers, rewrite_
from padconvert.verify import verify
from padconvert.walk import walk

#: the second and third convolution of `nets.digits_net` have 6·6·9 entries each
ENTRIES = 2 * 324


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt, trained for a while, with train.npz and test.npz."""
    place = tmp_path_factory.mktemp("digits")
    train, test = nets.digits()
    np.savez(place / "train.npz", x=train["x"], y=train["y"])
    np.savez(place / "test.npz", x=test["x"], y=test["y"])
    torch.manual_seed(0)
    model = nets.digits_net()
    nets.fit(model, train, 150)
    torch.save(model, place / "model.pt")
    return place


def options(folder: Path, output: Path, **settings: object) -> ConvertOptions:
    """A short trained conversion; `a__b=c` is the policy setting a.b."""
    sets = {"train__optimizer": "adamw", "train__lr": 0.005, "partition__batches": 4} | {
        key: value for key, value in settings.items() if "__" in key
    }
    said = tuple(f"{key.replace('__', '.')}={value}" for key, value in sets.items())
    rest = {"steps": 30, "force": True} | {key: value for key, value in settings.items() if "__" not in key}
    return ConvertOptions(
        output=output,
        data=(str(folder / "train.npz"),),
        eval_data=(str(folder / "test.npz"),),
        sets=said,
        **rest,  # type: ignore[arg-type]
    )


def masks(checkpoint: Checkpoint) -> dict[str, bytes]:
    names = [name for name in checkpoint.header.tensors if name.endswith(("_bitmask", "_index"))]
    return {name: checkpoint.tensor(name).numpy().tobytes() for name in names}


def accuracies(result: Conversion) -> tuple[float, float]:
    assert result.metrics is not None
    return result.metrics.source["accuracy"], result.metrics.output["accuracy"]


# ---- determinism -------------------------------------------------------------------------------------------------

JOBS = """
import sys
from pathlib import Path
import torch
from padconvert import ConvertOptions, convert
torch.set_num_threads(1)
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
for name, seed, granularity, data in (
    ("data_free_element", 3, "element", ()), ("data_free_channel", 3, "channel", ()),
    ("trained_element", 3, "element", ("train.npz",)), ("trained_channel", 3, "channel", ("train.npz",)),
    ("other_data_free", 4, "element", ()), ("other_trained", 4, "element", ("train.npz",)),
):
    steps, batch = (10, 32) if data else (None, None)
    options = ConvertOptions(output=out / name, seed=seed, granularity=granularity, steps=steps, batch_size=batch,
                             data=tuple(str(folder / one) for one in data),
                             sets=("train.warmup=0.3", "partition.batches=2", "train.lr=0.05"))
    convert(folder / "model.pt", options)
"""


def test_two_processes_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    running = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        words = [sys.executable, "-c", JOBS, str(folder), str(tmp_path / str(number))]
        running.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    assert [(process.communicate()[1], process.returncode)[1] for process in running] == [0, 0]
    files = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}
    assert len(files) == 6
    for name, content in files.items():
        assert (tmp_path / "2" / name).read_bytes() == content, name
    assert len(set(files.values())) == 6
    assert tensors_of(tmp_path / "1" / "other_trained") != tensors_of(tmp_path / "1" / "trained_element")
    assert tensors_of(tmp_path / "1" / "other_data_free") != tensors_of(tmp_path / "1" / "data_free_element")


def tensors_of(path: Path) -> list[bytes]:
    """All tensors' bytes, without the header (which names the seed)."""
    checkpoint = read_checkpoint(path)
    tensors = [checkpoint.tensor(name).reshape(-1) for name in checkpoint.header.tensors]
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors]


# ---- scores ------------------------------------------------------------------------------------------------------


def test_taylor_ranks_as_the_true_loss_change_of_a_convolution(folder: Path) -> None:
    """On 60 entries of a layer that the library's own loop has warmed up."""
    settings = {"train.optimizer": "adamw", "train.lr": 0.005, "train.steps": 60, "train.schedule": "constant"}
    settings |= {"data.train": [str(folder / "train.npz")], "partition.micro_batch": 64}
    policy = load_policy(None, None, settings).policy
    source = torch.load(folder / "model.pt", weights_only=False).double()
    data = open_data(policy.data)
    sizes = {name: (tuple(tensor.shape), tensor.element_size()) for name, tensor in source.state_dict().items()}
    plan = make_plan(walk(source), policy, route="trained", seed=0, tensors=sizes)
    model = copy.deepcopy(source)
    rewrite_(model, plan)
    trainer = Trainer.of(plan.policy, data, source, 0, torch.device("cpu"), Silent(), None)
    trainer.set_routers_(model, pad_layers(model))
    trainer.fit_(model, None, "output")

    losses = scoring_losses(model, Need.GRADIENT, trainer.setting, 1)
    name, layer = list(pad_layers(model).items())[-1]
    scores, mean = measure(model, pad_layers(model), score_named("taylor"), losses, torch.Generator())
    random, _ = measure(model, pad_layers(model), score_named("random"), losses, torch.Generator().manual_seed(0))
    units = torch.randperm(324, generator=torch.Generator().manual_seed(0))[:60]
    changes = true_changes(model, name, layer, units, mean[name], losses)
    assert float(spearmanr(scores[name, "weight"][units], changes).statistic) >= 0.9
    assert float(spearmanr(random[name, "weight"][units], changes).statistic) < 0.5


def true_changes(
    model: nn.Module, name: str, layer: PadLayer, units: Tensor, mean: Tensor, losses: object
) -> list[float]:
    """The change of the loss over all micro-batches when a single entry turns static."""
    assert isinstance(losses, list)

    def total() -> float:
        with torch.no_grad():
            return sum(float(loss()) for loss in losses) / len(losses)

    model.eval()
    before, changes = total(), []
    for unit in units.tolist():
        one = copy.deepcopy(layer)
        one.partition_("weight", torch.arange(324) != unit, mean)
        model.set_submodule(name, one)
        changes.append(abs(total() - before))
    model.set_submodule(name, layer)
    return changes


# ---- a trained conversion ----------------------------------------------------------------------------------------


def test_comparison_on_two_sensors(folder: Path, tmp_path: Path) -> None:
    artefact = tmp_path / "out.pad.safetensors"
    done = convert(folder / "model.pt", options(folder, artefact, steps=120, compare=True))
    metrics = done.metrics
    assert metrics is not None
    assert metrics.static is not None
    assert metrics.fully_dynamic is not None
    each = [metrics.source, metrics.output, metrics.static, metrics.fully_dynamic]
    assert len({one["loss"] for one in each}) == 4
    assert all(0.3 < one["accuracy"] <= 1 for one in each)
    assert all(one["loss"] < metrics.source["loss"] for one in each[1:])
    assert "static model" in metrics.verdict

    losses = [entry["loss"] for entry in done.history if "loss" in entry]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])
    rounds = [entry["n_dynamic"] for entry in done.history if "round" in entry]
    assert rounds == sorted(rounds, reverse=True)
    assert len(rounds) == 5
    wanted = int(Decimal("0.3") * ENTRIES + Decimal("0.5"))
    assert rounds[-1] == wanted
    assert done.totals.dynamic_ratio == wanted / ENTRIES

    model = load(artefact)
    assert set(pad_layers(model)) == {"3", "6"}
    for layer in pad_layers(model).values():
        assert layer.weight_dynamic is not None
        assert float(layer.weight_dynamic.detach().std(0).mean()) > 0.01
    held = verify(artefact, against=folder / "model.pt", data=[str(folder / "test.npz")])
    assert held.passed
    assert next(check.value for check in held.checks if check.name == "accuracy") == metrics.output["accuracy"]


def test_a_fine_tune_that_costs_accuracy_is_warned_of(folder: Path, tmp_path: Path) -> None:
    ruined = options(folder, tmp_path / "out", train__lr=0.3, partition__score="random")
    done = convert(folder / "model.pt", ruined)
    before, after = accuracies(done)
    assert after < before
    assert done.warnings[0].startswith("The output does worse than its source, untrained: −")
    assert done.warnings[0].endswith("Try a lower learning rate (--lr, now 0.3).")
    gentle = convert(folder / "model.pt", replace(ruined, sets=("train.lr=1.0e-7", "partition.score=random")))
    assert not any("its source" in line for line in gentle.warnings)


def test_a_verdict_after_a_loss_comes_with_what_to_try(folder: Path, tmp_path: Path) -> None:
    """The experts alone learn far too fast: the static control does not suffer."""
    asked = options(folder, tmp_path / "out", train__lr=0.001, train__expert_lr_scale=1000, partition__score="random")
    done = convert(folder / "model.pt", replace(asked, compare=True))
    assert done.metrics is not None
    assert done.metrics.verdict.startswith("A loss against fine-tuning the static model")
    assert done.metrics.verdict.endswith("(--set train.expert_lr_scale=1) or a lower learning rate (--lr, now 0.001).")
    assert done.warnings[0].endswith("is chance.")  # said once


def test_going_on_from_a_data_free_artefact_chooses_anew(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "free.pad.safetensors", tmp_path / "trained.pad.safetensors"
    convert(folder / "model.pt", ConvertOptions(output=first))
    done = convert(first, options(folder, second))
    assert done.route == "trained"
    assert any("chosen anew" in note for note in done.notes)
    assert done.equality is not None
    assert done.equality.max_rel_diff <= 1e-5
    straight = convert(folder / "model.pt", options(folder, tmp_path / "straight.pad.safetensors"))
    assert tensors_of(second) == tensors_of(tmp_path / "straight.pad.safetensors")
    assert straight.metrics == done.metrics
    before, after = masks(read_checkpoint(first)), masks(read_checkpoint(second))
    assert set(before) == set(after)
    assert before != after
    assert read_checkpoint(second).manifest.trained
    again = tmp_path / "again.pad.safetensors"
    convert(first, ConvertOptions(output=again, dynamic_ratio=0.5))
    checks = [check.name for check in verify(again, against=first).checks if check.passed]
    assert checks == ["checksums", "loads", "probe", "source sha256", "same function as the source"]


@pytest.mark.parametrize(("steps", "short"), [(5, True), (30, False)])
def test_a_short_fine_tune_is_called_one(steps: int, short: bool, folder: Path, tmp_path: Path) -> None:
    """Of 64 examples, as the batch: 5 passes, and 30."""
    data = np.load(folder / "train.npz")
    np.savez(tmp_path / "few.npz", x=data["x"][:64], y=data["y"][:64])
    asked = replace(options(folder, tmp_path / "out", steps=steps), data=(str(tmp_path / "few.npz"),))
    done = convert(folder / "model.pt", asked)
    said = [note for note in done.notes if "show each training example" in note]
    assert [note.split(". ")[0] for note in said] == (["5 steps show each training example 5 times"] if short else [])
    assert not any("show each" in note for note in convert(folder / "model.pt", ConvertOptions(dry_run=True)).notes)


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_going_on_from_a_trained_artefact_keeps_the_partition(granularity: str, folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.pad.safetensors", tmp_path / "second.pad.safetensors"
    begun = convert(folder / "model.pt", options(folder, first, granularity=granularity))
    assert begun.output is not None
    done = convert(first, options(folder, second))
    assert any("partition stays" in note for note in done.notes)
    kept = masks(read_checkpoint(first))
    assert len(kept) == (4 if granularity == "element" else 2)
    assert masks(read_checkpoint(second)) == kept
    assert done.totals.bytes_values == begun.totals.bytes_values
    assert done.totals.dynamic_ratio == begun.totals.dynamic_ratio
    before, after = accuracies(done)
    assert before == accuracies(begun)[1]
    assert after > before - 2 * (2 * before * (1 - before) / 1200) ** 0.5
    assert tensors_of(second) != tensors_of(first)
    held = verify(second, against=first, data=[str(folder / "test.npz")])
    assert held.passed
    found = {check.name: check for check in held.checks}
    assert found["accuracy"].value == after
    assert found["accuracy"].detail == f"the source's {before:.4f} less chance"
    assert read_checkpoint(second).manifest.provenance.source_sha256 == begun.output.sha256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    artefact = tmp_path / "half.pad.safetensors"
    source = torch.load(folder / "model.pt", weights_only=False).to(dtype)
    torch.save(source, tmp_path / "half.pt")
    done = convert(tmp_path / "half.pt", options(folder, artefact))
    assert done.equality is not None
    assert done.equality.method == "forward"
    assert done.equality.max_rel_diff <= 1e-5
    assert all(layer.macs for layer in done.layers)  # it could be called with the data, which is in fp32
    model = load(artefact)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else dtype), name
    trained = dict(model.named_buffers())
    assert all(trained[name].dtype == buffer.dtype for name, buffer in source.named_buffers())
    held = verify(artefact, data=[str(folder / "test.npz")])
    checks = {check.name: check for check in held.checks}
    assert held.passed
    assert checks["probe"].value is not None
    assert checks["accuracy"].value == accuracies(done)[1]  # measured on the rounded values, as the file holds them
    with torch.no_grad():
        x = torch.from_numpy(np.load(folder / "test.npz")["x"][:64]).to(dtype)
        assert model(x).dtype == dtype
