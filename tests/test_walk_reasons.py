"""Why a layer cannot be converted: every reason code of the walk, and the words that go with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zoo
from padconvert.layers.build import upcycle
from padconvert.walk import LayerInfo, Walk, walk
from padconvert.walk.probe import InputSpec, ProbeSpec
from padconvert.words import Granularity, Reason, Routing


def vector(*shape: int) -> ProbeSpec:
    return ProbeSpec((InputSpec(None, shape, "float32"),), 0, "the test")


def reasons(found: Walk) -> dict[str, Reason]:
    return {layer.name: layer.reason for layer in found.layers}


def one(module: nn.Module, probe: ProbeSpec | None = None) -> LayerInfo:
    (layer,) = walk(module, probe).layers
    return layer


def test_tied_weights_name_each_other() -> None:
    module, probe = zoo.build("weight_tied")
    details = {layer.name: (layer.reason, layer.detail) for layer in walk(module, probe).layers}
    assert details == {
        "inp": (Reason.ELIGIBLE, ""),
        "first": (Reason.TIED_WEIGHT, "shared with second.weight, third.weight"),
        "second": (Reason.TIED_WEIGHT, "shared with first.weight, third.weight"),
        "third": (Reason.TIED_WEIGHT, "shared with first.weight, second.weight"),
        "out": (Reason.ELIGIBLE, ""),
    }


def test_a_head_tied_to_the_embedding_names_it() -> None:
    layers = {layer.name: layer for layer in walk(*zoo.build("t5_encoder_decoder")).layers}
    assert layers["lm_head"].reason is Reason.TIED_WEIGHT
    assert layers["lm_head"].detail == (
        "shared with shared.weight, encoder.embed_tokens.weight, decoder.embed_tokens.weight"
    )


@pytest.mark.parametrize(("start", "reason"), [(16, Reason.ELIGIBLE), (15, Reason.TIED_WEIGHT)])
def test_weights_in_one_flat_buffer_are_tied_only_where_they_overlap(start: int, reason: Reason) -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    flat = torch.randn(32)
    module[0].weight = nn.Parameter(flat[:16].view(4, 4))
    module[1].weight = nn.Parameter(flat[start : start + 16].view(4, 4))
    assert set(reasons(walk(module)).values()) == {reason}


def test_torch_parents_that_read_weights() -> None:
    assert reasons(walk(*zoo.build("torch_encoder_layer"))) == {
        "embed": Reason.ELIGIBLE,
        **{
            f"encoder.layers.{i}.{name}": Reason.WEIGHT_READ_BY_PARENT
            for i in (0, 1)
            for name in ("self_attn.out_proj", "linear1", "linear2")
        },
        "head": Reason.ELIGIBLE,
    }
    decoder = {layer.name: layer for layer in walk(*zoo.build("torch_decoder_layer")).layers}
    assert {name: layer.reason for name, layer in decoder.items()} == {
        "decoder.self_attn.out_proj": Reason.WEIGHT_READ_BY_PARENT,
        "decoder.multihead_attn.out_proj": Reason.WEIGHT_READ_BY_PARENT,
        "decoder.linear1": Reason.ELIGIBLE,
        "decoder.linear2": Reason.ELIGIBLE,
        "head": Reason.ELIGIBLE,
    }
    assert decoder["decoder.self_attn.out_proj"].detail == "read by decoder.self_attn (MultiheadAttention)"


def test_the_fast_path_of_the_encoder_layer_is_watched_as_it_is() -> None:
    layers = {layer.name: layer for layer in walk(*zoo.build("torch_encoder_layer")).layers}
    assert layers["encoder.layers.0.linear1"].calls == 0
    assert layers["head"].calls == 1


def test_a_weight_read_in_any_forward_is_found_only_by_watching() -> None:
    module, probe = zoo.build("functional_reader")
    assert reasons(walk(module, probe)) == {
        "bypassed": Reason.WEIGHT_READ_BY_PARENT,
        "both": Reason.WEIGHT_READ_BY_PARENT,
        "out": Reason.ELIGIBLE,
    }
    assert set(reasons(walk(module)).values()) == {Reason.ELIGIBLE}


def test_layers_that_the_forward_leaves_out() -> None:
    module, probe = zoo.build("never_called")
    found = walk(module.train(), probe)
    assert reasons(found) == {
        "conv": Reason.ELIGIBLE,
        "body": Reason.ELIGIBLE,
        "aux": Reason.NOT_CALLED,
        "orphan": Reason.NOT_CALLED,
        "fc": Reason.ELIGIBLE,
    }
    orphan = found.layers[3]
    assert (orphan.calls, orphan.order, orphan.macs, orphan.eligible) == (0, None, None, False)


def test_weights_that_are_computed() -> None:
    computed = {"0": Reason.PARAMETRIZED, "2": Reason.PARAMETRIZED, "4": Reason.ELIGIBLE, "6": Reason.ELIGIBLE}
    assert reasons(walk(*zoo.build("old_weight_and_spectral_norm"))) == computed
    parametrized = {layer.name: layer for layer in walk(*zoo.build("parametrized")).layers}
    assert [layer.reason for layer in parametrized.values()] == [
        Reason.ELIGIBLE,
        Reason.PARAMETRIZED,
        Reason.PARAMETRIZED,
        Reason.ELIGIBLE,
    ]
    assert parametrized["3"].weight_shape == (8, 8, 3, 3)


def test_a_subclass_is_eligible_only_while_it_computes_what_torch_does() -> None:
    layers = {layer.name: layer for layer in walk(*zoo.build("subclassed")).layers}
    assert layers["standardized"].reason is Reason.CUSTOM_FORWARD
    assert layers["standardized"].detail == "StandardizedConv2d.forward is not torch's"
    assert (layers["renamed"].type, layers["renamed"].reason) == ("RenamedLinear", Reason.ELIGIBLE)


def patched() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_forward_pre_hook(lambda _module, _args: None)
    return layer


def with_buffer() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_buffer("keep", torch.ones(3))
    return layer


def whole_numbers() -> nn.Module:
    layer = nn.Linear(3, 3, bias=False)
    layer.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    return layer


class Marked(Tensor):
    """Stands for a quantised weight: a subclass that says it is float32."""


def tensor_subclass() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.randn(3, 3).as_subclass(Marked))
    return layer


WIDE = "stride (1,) and dilation (65537,), which no network has"


@pytest.mark.parametrize(
    ("make", "reason", "detail"),
    [
        (patched, Reason.CUSTOM_FORWARD, "Linear.forward is not torch's"),
        (with_buffer, Reason.CUSTOM_FORWARD, "Linear holds keep beside weight and bias"),
        (hooked, Reason.HAS_HOOKS, "forward_pre_hooks"),
        (whole_numbers, Reason.UNSUPPORTED_DTYPE, "int8"),
        (tensor_subclass, Reason.UNSUPPORTED_DTYPE, "Marked"),
        (lambda: nn.Linear(3, 3, dtype=torch.complex64), Reason.UNSUPPORTED_DTYPE, "complex64"),
        (lambda: nn.Conv2d(3, 3, 1, device="meta"), Reason.META_WEIGHT, ""),
        (
            lambda: nn.Conv2d(3, 3, 3, padding=67),
            Reason.BEYOND_NETWORKS,
            "padding (67, 67) reaches far past its kernel",
        ),
        (lambda: nn.Conv1d(3, 3, 1, dilation=65_537), Reason.BEYOND_NETWORKS, WIDE),
        (lambda: nn.LazyConv2d(3, 3), Reason.UNINITIALIZED, ""),
        (lambda: nn.LazyLinear(3), Reason.UNINITIALIZED, ""),
        (lambda: nn.ConvTranspose1d(3, 6, 2), Reason.TRANSPOSED_CONVOLUTION, ""),
        (lambda: nn.ConvTranspose3d(3, 6, 2), Reason.TRANSPOSED_CONVOLUTION, ""),
    ],
)
def test_reasons_that_a_layer_shows_by_itself(make: Callable[[], nn.Module], reason: Reason, detail: str) -> None:
    layer = one(make())
    assert (layer.reason, layer.detail, layer.eligible) == (reason, detail, False)


def test_a_lazy_layer_is_listed_without_a_shape_and_stays_lazy() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    found = walk(module, vector(4))
    assert found.method == "tree"
    assert found.notes == ("no forward was made: it would give the lazy layers their weights",)
    assert found.layers[1].weight_shape == ()
    assert nn.parameter.is_lazy(next(module[1].parameters()))


def test_a_model_on_the_meta_device_still_has_costs() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    found = walk(module, vector(3, 8, 8))
    assert [(layer.reason, layer.macs) for layer in found.layers] == [
        (Reason.META_WEIGHT, 36 * 4 * 3 * 9),
        (Reason.META_WEIGHT, 144 * 2),
    ]


def padded(layer: nn.Conv2d | nn.Linear, routing: Routing) -> nn.Module:
    return upcycle(
        layer,
        num_experts=2,
        granularity=Granularity.ELEMENT,
        router="linear",
        routing=routing,
        learned_scales=True,
        generator=torch.Generator().manual_seed(0),
    )


def test_pad_layers_are_listed_as_dynamic_without_their_routers() -> None:
    module, probe = zoo.build("resnet")
    before = {layer.name: layer for layer in walk(module, probe).layers}
    block, fc = module.get_submodule("layer1.0"), module.get_submodule("fc")
    assert isinstance(block.conv1, nn.Conv2d)
    assert isinstance(fc, nn.Linear)
    block.conv1 = padded(block.conv1, Routing.MAP)
    module.fc = padded(fc, Routing.TOKEN)

    after = {layer.name: layer for layer in walk(module, probe).layers}

    assert list(after) == list(before)
    for name, kind in (("layer1.0.conv1", "PadConv2d"), ("fc", "PadLinear")):
        before[name] = dataclasses.replace(before[name], type=kind, eligible=False, reason=Reason.ALREADY_DYNAMIC)
    assert after == before
