"""Probes: found by trying, deterministic, stored as JSON; and the reading of outputs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from padconvert.walk.probe import (
    InputSpec,
    ProbeSpec,
    call,
    find_probe,
    flat_outputs,
    from_json,
    probe_of_batch,
    to_json,
)

# Its token mixer fixes the number of patches, which no first layer tells.
NOT_GUESSABLE = {"mixer_transposed_inputs"}

specs = st.builds(
    ProbeSpec,
    inputs=st.lists(
        st.builds(
            InputSpec,
            name=st.none() | st.sampled_from(["input_ids", "pixel_values"]),
            shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
            dtype=st.sampled_from(["float32", "float64", "bfloat16", "int64", "bool"]),
            high=st.none() | st.integers(2, 9),
        ),
        min_size=1,
        max_size=2,
        unique_by=lambda spec: spec.name,
    ).map(tuple),
    seed=st.integers(0, 2**31),
    origin=st.text(),
)


# ---- making inputs -------------------------------------------------------------------------------------------------


@given(specs)
def test_json_brings_back_the_same_spec_and_inputs(spec: ProbeSpec) -> None:
    again = from_json(json.loads(json.dumps(to_json(spec))))
    assert again == spec
    (args, kwargs), (args_again, kwargs_again) = spec.make(3), again.make(3)
    assert all(torch.equal(a, b) for a, b in zip(args, args_again, strict=True))
    assert list(kwargs) == list(kwargs_again)
    assert all(torch.equal(kwargs[name], kwargs_again[name]) for name in kwargs)


def test_inputs_depend_on_the_seed_and_on_nothing_else() -> None:
    spec = ProbeSpec((InputSpec(None, (3, 8), "float32"), InputSpec("ids", (5,), "int64", 7)), 1, "")
    torch.manual_seed(0)
    (x,), named = spec.make(4)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    (x_again,), named_again = spec.make(4)
    (other,), _ = dataclasses.replace(spec, seed=2).make(4)
    assert (x.shape, named["ids"].shape) == ((4, 3, 8), (4, 5))
    assert torch.equal(x, x_again)
    assert torch.equal(named["ids"], named_again["ids"])
    assert not torch.equal(x, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_floats_are_standard_normal_and_the_same_in_every_precision() -> None:
    spec = ProbeSpec((InputSpec(None, (100, 100), "float32"),), 0, "")
    (x,), _ = spec.make(2)
    assert abs(x.mean().item()) < 0.02
    assert abs(x.std().item() - 1) < 0.02
    (double,), _ = spec.with_dtype("float64").make(2)
    (half,), _ = spec.with_dtype("float16").make(2)
    assert double.dtype is torch.float64
    assert torch.equal(double.float(), x)
    assert torch.equal(half, x.half())


def test_integers_stay_below_their_bound_and_reach_it() -> None:
    spec = ProbeSpec((InputSpec(None, (1000,), "int64", 5),), 0, "")
    (ids,), _ = spec.make(2)
    assert sorted(ids.unique().tolist()) == [0, 1, 2, 3, 4]
    assert spec.with_dtype("float16") == spec


def test_a_batch_gives_a_probe_of_its_shapes() -> None:
    batch = {
        "input_ids": torch.tensor([[3, 41, 2], [1, 0, 5]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
        "weights": torch.zeros(2, 4, dtype=torch.float64),
    }
    spec = probe_of_batch(batch)
    assert spec.inputs == (
        InputSpec("input_ids", (3,), "int64", 42),
        InputSpec("attention_mask", (3,), "int64", 2, 1),
        InputSpec("weights", (4,), "float64"),
    )
    _, kwargs = spec.make(5)
    assert kwargs["attention_mask"].tolist() == [[1, 1, 1]] * 5
    assert probe_of_batch(torch.zeros(7, 3, 8)).inputs == (InputSpec(None, (3, 8), "float32"),)


# ---- finding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - NOT_GUESSABLE))
def test_a_probe_is_found_that_the_forward_accepts(name: str) -> None:
    module, known = zoo.build(name)
    found = find_probe(module, None)
    assert found is not None
    assert [spec.dtype for spec in found.inputs] == [spec.dtype for spec in known.inputs]
    args, kwargs = found.make(3)
    with torch.no_grad():
        outputs = flat_outputs(call(module, args, kwargs))
    assert outputs
    assert all(tensor.isfinite().all() for tensor in outputs)


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("resnet", "assumed 3x32x32, to suit the first Conv2d"),
        ("audio_1d_dilated", "assumed 1x256, to suit the first Conv1d"),
        ("video_3d", "assumed 3x8x32x32, to suit the first Conv3d"),
        ("onet_prelu_three_heads", "assumed 3x48x48, to suit the first Conv2d"),
        ("vgg_flatten", "assumed 1x28x28, to suit the first Conv2d"),
        ("mlp", "assumed 12, to suit the first Linear"),
        ("gru_tuple_output", "assumed 16x5, to suit the first Linear"),
        ("causal_lm_tied_head", "assumed 16 token ids below 40, to suit the first Embedding"),
        ("siamese_called_twice", "assumed 1x32x32, to suit the first Conv2d, for each of 2 inputs"),
        ("bert", "the model's config: 16 input_ids below 50"),
        ("vit", "the model's config: pixel_values of 3x32x32"),
        ("t5_encoder_decoder", "the model's config: 16 input_ids below 50 and 16 decoder_input_ids below 50"),
        ("whisper_audio", "the model's config: input_features of 8x32 and 16 decoder_input_ids below 50"),
    ],
)
def test_the_origin_says_what_was_assumed(name: str, origin: str) -> None:
    found = find_probe(zoo.build(name)[0], None)
    assert found is not None
    assert found.origin == origin


@pytest.mark.parametrize("name", sorted(NOT_GUESSABLE))
def test_no_guess_fits_but_a_given_shape_does(name: str) -> None:
    module, known = zoo.build(name)
    assert find_probe(module, None) is None
    found = find_probe(module, (1, *known.inputs[0].shape))
    assert found == ProbeSpec(known.inputs, 0, "the given input shape 1,3,16,16, as numbers")


def test_a_given_shape_is_token_ids_where_an_embedding_comes_first() -> None:
    module, _ = zoo.build("causal_lm_tied_head")
    found = find_probe(module, (1, 9))
    assert found is not None
    assert found.inputs == (InputSpec(None, (9,), "int64", 40),)
    assert found.origin == "the given input shape 1,9, as token ids below 40"


def test_a_given_shape_takes_the_precision_of_the_model() -> None:
    found = find_probe(zoo.build("half_precision")[0], (1, 3, 8, 8))
    assert found is not None
    assert found.inputs == (InputSpec(None, (3, 8, 8), "float16"),)


def test_a_given_shape_that_fails_is_handed_on_for_the_walk_to_explain() -> None:
    found = find_probe(nn.Linear(4, 2), (1, 5))
    assert found is not None
    assert found.inputs == (InputSpec(None, (5,), "float32"),)


class Counting(nn.Module):
    """Counts its forwards, and refuses all but one length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.norm = nn.BatchNorm1d(2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if x.shape[-1] != 1024:
            raise ValueError("not this length")
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


def test_trying_leaves_the_module_alone_also_where_it_fails() -> None:
    module = Counting().train()
    found = find_probe(module, None)
    assert found is not None
    assert found.inputs[0].shape == (1, 1024)
    assert module.calls == 0
    assert module.training
    assert module.norm.training
    assert module.norm.num_batches_tracked is not None
    assert module.norm.num_batches_tracked.item() == 0


def test_a_lazy_module_is_not_called() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    assert find_probe(module, None) is None
    assert nn.parameter.is_lazy(next(module[1].parameters()))


# ---- reading outputs -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


def numbered(*values: float) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize(
    ("output", "values"),
    [
        (torch.tensor(1.0), [1.0]),
        (torch.tensor(1), []),
        ({"b": torch.tensor(2.0), "a": torch.tensor(1.0), "n": 3}, [2.0, 1.0]),
        ((torch.tensor(1.0), [torch.tensor(2.0), None], "text"), [1.0, 2.0]),
        (Result(torch.tensor(1.0), tuple(numbered(2.0, 3.0))), [1.0, 2.0, 3.0]),
        (Pair(torch.tensor(4.0), None), [4.0]),
        (Result, []),
        (None, []),
    ],
)
def test_flat_outputs_are_the_floating_tensors_in_order(output: Any, values: list[float]) -> None:
    assert [tensor.item() for tensor in flat_outputs(output)] == values


def test_flat_outputs_of_a_transformers_model_hold_logits_first() -> None:
    module, probe = zoo.build("t5_encoder_decoder")
    args, kwargs = probe.make(2)
    with torch.no_grad():
        output = call(module, args, kwargs)
    outputs = flat_outputs(output)
    assert torch.equal(outputs[0], output.logits)
    assert torch.equal(outputs[-1], output.encoder_last_hidden_state)
