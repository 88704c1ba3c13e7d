"""Feed-forward blocks: found by structure in a watched forward, refused with words that name what stands within."""

# A module's call is untyped in torch.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zoo
from padconvert.walk import LayerInfo, Walk, walk
from padconvert.walk.probe import InputSpec, ProbeSpec
from padconvert.words import Kind, Place, Reason, Role

NARROW, WIDE = 6, 10


def numbers(*shape: int, copies: int = 1) -> ProbeSpec:
    return ProbeSpec((InputSpec(None, shape, "float32"),) * copies, 0, "the test")


def tokens(length: int = 8, **more: int) -> ProbeSpec:
    named = [("input_ids", length), *more.items()]
    return ProbeSpec(tuple(InputSpec(name, (size,), "int64", 50) for name, size in named), 0, "the test")


def groups(found: Walk) -> dict[str, list[tuple[str, str]]]:
    """Group → its members with their places, in the order of their calls."""
    assert found.method == "forward", found.notes
    members: dict[str, list[tuple[str, str]]] = {}
    for layer in sorted(found.layers, key=lambda layer: -1 if layer.order is None else layer.order):
        assert bool(layer.group) == (layer.place is not Place.ALONE)
        if layer.group:
            assert (layer.role, layer.eligible, layer.detail) == (Role.FFN, True, "")
            members.setdefault(layer.group, []).append((layer.name, layer.place.value))
    return members


def layers(found: Walk) -> dict[str, LayerInfo]:
    return {layer.name: layer for layer in found.layers}


def plain(prefix: str, up: str, down: str) -> dict[str, list[tuple[str, str]]]:
    return {f"{prefix}{up}": [(f"{prefix}{up}", "first"), (f"{prefix}{down}", "last")]}


def gated(prefix: str, first: str, peer: str, down: str) -> dict[str, list[tuple[str, str]]]:
    names = ((first, "first"), (peer, "peer"), (down, "last"))
    return {f"{prefix}{first}": [(f"{prefix}{name}", place) for name, place in names]}


# ---- networks of the zoo and of transformers -----------------------------------------------------------------------

BLOCKS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "bert": plain("bert.encoder.layer.0.", "intermediate.dense", "output.dense")
    | plain("bert.encoder.layer.1.", "intermediate.dense", "output.dense"),
    "distilbert": plain("distilbert.transformer.layer.0.ffn.", "lin1", "lin2")
    | plain("distilbert.transformer.layer.1.ffn.", "lin1", "lin2"),
    "albert_shared_layers": plain("albert.encoder.albert_layer_groups.0.albert_layers.0.", "ffn", "ffn_output"),
    "gpt2_own_conv1d": plain("transformer.h.0.mlp.", "c_fc", "c_proj")
    | plain("transformer.h.1.mlp.", "c_fc", "c_proj"),
    "llama": gated("model.layers.0.mlp.", "gate_proj", "up_proj", "down_proj")
    | gated("model.layers.1.mlp.", "gate_proj", "up_proj", "down_proj"),
    "t5_encoder_decoder": {
        key: value
        for side, place in (("encoder", 1), ("decoder", 2))
        for block in (0, 1)
        for key, value in gated(f"{side}.block.{block}.layer.{place}.DenseReluDense.", "wi_0", "wi_1", "wo").items()
    },
    "vit": plain("vit.layers.0.mlp.", "fc1", "fc2") | plain("vit.layers.1.mlp.", "fc1", "fc2"),
    "convnext": plain("convnext.encoder.stages.0.layers.0.", "pwconv1", "pwconv2")
    | plain("convnext.encoder.stages.1.layers.0.", "pwconv1", "pwconv2"),
    "whisper_audio": plain("model.encoder.layers.0.", "fc1", "fc2") | plain("model.decoder.layers.0.", "fc1", "fc2"),
    "mixer_transposed_inputs": plain("", "token_mlp.0", "token_mlp.2") | plain("", "channel_mlp.0", "channel_mlp.2"),
    "causal_lm_tied_head": plain("blocks.0.", "fc", "fc_proj") | plain("blocks.1.", "fc", "fc_proj"),
    "torch_decoder_layer": plain("decoder.", "linear1", "linear2"),
    "torch_encoder_layer": {},
    "segformer_own_hooks": {},
    "mlp": {},
    "resnet": {},
}

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5_SIZE = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "relu"}
LLAMA_BLOCK = gated("model.layers.0.mlp.", "gate_proj", "up_proj", "down_proj")
BERT_BLOCK = plain("encoder.layer.0.", "intermediate.dense", "output.dense")


def pretrained(name: str, config: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="a transformers model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**(SMALL | settings)))
    return model.eval()


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_the_zoo(name: str) -> None:
    assert groups(walk(*zoo.build(name))) == BLOCKS[name]


@pytest.mark.parametrize(
    ("model", "config", "settings", "probe", "blocks"),
    [
        ("RobertaModel", "RobertaConfig", {}, tokens(), BERT_BLOCK),
        ("ElectraModel", "ElectraConfig", {"embedding_size": 8}, tokens(), BERT_BLOCK),
        ("BertModel", "BertConfig", {"chunk_size_feed_forward": 2}, tokens(), BERT_BLOCK),
        ("Qwen2ForCausalLM", "Qwen2Config", {}, tokens(), LLAMA_BLOCK),
        (
            *("T5ForConditionalGeneration", "T5Config", T5_SIZE, tokens(decoder_input_ids=5)),
            plain("encoder.block.0.layer.1.DenseReluDense.", "wi", "wo")
            | plain("decoder.block.0.layer.2.DenseReluDense.", "wi", "wo"),
        ),
    ],
    ids=["roberta", "electra", "bert-chunked", "qwen2", "t5-plain"],
)
def test_blocks_of_transformers(
    model: str, config: str, settings: dict[str, Any], probe: ProbeSpec, blocks: dict[str, list[tuple[str, str]]]
) -> None:
    assert groups(walk(pretrained(model, config, **settings), probe)) == blocks


def test_albert_and_a_chunked_bert_call_their_block_more_than_once() -> None:
    albert = layers(walk(*zoo.build("albert_shared_layers")))
    assert [layer.calls for layer in albert.values() if layer.group] == [2, 2]
    bert = walk(pretrained("BertModel", "BertConfig", chunk_size_feed_forward=2), tokens())
    assert [layer.calls for layer in bert.layers if layer.group] == [4, 4]


def test_a_gate_and_an_up_layer_in_one_weight_are_not_proven() -> None:
    found = layers(walk(pretrained("Phi3ForCausalLM", "Phi3Config"), tokens()))
    up, down = found["model.layers.0.mlp.gate_up_proj"], found["model.layers.0.mlp.down_proj"]
    assert (up.role, up.eligible, up.group, up.place) == (Role.FFN, True, "", Place.ALONE)
    assert up.detail == "it holds a gate and an up layer in one weight: split divides its output"
    assert down.role is Role.FFN
    assert down.detail == "gate_up_proj holds a gate and an up layer in one weight: split divides its output"


def test_segformer_has_a_convolution_within() -> None:
    found = layers(walk(*zoo.build("segformer_own_hooks")))
    assert found["segformer.stages.0.blocks.0.mlp.fc1"].detail == (
        "transpose changes the shape between it and dwconv.dwconv"
    )
    assert found["segformer.stages.0.blocks.0.mlp.fc2"].detail == (
        "the layer right before it is none that widens to its input"
    )


def test_without_a_forward_nothing_is_proven() -> None:
    module, _ = zoo.build("bert")
    ffn = [layer for layer in walk(module).layers if layer.role is Role.FFN]
    assert len(ffn) == 4
    for layer in ffn:
        assert (layer.group, layer.place, layer.eligible) == ("", Place.ALONE, True)
        assert layer.detail == "no forward was watched, so nothing shows what stands within its feed-forward block"


# ---- what may stand within -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + down(within(up(x))): `within` is what a test puts between the two layers."""

    def __init__(self, within: Callable[[Any, Tensor], Any], wide: int = WIDE) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(NARROW, wide), nn.Linear(wide, NARROW)
        self.within = within
        self.norm = nn.LayerNorm(wide)
        self.scale = nn.Parameter(torch.full((wide,), 1.5))
        self.slope = nn.PReLU()
        self.drop = nn.Dropout(0.5)
        self.side = nn.Linear(NARROW, 1)
        self.other = nn.Linear(wide, NARROW)
        self.head = nn.Linear(NARROW, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return self.head(x + self.down(self.within(self, self.up(x))))


def gelu_by_hand(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * torch.pow(h, 3))))


FINE: dict[str, Callable[[Any, Tensor], Any]] = {
    "nothing": lambda _, h: h,
    "gelu": lambda _, h: functional.gelu(h),
    "gelu by hand": lambda _, h: gelu_by_hand(h),
    "relu in place": lambda _, h: h.relu_(),
    "hardswish in place": lambda _, h: functional.hardswish(h, inplace=True),
    "dropout": lambda net, h: net.drop(h.relu()),
    "one slope": lambda net, h: net.slope(h),
    "a mask of tokens": lambda net, h: h * (net.x.sum(-1, keepdim=True) > 0),
    "filled by a mask of tokens": lambda net, h: h.masked_fill(net.x[..., :1] > 0, 0.0),
    "filled in place": lambda net, h: h.masked_fill_(net.x[..., :1] > 0, 0.0),
    "a factor that a layer makes": lambda net, h: h.relu() * net.side(net.x).sigmoid(),
    "one number": lambda net, h: h * net.scale[0] + 1,
    "another dtype and back": lambda _, h: h.double().relu().float(),
    "a choice": lambda _, h: torch.where(h > 0, h, 0.1 * h),
    "a copy": lambda _, h: h.clone().contiguous().detach(),
    "a view to the same shape": lambda _, h: h.relu().view(h.shape),
    "a square of itself": lambda _, h: h.relu() * h,
    "under no_grad and inference mode": lambda _, h: torch.inference_mode()(torch.relu)(h),
}


@pytest.mark.parametrize("shape", [(NARROW,), (3, NARROW)], ids=["vectors", "sequences"])
@pytest.mark.parametrize("name", FINE)
def test_pointwise_work_may_stand_within(name: str, shape: tuple[int, ...]) -> None:
    assert groups(walk(Block(FINE[name]), numbers(*shape))) == plain("", "up", "down")


def through(layer: str) -> Callable[[Any, Tensor], Any]:
    return lambda net, h: getattr(net, layer)(h)


def keeping(net: Any, h: Tensor) -> Tensor:
    net.kept = h
    return h.relu()


def stacked(net: Any, h: Tensor) -> Tensor:
    """A second layer reads the hidden values, for nothing."""
    net.other(h)
    return h


def read_after(net: Any, h: Tensor) -> Tensor:
    """The hidden values go on to `down`, and once more after that."""
    net.x = net.x + net.down(h) * h.mean()
    return h


def half_in_place(_: Any, h: Tensor) -> Tensor:
    h[..., 0] = 0
    return h


WITHIN = "between it and down"
BROKEN: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a layer norm": (through("norm"), f"layer_norm stands {WITHIN}"),
    "an own norm": (lambda _, h: h * h.pow(2).mean(-1, keepdim=True).rsqrt(), f"mean reads the values {WITHIN} too"),
    "a softmax": (lambda _, h: h.softmax(-1), f"_softmax stands {WITHIN}"),
    "a factor per channel": (lambda net, h: h * net.scale, f"mul brings in another tensor {WITHIN}"),
    "a shift in place": (lambda net, h: h.add_(net.scale), f"add brings in another tensor {WITHIN}"),
    "a wide tensor of the same shape": (
        lambda net, h: h + net.x.repeat(1, 1, 2)[..., :WIDE],
        f"add brings in another tensor {WITHIN}",
    ),
    "a sum beside it": (lambda _, h: h.relu() + h.sum(), f"sum reads the values {WITHIN} too"),
    "a number read from it": (lambda _, h: h * h.max().item(), f"max reads the values {WITHIN} too"),
    "a transposition and back": (lambda _, h: h.mT.relu().mT, f"transpose changes the shape {WITHIN}"),
    "a view to two dimensions": (lambda _, h: h.flatten(0, 1).relu().view(h.shape), f"view changes the shape {WITHIN}"),
    "a broadcast": (lambda _, h: (h * torch.ones(1, 1, 1, 1))[0], f"mul changes the shape {WITHIN}"),
    "some channels in place": (half_in_place, f"select changes the shape {WITHIN}"),
    "a concatenation": (
        lambda _, h: torch.cat([h[..., :4], h[..., 4:]], -1),
        "it holds a gate and an up layer in one weight: slice divides its output",
    ),
    "a product of matrices": (lambda net, h: h @ net.scale.diag(), f"view changes the shape {WITHIN}"),
    "kept on the module": (keeping, f"the model keeps values from {WITHIN}"),
    "a second layer": (stacked, "more than one layer reads the output of it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_anything_else_within_is_named(name: str) -> None:
    within, words = BROKEN[name]
    found = walk(Block(within), numbers(3, NARROW))
    assert groups(found) == {}
    up = layers(found)["up"]
    assert (up.eligible, up.role, up.detail) == (True, Role.FFN, words)


def test_the_down_layer_has_the_same_words_from_its_side() -> None:
    found = layers(walk(Block(through("norm")), numbers(3, NARROW)))
    assert found["down"].detail == "layer_norm stands between up and it"
    nested = layers(walk(nn.Sequential(Block(through("norm")), nn.Linear(2, 2)), numbers(3, NARROW)))
    assert (nested["0.up"].detail, nested["0.down"].detail) == (
        "layer_norm stands between it and down",
        "layer_norm stands between up and it",
    )


def test_hidden_values_that_the_model_returns_are_no_block() -> None:
    class Returning(Block):
        def forward(self, x: Tensor) -> Any:
            h = self.up(x).relu()
            positive = h > 0
            return {"logits": self.head(x + self.down(h)), "positive": [positive]}

    found = walk(Returning(lambda _, h: h), numbers(3, NARROW))
    assert groups(found) == {}
    assert layers(found)["up"].detail == "the model returns values from between it and down"


# ---- which layers belong together ----------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers by name and a forward that a test gives."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **sizes: tuple[int, int]) -> None:
        super().__init__()
        for name, (inputs, outputs) in sizes.items():
            self.add_module(name, nn.Linear(inputs, outputs))
        self.head = nn.Linear(NARROW, 2)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.head(self.run(self, x))


UP, DOWN = (NARROW, WIDE), (WIDE, NARROW)


def found_in(forward: Callable[[Any, Tensor], Any], **sizes: tuple[int, int]) -> Walk:
    return walk(Net(forward, **sizes), numbers(3, NARROW))


def test_of_gate_and_up_the_one_called_first_is_the_first() -> None:
    found = found_in(lambda n, x: n.down(n.up(x) * n.gate(x).sigmoid()), gate=UP, up=UP, down=DOWN)
    assert groups(found) == gated("", "up", "gate", "down")
    found = found_in(lambda n, x: n.down(n.gate(x).sigmoid().mul_(n.up(x))), up=UP, gate=UP, down=DOWN)
    assert groups(found) == gated("", "gate", "up", "down")


def changed_between(n: Any, x: Tensor) -> Tensor:
    x = x + 1
    gate = n.gate(x)
    return n.down(gate * n.up(x.mul_(2)))


def lost_gate(n: Any, x: Tensor) -> Tensor:
    """The input of the first layer is gone when the second is called: its memory may be given out again."""
    gate = n.gate(x + 1)
    return n.down(gate * n.up(x + 2))


GATES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "another input": (lambda n, x: n.down(n.gate(x) * n.up(x.relu())), "mul"),
    "the input changed in between": (changed_between, "mul"),
    "an input that is gone": (lost_gate, "mul"),
    "three": (lambda n, x: n.down(n.gate(x) * n.up(x) + n.third(x)), "add"),
    "one layer twice": (lambda n, x: n.down(n.gate(x) + n.gate(x)), "add"),
}


@pytest.mark.parametrize("name", GATES)
def test_layers_that_are_not_gate_and_up(name: str) -> None:
    forward, op = GATES[name]
    found = found_in(forward, gate=UP, up=UP, third=UP, down=DOWN)
    assert groups(found) == {}
    words = f"{op} joins it with another layer that is no gate on the same input"
    assert layers(found)["gate"].detail == ("it is called again before down" if name == "one layer twice" else words)


def test_a_value_read_before_gate_and_up_are_joined_breaks_the_block() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        gate, up = n.gate(x), n.up(x)
        return n.down(gate * up) + up.mean()

    for order in (forward, lambda n, x: [u := n.up(x), m := u.mean(), n.down(n.gate(x) * u) + m][2]):
        found = found_in(order, gate=UP, up=UP, down=DOWN)
        assert groups(found) == {}
        assert layers(found)["up"].detail == "mean reads the values between it and down too"


def test_a_value_read_after_the_down_layer_breaks_the_block() -> None:
    found = found_in(lambda n, x: [h := n.up(x), n.down(h), h.relu()][1], up=UP, down=DOWN)
    assert groups(found) == {}
    assert layers(found)["up"].detail == "relu reads the values between it and down too"


def test_two_down_layers_on_one_up_layer_are_no_block() -> None:
    found = found_in(lambda n, x: n.one(h := n.up(x).relu()) + n.two(h), up=UP, one=DOWN, two=DOWN)
    assert groups(found) == {}
    assert layers(found)["up"].detail == "more than one layer reads the output of it"


def test_two_blocks_that_share_the_up_layer_are_none() -> None:
    found = found_in(lambda n, x: n.two(n.up(n.one(n.up(x).relu())).relu()), up=UP, one=DOWN, two=DOWN)
    assert groups(found) == {}
    assert layers(found)["up"].detail == "it and one do not belong together in every call"


def test_a_down_layer_that_is_also_called_on_something_else_is_in_no_block() -> None:
    found = found_in(lambda n, x: n.down(n.up(x)) + n.down(x.repeat(1, 1, 2)[..., :WIDE]), up=UP, down=DOWN)
    assert groups(found) == {}
    assert layers(found)["down"].detail == "up and it do not belong together in every call"


def test_a_block_in_two_places_is_one_block() -> None:
    found = found_in(lambda n, x: n.down(n.up(n.down(n.up(x).relu())).relu()), up=UP, down=DOWN)
    assert groups(found) == plain("", "up", "down")
    assert [layer.calls for layer in found.layers if layer.group] == [2, 2]


def test_a_block_whose_calls_overlap_is_none() -> None:
    found = found_in(lambda n, x: [h := n.up(x), i := n.up(x + 1), n.down(h) + n.down(i)][2], up=UP, down=DOWN)
    assert groups(found) == {}
    assert layers(found)["up"].detail == "it is called again before down"
    assert layers(found)["down"].detail == "up is called again before it"


def test_gate_and_up_that_change_places_are_no_block() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        x = n.down(n.gate(x).sigmoid() * n.up(x))
        return n.down(n.up(x) * n.gate(x).sigmoid())

    found = found_in(forward, gate=UP, up=UP, down=DOWN)
    assert groups(found) == {}
    assert layers(found)["gate"].detail == "it and down do not belong together in every call"


def test_calls_in_chunks_are_one_block() -> None:
    found = found_in(lambda n, x: torch.cat([n.down(n.up(c).relu_()) for c in x.split(1, 1)], 1), up=UP, down=DOWN)
    assert groups(found) == plain("", "up", "down")
    assert layers(found)["down"].calls == 3


def test_a_chain_of_layers_holds_the_blocks_that_come_back_to_their_width() -> None:
    sizes = [(6, 10), (10, 6), (6, 8), (8, 6), (6, 9), (9, 7), (7, 12), (12, 7)]
    parts = [part for inputs, outputs in sizes for part in (nn.Linear(inputs, outputs), nn.ReLU())]
    found = walk(nn.Sequential(*parts[:-1], nn.Linear(7, 7)), numbers(6))
    assert groups(found) == plain("", "0", "2") | plain("", "4", "6") | plain("", "12", "14")
    assert [layer.role.value for layer in found.layers] == ["ffn"] * 4 + ["linear"] * 2 + ["ffn"] * 2 + ["head"]


def test_a_block_that_only_its_forward_shows_is_found() -> None:
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.banks = nn.ModuleDict({"narrow": nn.Linear(*DOWN), "wide": nn.ModuleList([nn.Linear(*UP)])})
            self.head = nn.Linear(NARROW, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.banks["narrow"](self.banks["wide"][0](x).tanh()))  # type: ignore[index]

    assert [layer.role.value for layer in walk(Bank()).layers] == ["linear", "linear", "head"]
    assert groups(walk(Bank(), numbers(NARROW))) == plain("banks.", "wide.0", "narrow")


def test_a_block_that_makes_the_output_is_none() -> None:
    found = walk(nn.Sequential(nn.Linear(*UP), nn.ReLU(), nn.Linear(*DOWN)), numbers(NARROW))
    assert groups(found) == {}
    assert [layer.role for layer in found.layers] == [Role.FFN, Role.HEAD]
    assert found.layers[0].detail == "2 of the same feed-forward block counts as head"


def test_a_block_with_a_layer_that_cannot_be_converted_is_none() -> None:
    net = Net(lambda n, x: n.down(n.up(x).relu()), up=UP, down=DOWN)
    net.get_submodule("down").register_forward_hook(lambda _module, _args, output: output)
    found = layers(walk(net, numbers(NARROW)))
    assert (found["down"].reason, found["down"].detail, found["down"].group) == (Reason.HAS_HOOKS, "forward_hooks", "")
    assert (found["up"].eligible, found["up"].group) == (True, "")
    assert found["up"].detail == (
        "down of the same feed-forward block cannot be converted: hooks hang on it, which a replacement would lose"
    )


class GatedAttention(nn.Module):
    """Over one position: nothing is mixed, and yet it is called an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = nn.Linear(*UP), nn.Linear(*UP), nn.Linear(*DOWN)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.query(x).sigmoid() * self.value(x))


def test_attention_stays_attention() -> None:
    found = walk(nn.Sequential(GatedAttention(), nn.Linear(NARROW, 2)), numbers(NARROW))
    assert groups(found) == {}
    assert [layer.role.value for layer in found.layers] == ["attention"] * 3 + ["head"]


def test_a_layer_that_keeps_the_width_is_in_no_block() -> None:
    assert groups(found_in(lambda n, x: n.two(n.one(x).relu()), one=(NARROW, NARROW), two=(NARROW, NARROW))) == {}
    assert groups(found_in(lambda n, x: n.two(n.one(x).relu()), one=(NARROW, 4), two=(4, NARROW))) == {}


# ---- transformers' Conv1D ------------------------------------------------------------------------------------------


def test_gpt2_has_linear_layers_with_their_weight_the_other_way_round() -> None:
    found = walk(*zoo.build("gpt2_own_conv1d"))
    assert found.notes == ("inputs: the zoo",)
    block = {name.removeprefix("transformer.h.0."): layer for name, layer in layers(found).items() if ".h.0." in name}
    shapes = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
    assert {name: layer.weight_shape for name, layer in block.items()} == shapes
    for name, layer in block.items():
        assert (layer.kind, layer.type, layer.eligible, layer.has_bias) == (Kind.LINEAR, "Conv1D", True, True)
        assert layer.role is (Role.FFN if name.startswith("mlp") else Role.ATTENTION)
        assert layer.macs == 16 * shapes[name][0] * shapes[name][1]
        assert (layer.input_shape, layer.output_shape) == ((16, shapes[name][1]), (16, shapes[name][0]))


def test_only_transformers_own_conv1d_is_one() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers' Conv1D")

    class Own(pytorch_utils.Conv1D):  # type: ignore[misc,name-defined]
        pass

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf, self.nx, self.weight = 4, 3, nn.Parameter(torch.zeros(3, 4))

    patched = pytorch_utils.Conv1D(4, 3)
    patched.forward = lambda x: x
    net = nn.ModuleList([pytorch_utils.Conv1D(4, 3), Own(4, 3), patched, Conv1D()])
    assert [(layer.name, layer.reason, layer.detail) for layer in walk(net).layers] == [
        ("0", Reason.ELIGIBLE, ""),
        ("1", Reason.CUSTOM_FORWARD, "Own is a class of its own above transformers' Conv1D"),
        ("2", Reason.CUSTOM_FORWARD, "Conv1D.forward is not torch's"),
    ]


def test_a_conv1d_with_another_forward_in_its_class_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers' Conv1D")
    monkeypatch.setattr(pytorch_utils.Conv1D, "forward", lambda _self, x: x)
    assert walk(nn.ModuleList([pytorch_utils.Conv1D(4, 3)])).layers == ()


# ---- mixtures of experts -------------------------------------------------------------------------------------------


def test_a_mixtral_has_nothing_to_convert_in_its_experts() -> None:
    found = walk(pretrained("MixtralForCausalLM", "MixtralConfig", num_local_experts=4), tokens())
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert [layer.name for layer in found.layers if layer.eligible] == [*attention, "lm_head"]
    assert groups(found) == {}


def test_the_shared_expert_of_a_mixture_belongs_to_it() -> None:
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 4}
    found = walk(pretrained("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **sizes), tokens())
    mixture = {name: layer for name, layer in layers(found).items() if ".mlp." in name}
    assert list(mixture) == [
        *(f"model.layers.0.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
        "model.layers.0.mlp.shared_expert_gate",
    ]
    for layer in mixture.values():
        assert (layer.reason, layer.eligible, layer.group) == (Reason.ALREADY_EXPERTS, False, "")
        assert layer.detail == "part of the mixture model.layers.0.mlp (Qwen2MoeSparseMoeBlock)"
    assert layers(found)["model.layers.0.self_attn.q_proj"].eligible


class Mixture(nn.Module):
    """Experts as a list of blocks, with a router beside them; its class says nothing."""

    def __init__(self, router: str = "router", experts: str = "experts") -> None:
        super().__init__()
        self.names = (router, experts)
        self.add_module(router, nn.Linear(NARROW, 3))
        blocks = (nn.Sequential(nn.Linear(*UP), nn.ReLU(), nn.Linear(*DOWN)) for _ in range(3))
        self.add_module(experts, nn.ModuleList(blocks))
        self.beside = nn.Sequential(nn.Linear(*UP), nn.ReLU(), nn.Linear(*DOWN))

    def forward(self, x: Tensor) -> Tensor:
        router, experts = (self.get_submodule(name) for name in self.names)
        assert isinstance(experts, nn.ModuleList)
        shares = router(x).softmax(-1)
        return x + self.beside(x) + sum(shares[..., i : i + 1] * each(x) for i, each in enumerate(experts))


@pytest.mark.parametrize(("router", "experts", "mixture"), [
    ("router", "experts", True), ("gate", "experts", True), ("router", "branches", False), ("mix", "experts", False),
])  # fmt: skip
def test_a_list_of_experts_with_a_router_is_a_mixture(router: str, experts: str, mixture: bool) -> None:
    found = layers(walk(nn.Sequential(Mixture(router, experts), nn.Linear(NARROW, 2)), numbers(3, NARROW)))
    inside = {name for name, layer in found.items() if layer.reason is Reason.ALREADY_EXPERTS}
    assert inside == (
        {f"0.{router}", *(f"0.{experts}.{i}.{j}" for i in range(3) for j in (0, 2))} if mixture else set()
    )
    assert found["0.beside.0"].group == "0.beside.0"
    assert found[f"0.{experts}.1.0"].group == ("" if mixture else f"0.{experts}.1.0")


def test_a_network_named_after_mixtures_is_none() -> None:
    kind = types.new_class("MyMoEModel", (nn.Sequential,))
    kind.__module__ = sys.modules[__name__].__name__
    net = kind(kind(Block(lambda _, h: h)), nn.Linear(2, 2))
    assert groups(walk(net, numbers(NARROW))) == plain("0.0.", "up", "down")


# ---- causality -----------------------------------------------------------------------------------------------------


def causal(found: Walk) -> dict[str, bool | None]:
    assert found.method == "forward", found.notes
    return {layer.name: layer.causal for layer in found.layers}


@pytest.mark.parametrize(("name", "expected"), [
    ("gpt2_own_conv1d", {True}), ("llama", {True}), ("causal_lm_tied_head", {True}), ("vit", {None}),
    ("convnext", {None}), ("resnet", {None}), ("mixer_transposed_inputs", {None}), ("lstm_linear", {False}),
    ("gru_tuple_output", {True}), ("mlp", {None}),
])  # fmt: skip
def test_causal_networks_of_the_zoo(name: str, expected: set[bool | None]) -> None:
    assert set(causal(walk(*zoo.build(name))).values()) == expected


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert_shared_layers"])
def test_no_layer_on_the_sequence_of_an_encoder_is_causal(name: str) -> None:
    found = causal(walk(*zoo.build(name)))
    pooled = ("bert.pooler.dense", "pre_classifier", "albert.pooler", "classifier")
    assert {layer for layer, flag in found.items() if flag is None} == set(pooled) & set(found)
    assert {flag for layer, flag in found.items() if layer not in pooled} == {False}


@pytest.mark.parametrize("length", [5, 8])
def test_of_a_t5_the_decoder_is_causal_and_the_encoder_is_not(length: int) -> None:
    """Also where both sequences have the same length."""
    found = causal(
        walk(pretrained("T5ForConditionalGeneration", "T5Config", **T5_SIZE), tokens(decoder_input_ids=length))
    )
    for name, flag in found.items():
        reads_the_encoder = name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert flag is not reads_the_encoder, name


@pytest.mark.parametrize(("mix", "flag"), [
    (lambda x: x.cumsum(1), True), (lambda x: x + x.mean(1, keepdim=True), False), (lambda x: x.flip(1), False),
    (lambda x: torch.cat([x[:, 1:], x[:, :1]], 1), False), (lambda x: x.cummax(1).values, True),
    (lambda x: x * 0 + 1, None),
])  # fmt: skip
def test_what_mixes_positions_decides(mix: Callable[[Tensor], Tensor], flag: bool | None) -> None:
    found = causal(found_in(lambda n, x: n.after(mix(x)), after=(NARROW, NARROW)))
    assert found == {"after": flag, "head": None if flag is None else flag}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_causality_in_other_precisions(dtype: str) -> None:
    for name, flag in (("llama", True), ("bert", False)):
        module, probe = zoo.build(name)
        found = walk(module.to(getattr(torch, dtype)), probe.with_dtype(dtype))
        assert {layer.causal for layer in found.layers if layer.group} == {flag}


@pytest.mark.parametrize("length", [1, 2])
def test_short_sequences_say_nothing(length: int) -> None:
    module, _ = zoo.build("llama")
    assert set(causal(walk(module, tokens(length))).values()) == {None}


def test_a_second_forward_that_fails_says_nothing_and_leaves_no_hook() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[int] = []
            self.fc = nn.Linear(NARROW, NARROW)

        def forward(self, x: Tensor) -> Tensor:
            if LOG:
                raise RuntimeError("once is enough")
            LOG.append(1)
            return self.fc(x)

    LOG: list[int] = []
    found = walk(Moody(), numbers(3, NARROW))
    assert causal(found) == {"fc": None}
    assert not torch.nn.modules.module._global_forward_hooks
