"""`inspect`: verdicts of a source, the header alone of tensors, exact counts of an artefact."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import padconvert
from padconvert.__main__ import main
from padconvert.inspection import inspect_file
from padconvert.options import ConvertOptions
from padconvert.report.json_document import text
from padconvert.results import Inspection
from padconvert.walk import walk
from padconvert.walk.probe import find_probe
from padconvert.words import Reason, Verdict


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 2)
    )


@pytest.fixture
def source(in_tmp: Path) -> Path:
    path = in_tmp / "model.pt"
    torch.save(network(), path)
    return path


def inspected(path: Path, **options: object) -> Inspection:
    return inspect_file(path, ConvertOptions(**options))  # type: ignore[arg-type]


def test_a_source_lists_every_layer_with_its_reason_and_what_would_be_made(source: Path) -> None:
    found = inspected(source, input_shape=(1, 8, 8), sets=("partition.scope=layer",))
    assert [(layer.name, layer.verdict, layer.reason) for layer in found.layers] == [
        ("0", Verdict.STATIC, Reason.STEM_STATIC),
        ("1", Verdict.CONVERT, Reason.POLICY_DEFAULT),
        ("2", Verdict.INELIGIBLE, Reason.TRANSPOSED_CONVOLUTION),
        ("4", Verdict.STATIC, Reason.HEAD_STATIC),
    ]
    entries = 6 * 4 * 9
    layer = found.layers[1]
    assert (layer.weight_shape, layer.n_dynamic, layer.n_static) == ((6, 4, 3, 3), 65, entries - 65)  # ⌊0.3·216 + ½⌋
    numbers = sum(parameter.numel() for parameter in network().parameters())
    router, bias_dynamic = 4 * 4 + 4, 2
    assert found.totals.params_source == numbers
    assert found.totals.params_output == numbers + 3 * (65 + bias_dynamic) + router
    assert found.totals.params_fully_dynamic == numbers + 3 * (entries + 6) + router
    assert (found.totals.layers, found.totals.converted, found.trained) == (4, 1, None)


@pytest.mark.parametrize("several", [True, False])
def test_data_tell_of_how_many_kinds_the_inputs_are(
    several: bool, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of four kinds, each bright in another way, or of one."""
    random = np.random.RandomState(0)
    kind = random.randint(0, 4, 400) if several else np.zeros(400)
    x = random.rand(400, 1, 8, 8) + 6 * kind[:, None, None, None]
    np.savez("train.npz", x=x.astype(np.float32), y=random.randint(0, 2, 400))
    assert main(["inspect", str(source), "--data", "train.npz", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {layer["name"]: layer["separation"] for layer in said["layers"]}
    assert set(found) == {"0", "1", "2", "4"}
    assert [name for name, value in found.items() if value is not None] == ["1"]
    assert (found["1"] > 0.5) is several
    assert said["separation"] == found["1"]
    words = "of several kinds" if several else "of one kind"
    assert any(words in note for note in said["notes"])
    assert main(["inspect", str(source), "--data", "train.npz"]) == 0
    shown = capsys.readouterr().out
    assert any(line.split()[:1] == ["layer"] and line.split()[-1] == "kinds" for line in shown.splitlines())
    assert words in " ".join(shown.split())


def test_few_examples_are_not_judged(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four experts ask for ten points each."""
    random = np.random.RandomState(0)
    np.savez("few.npz", x=random.rand(36, 1, 8, 8).astype(np.float32), y=random.randint(0, 2, 36))
    assert main(["inspect", str(source), "--data", "few.npz", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["separation"] is None
    assert all(layer["separation"] is None for layer in said["layers"])
    assert any("too few examples" in note for note in said["notes"])


def test_data_are_for_a_source_that_can_be_called(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("train.npz", x=np.zeros((8, 1, 8, 8), np.float32), y=np.zeros(8, np.int64))
    save_file(dict(network().state_dict()), "model.safetensors")
    assert main(["inspect", "model.safetensors", "--data", "train.npz"]) == 2
    assert "name what builds its model with --arch" in capsys.readouterr().err
    np.savez("wide.npz", x=np.zeros((8, 3, 8, 8), np.float32), y=np.zeros(8, np.int64))
    assert main(["inspect", str(source), "--data", "wide.npz"]) == 4
    assert "the model cannot take" in capsys.readouterr().err
    for alone in (["--task", "glue/sst2"], ["--text-column", "text"]):
        assert main(["inspect", str(source), *alone]) == 2
        assert "name data with --data" in capsys.readouterr().err
    assert main(["convert", str(source), "-o", "made.pad.safetensors"]) == 0
    capsys.readouterr()
    assert main(["inspect", "made.pad.safetensors", "--data", "train.npz"]) == 2
    assert "name the source instead" in capsys.readouterr().err


def test_nothing_eligible_is_a_finding_and_no_error(in_tmp: Path) -> None:
    torch.save(nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), in_tmp / "up.pt")
    found = inspected(in_tmp / "up.pt")
    assert [layer.reason for layer in found.layers] == [Reason.TRANSPOSED_CONVOLUTION]
    assert found.totals.params_output is None


class Unready(nn.Module):
    """Two blocks of a transformer's shape, in a network whose own forward fails."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, _ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no table for\nthese ids")


def test_where_no_layer_is_left_inspect_and_convert_say_the_same(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    torch.save(nn.Sequential(nn.Embedding(9, 5), block, nn.Sequential(nn.Linear(4, 2))), in_tmp / "unready.pt")
    assert main(["convert", "unready.pt", "-o", "out.safetensors"]) == 5
    said = capsys.readouterr().err
    assert "No block can be proven without a forward, and there was none: no input is known" in said
    found = inspected(in_tmp / "unready.pt")
    reasons = Counter(layer.reason for layer in found.layers)
    assert reasons[Reason.FFN_NOT_PROVEN] == 2, found.layers
    for reason, count in reasons.items():
        assert f"{count} × {reason.value} (" in said


def test_a_source_whose_own_forward_fails_names_its_error() -> None:
    walked = walk(Unready(), find_probe(Unready(), None))
    assert walked.method == "tree"
    assert walked.notes[0].startswith("no input is known")
    assert walked.notes[1] == (
        "a forward on assumed 16 token ids below 9, to suit the first Embedding fails: RuntimeError: no table for"
    )
    assert len(walk(nn.Linear(2, 2), None).notes) == 1  # it has no input either, but takes the likeliest one


def test_tensors_alone_are_listed_as_unknown(in_tmp: Path) -> None:
    save_file(network().state_dict(), in_tmp / "weights.any")
    torch.save(network().state_dict(), in_tmp / "weights.pt")
    for name in ("weights.any", "weights.pt"):
        found = inspected(in_tmp / name)
        assert [layer.name for layer in found.layers] == ["0", "1", "2", "4"]
        assert {(layer.kind, layer.reason) for layer in found.layers} == {("unknown", Reason.NO_ARCHITECTURE)}
        assert found.totals.params_source == sum(value.numel() for value in network().state_dict().values())


def test_of_a_huge_safetensors_file_only_the_header_is_read(in_tmp: Path) -> None:
    """12 GB of holes: reading them would take far longer than a second, and more memory than there is."""
    rows = 3_000_000
    header = {"big.weight": {"dtype": "F32", "shape": [rows, 1000], "data_offsets": [0, rows * 4000]}}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    path = in_tmp / "huge.safetensors"
    path.write_bytes(len(written).to_bytes(8, "little") + written)
    os.truncate(path, 8 + len(written) + rows * 4000)
    start = time.perf_counter()
    found = inspected(path)
    assert time.perf_counter() - start < 1
    assert found.totals.tensor_bytes_source == rows * 4000
    assert found.totals.bytes_source == found.bytes == os.path.getsize(path)
    assert found.layers[0].weight_shape == (rows, 1000)


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_an_artefact_says_what_it_holds(source: Path, granularity: str) -> None:
    result = padconvert.convert(source, ConvertOptions(dynamic_ratio=0.5, granularity=granularity))
    assert result.output is not None
    found = inspected(Path(result.output.path))
    (layer,) = found.layers
    assert (layer.name, layer.granularity, layer.num_experts) == ("1", granularity, 4)
    assert (layer.n_static, layer.n_dynamic, layer.dynamic_ratio) == (108, 108, 0.5)
    assert found.trained is False
    totals = found.totals
    assert totals.params_source is not None
    assert totals.bytes_source is None
    assert totals.bytes_output == os.path.getsize(result.output.path) == found.bytes == result.totals.bytes_output
    assert totals.bytes_header == result.totals.bytes_header
    assert totals.tensor_bytes_source == result.totals.tensor_bytes_source == 4 * totals.params_source
    assert totals.tensor_bytes_output == result.totals.tensor_bytes_output == found.bytes - (totals.bytes_header or 0)
    assert totals.tensor_bytes_fully_dynamic == result.totals.tensor_bytes_fully_dynamic
    assert totals.bytes_fully_dynamic == result.totals.bytes_fully_dynamic
    assert any("checksums were not checked" in note for note in found.notes)
    assert totals.params_source == sum(parameter.numel() for parameter in network().parameters())
    assert totals.params_source == result.totals.params_source
    assert totals.params_fully_dynamic == result.totals.params_fully_dynamic
    assert totals.params_active_source == totals.params_source == result.totals.params_active_source
    # equal experts are one; trained, one weight is mixed for each image, and the router is computed too
    router = 4 * 4 + 4
    assert totals.params_active_output == result.totals.params_active_output == totals.params_source + router
    assert totals.params_active_fully_dynamic == totals.params_source + router
    assert result.totals.params_active_fully_dynamic == totals.params_active_fully_dynamic
    assert totals.bytes_masks == result.totals.bytes_masks == (27 + 1 if granularity == "element" else 3 * 4)
    assert totals.bytes_router == result.totals.bytes_router == 4 * (4 * 4 + 4)
    assert totals.bytes_values == result.totals.bytes_values
    assert found.provenance is not None
    assert result.source.sha256 in str(found.provenance["source"])


def test_the_document_names_its_schema_and_kind(source: Path) -> None:
    document = json.loads(text(inspected(source)))
    assert (document["schema"], document["kind"]) == ("padconvert.inspect/1", "module")
    assert document["layers"][1]["verdict"] == "convert"


def test_a_dry_run_counts_the_file_of_the_source_and_predicts_the_tensors(source: Path) -> None:
    options = ConvertOptions(dynamic_ratio=0.5, plan_out=Path("plan.json"))
    dry = padconvert.convert(source, replace(options, dry_run=True))
    done = padconvert.convert(source, replace(options, force=True))
    assert dry.plan_file == done.plan_file == "plan.json"
    assert dry.totals.bytes_source == done.totals.bytes_source == os.path.getsize(source)
    assert dry.totals.bytes_output == dry.totals.tensor_bytes_output == done.totals.tensor_bytes_output
    assert dry.totals.bytes_output + done.totals.bytes_header == done.totals.bytes_output
    assert dry.totals.tensor_bytes_source == done.totals.tensor_bytes_source == 4 * dry.totals.params_source


def test_a_data_free_result_says_what_training_will_make_of_it(source: Path) -> None:
    result = padconvert.convert(source, ConvertOptions(dynamic_ratio=0.5))
    totals, copied = result.totals, 3 * (108 + 3)
    params = (totals.params_output + copied) / totals.params_source
    size = (totals.tensor_bytes_output + 4 * copied) / totals.tensor_bytes_source
    (said,) = [note for note in result.notes if "fine-tuning makes them differ" in note]
    assert f"{params:.2f}× the source's parameters, {size:.2f}× its tensor bytes" in said
