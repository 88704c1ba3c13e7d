"""The whole line on published weights and their real data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import nets
from padconvert.__main__ import main
from padconvert.finetune.data.sources import open_eval
from padconvert.finetune.evaluate import evaluate
from padconvert.load import open_source
from padconvert.load.artefact import load
from padconvert.policy import load_policy
from padconvert.rewrite import pad_layers
from padconvert.verify import distance
from padconvert.walk.probe import find_probe, flat_outputs

#: 18 of ResNet-20's convolutions; the stem and the head stay static
ENTRIES = 9 * (6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
DYNAMIC = (3 * ENTRIES + 5) // 10


def said(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """The JSON document of a command that ends well."""
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


# ---- ResNet-20 on CIFAR-10 ---------------------------------------------------------------------------------------


@pytest.fixture
def cifar(data_dir: Path, tmp_path: Path) -> Path:
    """A policy that reads CIFAR-10 as the weights were trained on it."""
    with np.load(data_dir / "cifar10" / "test.npz") as test:
        np.savez(tmp_path / "some.npz", x=test["x"][:400], y=test["y"][:400])
    data = {
        "train": [str(data_dir / "cifar10" / "train_0.npz")],
        "eval": [str(data_dir / "cifar10" / "test.npz")],
        "layout": "nhwc",
        "scale": 255,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "augment": ["crop", "flip"],
    }
    policy = {"version": 1, "extends": "paper", "data": data, "partition": {"batches": 2}}
    policy["train"] = {"steps": 6, "batch_size": 16, "warmup": 0.34}
    (tmp_path / "policy.yaml").write_text(json.dumps(policy))
    return tmp_path / "policy.yaml"


@pytest.fixture
def resnet(data_dir: Path) -> Path:
    return data_dir / "weights" / "resnet20-12fca82f.th"


def test_the_published_accuracy_is_reproduced(resnet: Path, cifar: Path) -> None:
    """91.73 % on all 10,000 test images, from a legacy file of CUDA storages under the prefix `module.`."""
    source = open_source(resnet, arch="nets:resnet20")
    assert source.module is not None
    assert any("module." in note for note in source.notes)
    spec = load_policy(cifar).policy.data
    assert round(evaluate(source.module, open_eval(spec, spec.eval), 250)["accuracy"], 4) == 0.9173


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_trained_resnet_keeps_its_promises(
    scope: str, resnet: Path, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artefact, some = tmp_path / "resnet.pad.safetensors", tmp_path / "some.npz"
    asked = ["convert", resnet, "--arch", "nets:resnet20", "--policy", cifar, "--set", f"partition.scope={scope}"]
    asked += ["--eval-data", some, "-o", artefact]
    planned = said(capsys, *asked, "--dry-run")
    assert not artefact.exists()
    done = said(capsys, *asked)

    equality = done["equality"]
    assert (equality["method"], equality["passed"], equality["samples"]) == ("forward", True, 256 + 8)
    assert equality["max_rel_diff"] <= 1e-5
    assert equality["max_abs_diff"] > 0  # two different computations were compared

    for key in ("bytes_values", "bytes_masks", "bytes_router", "params_output"):
        assert planned["totals"][key] == done["totals"][key], key
    layers = {layer["name"]: layer for layer in done["layers"] if layer["verdict"] == "convert"}
    assert len(layers) == 18
    found = sum(layer["n_dynamic"] for layer in layers.values())
    assert found == (DYNAMIC if scope == "global" else sum(exactly(layer) for layer in layers.values()))
    assert done["totals"]["bytes_values"] == 4 * (ENTRIES - found + 4 * found)
    assert done["totals"]["bytes_masks"] == ENTRIES // 8
    if scope == "global":
        assert len({layer["n_dynamic"] * ENTRIES // exactly(layer) for layer in layers.values()}) > 2

    # 400 images at 92 %: ± 0.027 is chance
    assert abs(done["metrics"]["source"]["accuracy"] - 0.9173) < 0.04
    held = said(capsys, "verify", artefact, "--trust", "nets", "--data", some)
    checks = {check["name"]: check for check in held["checks"]}
    assert held["passed"]
    assert checks["accuracy"]["value"] == done["metrics"]["output"]["accuracy"]
    assert checks["accuracy"]["value"] > done["metrics"]["source"]["accuracy"] - 0.05
    assert all(layer.weight_dynamic is not None for layer in pad_layers(load(artefact, trust=["nets"])).values())


def exactly(layer: dict[str, Any]) -> int:
    """⌊0.3·n + ½⌋"""
    return int((3 * (layer["n_static"] + layer["n_dynamic"]) + 5) // 10)


# ---- Fashion-MNIST and MTCNN -------------------------------------------------------------------------------------


def idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file: two zero bytes, the type, the number of dimensions, big-endian sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape([int(size) for size in sizes])


def test_fashion_net_without_data(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, artefact = data_dir / "weights" / "fashion_net_ex.pt", tmp_path / "fashion.pad.safetensors"
    images, labels = (
        data_dir / "fashion_mnist" / f"t10k-{name}.gz" for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    np.savez(tmp_path / "test.npz", x=idx(images)[:, None], y=idx(labels))
    done = said(
        capsys, "convert", source, "--arch", "nets:fashion_net", "-o", artefact, "--set", "data.scale=255",
    )  # fmt: skip
    assert (done["route"], done["equality"]["method"], done["equality"]["passed"]) == ("data-free", "forward", True)
    converted = {layer["name"] for layer in done["layers"] if layer["verdict"] == "convert"}
    assert converted == {"conv2", "fc1"}
    inspected = said(capsys, "inspect", artefact)
    assert inspected["trained"] is False
    n_dynamic = {layer["name"]: layer["n_dynamic"] for layer in inspected["layers"] if layer["verdict"] == "convert"}
    assert n_dynamic == {"conv2": 540, "fc1": 7500}
    held = said(
        capsys, "verify", artefact, "--against", source, "--arch", "nets:fashion_net", "--data", tmp_path / "test.npz",
    )  # fmt: skip
    checks = {check["name"]: check for check in held["checks"]}
    assert held["passed"]
    assert 0 < checks["same function as the source"]["value"] <= 1e-5
    assert checks["accuracy"]["value"] == 0.8835


def test_onet_without_data(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three heads, PReLU, unpadded convolutions that need 48 pixels a side, which nobody says."""
    source, artefact = data_dir / "weights" / "onet.pt", tmp_path / "onet.pad.safetensors"
    done = said(capsys, "convert", source, "--arch", "nets:onet", "-o", artefact, "--granularity", "channel")
    converted = {layer["name"]: layer for layer in done["layers"] if layer["verdict"] == "convert"}
    assert set(converted) == {"conv2", "conv3", "conv4", "dense5"}
    rows = {name: int(0.3 * nets.onet().get_parameter(f"{name}.weight").shape[0] + 0.5) for name in converted}
    per_row = {"conv2": 32 * 9, "conv3": 64 * 9, "conv4": 64 * 4, "dense5": 1152}
    assert {name: layer["n_dynamic"] for name, layer in converted.items()} == {n: rows[n] * per_row[n] for n in rows}
    inspected = said(capsys, "inspect", artefact)
    assert inspected["trained"] is False
    held = said(capsys, "verify", artefact, "--against", source, "--arch", "nets:onet")
    checks = {check["name"]: check for check in held["checks"]}
    assert held["passed"]
    assert checks["probe"]["value"] is not None
    assert done["equality"]["method"] == "forward"

    module = open_source(source, arch="nets:onet").module
    assert module is not None
    probe = find_probe(module, (1, 3, 48, 48))
    assert probe is not None
    args, _ = probe.make(2)
    with torch.no_grad():
        wanted, found = (flat_outputs(net.eval()(*args)) for net in (module, load(artefact, trust=["nets"])))
    assert [tuple(tensor.shape) for tensor in found] == [(2, 4), (2, 10), (2, 2)]
    assert distance(wanted, found)[1] <= 1e-5
