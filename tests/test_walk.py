"""The walk: names, costs and order, as values; and that it leaves the model alone."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

import zoo
from padconvert.walk import LayerInfo, walk
from padconvert.walk.probe import InputSpec, ProbeSpec, call, flat_outputs
from padconvert.words import Kind, Reason

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


def test_a_copy_walks_the_same() -> None:
    module, probe = zoo.build("mobilenet_depthwise")
    assert walk(copy.deepcopy(module), probe) == walk(module, probe)
