"""The probe: recorded outputs tell equal outputs from others, to the last bit where they were stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import padconvert
from checkpoint_cases import manifest
from padconvert.checkpoint.manifest import ProbeInput, ProbeRecord, manifest_from_json, manifest_to_json
from padconvert.checkpoint.probe_record import MAX_VALUES, compare_outputs, record_outputs
from padconvert.checkpoint.read import read_checkpoint
from padconvert.checkpoint.write import write_checkpoint
from padconvert.errors import FileError, VerificationError
from padconvert.load.audit import audit
from padconvert.load.examine import examine
from padconvert.verify import verify


def record(*outputs: Tensor) -> ProbeRecord:
    """As a manifest gives it back."""
    made = ProbeRecord(3, (ProbeInput(None, (3, 8, 8), "float32", None),), record_outputs(outputs))
    read = manifest_from_json(manifest_to_json(manifest(probe=made)))
    assert read.probe == made
    return made


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(
    st.lists(st.integers(0, 60), max_size=3),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_the_same_outputs_are_at_distance_zero(shape: list[int], dtype: torch.dtype) -> None:
    output = randn(*shape, dtype=dtype)
    made = record(output, output.mT if len(shape) > 1 else output)
    assert compare_outputs(made, [output, output.mT if len(shape) > 1 else output]) == (0.0, 0.0)
    assert made.outputs[0].max_abs == (float(output.double().abs().max()) if output.numel() else 0.0)


def test_distance_is_that_of_the_stored_values() -> None:
    first, second = randn(4, 10), 100 * randn(4, 10, seed=1)
    changed = second.clone()
    changed[2, 3] += 5
    max_abs, max_rel = compare_outputs(record(first, second), [first, changed])
    assert max_abs == pytest.approx(5, rel=1e-6)
    assert max_rel == pytest.approx(5 / float(second.abs().max()), rel=1e-6)
    assert compare_outputs(record(torch.zeros(2)), [torch.full((2,), 2.0**-30)]) == (2.0**-30, math.inf)


def test_doubles_keep_their_last_bits() -> None:
    output = randn(4, 3, dtype=torch.float64)
    max_abs, _ = compare_outputs(record(output), [output + 1e-14])
    assert 0 < max_abs < 2e-14


def test_large_outputs_are_sampled_in_every_column_and_sample() -> None:
    output = randn(4, 64, 1024)
    made = record(output)
    assert len(made.outputs[0].values) < 4 / 3 * 4 * MAX_VALUES + 4
    for at in (0, 3, (..., slice(0, None, 2)), (..., slice(1, None, 2)), (slice(None), 63)):
        changed = output.clone()
        changed[at] += 1
        assert compare_outputs(made, [changed])[0] == pytest.approx(1, rel=1e-6)


def test_values_that_are_not_finite() -> None:
    output = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    made = record(output)
    assert made.outputs[0].max_abs == 1
    assert compare_outputs(made, [output]) == (0.0, 0.0)
    for at, value in [(0, math.nan), (1, 2.0), (1, -math.inf), (3, 0.0)]:
        changed = output.clone()
        changed[at] = value
        assert compare_outputs(made, [changed]) == (math.inf, math.inf)


def test_outputs_of_another_model() -> None:
    made = record(randn(4, 10))
    for outputs, message in [
        ([], "the model gives 0 outputs, 1 were recorded"),
        ([randn(4, 9)], r"output 0 is float32 \(4, 9\), float32 \(4, 10\) was recorded"),
        ([randn(4, 10).double()], r"output 0 is float64 \(4, 10\), float32 \(4, 10\) was recorded"),
    ]:
        with pytest.raises(VerificationError, match=message):
            compare_outputs(made, outputs)


@pytest.mark.parametrize(
    ("values", "message"),
    [("!!!!", "is damaged"), ("AAA=", "is damaged"), ("AAAAAA==", "holds 1 values, 40 belong there"), ("", "holds 0")],
)
def test_a_damaged_record(values: str, message: str) -> None:
    output = randn(4, 10)
    made = record(output)
    damaged = dataclasses.replace(made, outputs=(dataclasses.replace(made.outputs[0], values=values),))
    with pytest.raises(FileError, match=f"the probe's output 0 {message}"):
        compare_outputs(damaged, [output])


FORGED: dict[str, Callable[[ProbeRecord], ProbeRecord]] = {
    "batch": lambda probe: dataclasses.replace(probe, batch=10**9),
    "shape": lambda probe: changed_input(probe, shape=(3, 10**9, 10**9)),
    "empty_and_endless": lambda probe: changed_input(probe, shape=(0, 2**62)),
    "dtype": lambda probe: changed_input(probe, dtype="hub"),
    "high": lambda probe: changed_input(probe, dtype="int64", high=2**70),
    "no_range": lambda probe: changed_input(probe, dtype="int64", high=3, low=3),
    "seed": lambda probe: dataclasses.replace(probe, seed=2**80),
}


def changed_input(probe: ProbeRecord, **changes: object) -> ProbeRecord:
    return dataclasses.replace(probe, inputs=(dataclasses.replace(probe.inputs[0], **changes),))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(FORGED))
def test_a_forged_probe_is_refused_by_every_reader(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pad.safetensors"
    padconvert.save(nn.Sequential(nn.Linear(4, 4)), path, inputs=torch.randn(2, 4))
    checkpoint = read_checkpoint(path)
    assert checkpoint.manifest.probe is not None
    forged = dataclasses.replace(checkpoint.manifest, probe=FORGED[name](checkpoint.manifest.probe))
    write_checkpoint(path, checkpoint.tensors(copy=True), forged, force=True)
    said = set()
    readers: tuple[Callable[[Path], object], ...] = (audit, padconvert.load, verify)
    for reader in readers:
        with pytest.raises(FileError, match="probe's input") as raised:
            reader(path)
        said.add(str(raised.value))
    assert len(said) == 1
    assert examine(path).verdict == "unreadable"
