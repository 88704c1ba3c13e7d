"""The first promise on every network of the zoo: converted without data, it computes what its source computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from padconvert import ConvertOptions, PadconvertError
from padconvert.convert import convert
from padconvert.errors import UnsafeError
from padconvert.load.artefact import load
from padconvert.rewrite import pad_layers
from padconvert.verify import distance
from padconvert.walk.probe import ProbeSpec, call, flat_outputs
from padconvert.words import Verdict

#: convert whatever can be converted, the roles that stay static by default too
EVERYTHING = "rules=[{name: '*', convert: true}]"
TRUST = ("zoo_convolutions", "zoo_sequences", "zoo_traps")
#: no layer of these can be converted, or the file asks for code
REFUSED: dict[str, type[PadconvertError]] = {
    "old_weight_and_spectral_norm": UnsafeError,
}
#: no inputs can be found for these by trying, so they are held together weight by weight
NOT_CALLED = {"mixer_transposed_inputs"}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def outputs(model: nn.Module, probe: ProbeSpec) -> list[torch.Tensor]:
    args, kwargs = probe.make(3)
    with torch.no_grad():
        return flat_outputs(call(model.eval(), args, kwargs))


@pytest.mark.parametrize(("granularity", "dtype"), [("element", "float32"), ("channel", "float64")])
@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - zoo.UNPICKLABLE))
def test_a_converted_network_computes_what_its_source_computes(
    name: str, granularity: str, dtype: str, tmp_path: Path
) -> None:
    model, probe = zoo.build(name)
    if dtype == "float64":
        model, probe = model.double(), probe.with_dtype("float64")
    source, output = tmp_path / "model.pt", tmp_path / "out.pad.safetensors"
    torch.save(model, source)
    options = ConvertOptions(output=output, sets=(EVERYTHING,), granularity=granularity, trust=TRUST)
    if name in REFUSED:
        with pytest.raises(REFUSED[name]):
            convert(source, options)
        assert not output.exists()
        return
    wanted = outputs(model, probe)
    result = convert(source, options)
    converted = {layer.name for layer in result.layers if layer.verdict is Verdict.CONVERT}
    assert converted
    assert {layer.verdict for layer in result.layers} <= {Verdict.CONVERT, Verdict.INELIGIBLE}
    assert result.equality is not None
    assert (result.equality.method, result.equality.passed) == ("weights" if name in NOT_CALLED else "forward", True)
    reloaded = load(output, trust=TRUST)
    assert set(pad_layers(reloaded)) == converted
    found = outputs(reloaded, probe)
    assert distance(wanted, found)[1] <= TOLERANCE[wanted[0].dtype]
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in wanted]


@pytest.mark.parametrize(
    "name", ["torch_encoder_layer", "torch_decoder_layer", "multihead_attention", "functional_reader"]
)
def test_layers_that_a_parent_reads_are_left_alone(name: str, tmp_path: Path) -> None:
    model, _ = zoo.build(name)
    torch.save(model, tmp_path / "model.pt")
    result = convert(tmp_path / "model.pt", ConvertOptions(sets=(EVERYTHING,), trust=TRUST))
    read = [layer for layer in result.layers if layer.reason == "weight_read_by_parent"]
    assert read
    assert all(layer.verdict is Verdict.INELIGIBLE and layer.detail for layer in read)
