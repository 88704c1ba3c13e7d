"""The walk: verdicts, names, costs and order, as values; and that it leaves the model alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

import zoo
from padconvert.layers import upcycle
from padconvert.walk import LayerInfo, Walk, walk
from padconvert.walk.probe import InputSpec, ProbeSpec, call, flat_outputs
from padconvert.words import Granularity, Kind, Reason, Routing

# Networks whose multiply-adds are all in the layers that the walk lists.
ONLY_LISTED_LAYERS = (
    "resnet",
    "mobilenet_depthwise",
    "efficientnet_se",
    "unet_transposed",
    "audio_1d_dilated",
    "audio_1d_separable",
    "video_3d",
    "densenet",
    "inception_concat",
    "squeezenet_all_convolutions",
    "onet_prelu_three_heads",
    "grouped_dilated",
    "padding_modes",
    "autoencoder_transposed",
    "mlp",
    "mixer_transposed_inputs",
    "siamese_called_twice",
    "module_reused",
    "nested_containers",
    "transformers_resnet",
    "convnext",
)


def vector(*shape: int) -> ProbeSpec:
    return ProbeSpec((InputSpec(None, shape, "float32"),), 0, "the test")


def reasons(found: Walk) -> dict[str, Reason]:
    return {layer.name: layer.reason for layer in found.layers}


def one(module: nn.Module, probe: ProbeSpec | None = None) -> LayerInfo:
    (layer,) = walk(module, probe).layers
    return layer


# ---- nothing changes -----------------------------------------------------------------------------------------------


def attributes(module: nn.Module) -> list[tuple[str, dict[str, object]]]:
    """What every module's `__dict__` holds, down to the identity of tensors and children."""

    def seen(value: object) -> object:
        return {key: id(item) for key, item in value.items()} if isinstance(value, dict) else id(value)

    return [
        (name, {key: seen(value) for key, value in child.__dict__.items()}) for name, child in module.named_modules()
    ]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_walk_leaves_the_model_and_the_random_state_as_they_were(name: str, training: bool) -> None:
    module, probe = zoo.build(name)
    module.train(training)
    before, values = attributes(module), [t.clone() for t in (*module.parameters(), *module.buffers())]
    random_state = torch.get_rng_state()

    found = walk(module, probe)

    assert found.method == "forward", found.notes
    assert attributes(module) == before
    now = [*module.parameters(), *module.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_outputs_after_a_walk_are_the_same_bits(name: str) -> None:
    module, probe = zoo.build(name)
    args, kwargs = probe.make(2)
    with torch.no_grad():
        before = [tensor.clone() for tensor in flat_outputs(call(module, args, kwargs))]
        walk(module, probe)
        after = flat_outputs(call(module, args, kwargs))
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(tensor.abs().max() > 0 for tensor in before)


class Mutable(nn.Module):
    """Changes itself in every forward, in every way that a Python object can."""

    count: Tensor
    last: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("last", None)
        self.calls = 0
        self.seen: list[Tensor] = []
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.cache["x"] = x
        self.fc.register_forward_hook(lambda _module, _args, output: output + 1)
        self.count += 1
        self.last = x
        self.calls += 1
        self.extra = nn.Linear(1, 1)
        return torch.dropout(self.fc(x), 0.5, train=True)


def test_a_forward_that_changes_the_module_is_undone() -> None:
    module = Mutable()
    assert walk(module, vector(4)).method == "forward"
    assert module.count.item() == 0
    assert module.last is None
    assert module.calls == 0
    assert not hasattr(module, "extra")
    assert not module.seen
    assert not module.cache
    assert not module.fc._forward_hooks


# ---- names ---------------------------------------------------------------------------------------------------------


def test_a_reused_module_is_one_layer_with_all_its_names_and_calls() -> None:
    module, probe = zoo.build("module_reused")
    layers = {layer.name: layer for layer in walk(module, probe).layers}
    assert list(layers) == ["stem", "shared", "steps.1", "fc"]
    shared = layers["shared"]
    assert shared.aliases == ("again", "steps.0")
    assert (shared.calls, shared.order) == (3, 1)
    assert shared.macs == 3 * 16 * 16 * 6 * 6 * 9
    assert (shared.eligible, shared.reason) == (True, Reason.ELIGIBLE)


def test_albert_has_each_shared_layer_once_with_as_many_calls_as_layers() -> None:
    module, probe = zoo.build("albert_shared_layers")
    layers = {layer.name.rpartition(".")[2]: layer for layer in walk(module, probe).layers}
    calls = {name: layer.calls for name, layer in layers.items()}
    assert calls == {
        "embedding_hidden_mapping_in": 1,
        **dict.fromkeys(("query", "key", "value", "dense", "ffn", "ffn_output"), 2),
        "pooler": 1,
        "classifier": 1,
    }
    assert layers["ffn"].macs == 2 * 16 * 16 * 32


def test_the_model_may_be_a_layer_itself() -> None:
    layer = one(nn.Linear(3, 5), vector(3))
    assert (layer.name, layer.macs, layer.input_shape, layer.output_shape) == ("", 15, (3,), (5,))


# ---- reasons -------------------------------------------------------------------------------------------------------


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


# ---- shapes, order, multiply-adds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONLY_LISTED_LAYERS)
def test_multiply_adds_are_half_of_what_torch_counts_as_flops(name: str) -> None:
    module, probe = zoo.build(name)
    counter = FlopCounterMode(display=False)
    args, kwargs = probe.make(1)
    with counter, torch.no_grad():
        call(module, args, kwargs)
    assert 2 * sum(layer.macs or 0 for layer in walk(module, probe).layers) == counter.get_total_flops() > 0


@given(
    inputs=st.integers(1, 5), outputs=st.integers(1, 5), kernel=st.integers(1, 3), stride=st.integers(1, 3),
    groups=st.integers(1, 3), size=st.integers(4, 9),
)  # fmt: skip
def test_a_convolution_costs_its_output_positions_times_its_weight(
    inputs: int, outputs: int, kernel: int, stride: int, groups: int, size: int
) -> None:
    conv = nn.Conv2d(inputs * groups, outputs * groups, kernel, stride, groups=groups)
    layer = one(conv, vector(inputs * groups, size, size))
    side = (size - kernel) // stride + 1
    assert layer.output_shape == (outputs * groups, side, side)
    assert layer.weight_shape == (outputs * groups, inputs, kernel, kernel)
    assert layer.macs == side * side * outputs * groups * inputs * kernel * kernel
    assert layer.groups == groups


def test_order_is_the_order_of_calls_not_of_registration() -> None:
    found = walk(*zoo.build("resnet"))
    order = {layer.name: layer.order for layer in found.layers}
    assert list(order) == [
        *("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2", "layer2.0.conv1"),
        *("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv1", "layer2.1.conv2", "fc"),
    ]
    assert order["layer2.0.downsample.0"] == 5
    assert (order["layer2.0.conv1"], order["layer2.0.conv2"]) == (6, 7)


def test_shapes_leave_the_batch_out() -> None:
    layers = {layer.name: layer for layer in walk(*zoo.build("unet_transposed")).layers}
    up = layers["up"]
    assert (up.kind, up.type) == (Kind.CONV_TRANSPOSE, "ConvTranspose2d")
    assert (up.weight_shape, up.input_shape, up.output_shape) == ((16, 8, 2, 2), (16, 16, 16), (8, 32, 32))
    assert (layers["out"].has_bias, layers["down1.0"].has_bias) == (True, False)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("half_precision", "float16"), ("bfloat16", "bfloat16"), ("double_precision", "float64"), ("frozen", "float32")],
)
def test_dtypes(name: str, dtype: str) -> None:
    found = walk(*zoo.build(name))
    assert {layer.dtype for layer in found.layers} == {dtype}
    assert all(layer.eligible for layer in found.layers)


# ---- without a forward ---------------------------------------------------------------------------------------------


def test_without_a_probe_the_tree_gives_the_same_layers_without_numbers() -> None:
    module, probe = zoo.build("resnet")
    tree, watched = walk(module), walk(module, probe)
    assert (tree.method, watched.method) == ("tree", "forward")
    assert [layer.name for layer in tree.layers] == [layer.name for layer in watched.layers]
    assert {(layer.macs, layer.calls, layer.order, layer.input_shape) for layer in tree.layers} == {(None,) * 4}


def test_a_forward_that_fails_is_a_note_and_leaves_no_hook() -> None:
    module, _ = zoo.build("resnet")
    module.train()
    found = walk(module, vector(5, 8, 8))
    assert found.method == "tree"
    assert len(found.layers) == 11
    (note,) = found.notes
    assert note.startswith("a forward on the test fails: RuntimeError: Given groups=1, weight of size [8, 3, 3, 3]")
    assert "\n" not in note
    assert module.training
    assert not torch_module._global_forward_hooks
    assert walk(module, vector(3, 8, 8)).method == "forward"


def test_gpt2_says_that_its_own_linear_layers_are_left_out() -> None:
    found = walk(*zoo.build("gpt2_own_conv1d"))
    assert [layer.name for layer in found.layers] == ["lm_head"]
    assert found.notes[1] == "8 of transformers' Conv1D layers are not converted: they are not nn.Linear"


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


def test_a_copy_walks_the_same() -> None:
    module, probe = zoo.build("mobilenet_depthwise")
    assert walk(copy.deepcopy(module), probe) == walk(module, probe)
