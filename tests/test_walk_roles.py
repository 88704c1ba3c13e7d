"""Roles, as tables over networks of different structure."""

# A module's call is untyped in torch.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zoo
from padconvert.walk import walk
from padconvert.walk.probe import InputSpec, ProbeSpec
from padconvert.words import Role

BERT_LAYER = {
    "attention.self.query": "attention",
    "attention.self.key": "attention",
    "attention.self.value": "attention",
    "attention.output.dense": "attention",
    "intermediate.dense": "ffn",
    "output.dense": "ffn",
}
LLAMA_LAYER = {
    **{f"self_attn.{name}_proj": "attention" for name in "qkvo"},
    **{f"mlp.{name}_proj": "ffn" for name in ("gate", "up", "down")},
}

ROLES: dict[str, dict[str, str]] = {
    "resnet": {
        "conv1": "stem",
        **{f"layer{i}.{j}.conv{k}": "conv" for i in (1, 2) for j in (0, 1) for k in (1, 2)},
        "layer2.0.downsample.0": "conv",
        "fc": "head",
    },
    "mobilenet_depthwise": {
        "features.0.0": "stem",
        **{f"features.{i}.{name}.0": "conv" for i in (1, 2, 3) for name in ("expand", "project")},
        **{f"features.{i}.depthwise.0": "depthwise" for i in (1, 2, 3)},
        "features.4.0": "conv",
        "classifier.1": "head",
    },
    "efficientnet_se": {
        "stem.0": "stem",
        "depthwise": "depthwise",
        "se.fc1": "conv",
        "se.fc2": "conv",
        "project": "conv",
        "classifier": "head",
    },
    "unet_transposed": {"down1.0": "stem", "down2.0": "conv", "up": "conv", "up_conv.0": "conv", "out": "head"},
    "audio_1d_separable": {"front": "stem", "depthwise": "depthwise", "pointwise": "conv", "out": "head"},
    "video_3d": {"stem": "stem", "space": "conv", "time": "conv", "fc": "head"},
    "squeezenet_all_convolutions": {
        "stem": "stem",
        "squeeze": "conv",
        "expand1": "conv",
        "expand3": "conv",
        "final_conv": "head",
    },
    "onet_prelu_three_heads": {
        "features.0": "stem",
        "features.3": "conv",
        "features.6": "conv",
        "dense": "linear",
        "face": "head",
        "box": "head",
        "landmarks": "head",
    },
    "segmentation_dict_output": {
        "backbone.0.0": "stem",
        "backbone.1.0": "conv",
        "classifier": "head",
        "aux_classifier": "head",
    },
    "autoencoder_transposed": {"encoder.0": "stem", "encoder.2": "conv", "decoder.0": "conv", "decoder.2": "head"},
    "vgg_flatten": {"0": "stem", "3": "conv", "7": "linear", "10": "head"},
    "mlp": {"0": "linear", "2": "linear", "5": "head"},
    "siamese_called_twice": {"embedder.0": "stem", "embedder.2": "conv", "fc": "head"},
    "lstm_linear": {"hidden": "linear", "tags": "head"},
    "gru_tuple_output": {"input": "linear", "output": "head"},
    "mixer_transposed_inputs": {
        "embed": "stem",
        **{f"{name}_mlp.{i}": "ffn" for name in ("token", "channel") for i in (0, 2)},
        "head": "head",
    },
    "multihead_attention": {"embed": "linear", "attention.out_proj": "attention", "head": "head"},
    "torch_decoder_layer": {
        "decoder.self_attn.out_proj": "attention",
        "decoder.multihead_attn.out_proj": "attention",
        "decoder.linear1": "ffn",
        "decoder.linear2": "ffn",
        "head": "head",
    },
    "causal_lm_tied_head": {
        **{
            f"blocks.{i}.{name}": role
            for i in (0, 1)
            for name, role in {"qkv": "attention", "proj": "attention", "fc": "ffn", "fc_proj": "ffn"}.items()
        },
        "lm_head": "head",
    },
    "bert": {
        **{f"bert.encoder.layer.{i}.{name}": role for i in (0, 1) for name, role in BERT_LAYER.items()},
        "bert.pooler.dense": "linear",
        "classifier": "head",
    },
    "llama": {
        **{f"model.layers.{i}.{name}": role for i in (0, 1) for name, role in LLAMA_LAYER.items()},
        "lm_head": "head",
    },
    "distilbert": {
        **{
            f"distilbert.transformer.layer.{i}.{name}": role
            for i in (0, 1)
            for name, role in {
                **{f"attention.{part}_lin": "attention" for part in ("q", "k", "v", "out")},
                "ffn.lin1": "ffn",
                "ffn.lin2": "ffn",
            }.items()
        },
        "pre_classifier": "linear",
        "classifier": "head",
    },
}


@pytest.mark.parametrize("name", ROLES)
def test_roles_with_a_forward(name: str) -> None:
    found = walk(*zoo.build(name))
    assert {layer.name: layer.role.value for layer in found.layers} == ROLES[name]


# Here the tree cannot see what a forward shows: only the last of three heads, the wrong one of two maps.
BLIND = {
    "onet_prelu_three_heads": {"face": "linear", "box": "linear"},
    "segmentation_dict_output": {"classifier": "conv"},
}


@pytest.mark.parametrize("name", ROLES)
def test_roles_by_the_tree_alone(name: str) -> None:
    module, _ = zoo.build(name)
    assert {layer.name: layer.role.value for layer in walk(module).layers} == ROLES[name] | BLIND.get(name, {})


@pytest.mark.parametrize("name", ["convnext", "vit", "swin_windows", "whisper_audio", "t5_encoder_decoder"])
def test_every_feed_forward_pair_of_the_transformers_models_is_found(name: str) -> None:
    module, probe = zoo.build(name)
    roles = {layer.name: layer.role for layer in walk(module, probe).layers}
    parts = ("fc1", "fc2", "pwconv1", "pwconv2", "wi_0", "wi_1", "wo")
    expected = {layer for layer in roles if layer.rpartition(".")[2] in parts}
    assert {layer for layer, role in roles.items() if role is Role.FFN} == expected != set()


def roles_of(module: nn.Module, *shape: int) -> list[str]:
    probe = ProbeSpec((InputSpec(None, shape, "float32"),), 0, "the test")
    found = walk(module, probe)
    assert found.method == "forward", found.notes
    return [layer.role.value for layer in found.layers]


class Backbone(nn.Module):
    """Ends in a residual sum: no layer makes the output alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return x + self.second(x)


def test_a_backbone_that_ends_in_a_residual_has_no_head() -> None:
    assert roles_of(Backbone(), 8, 6, 6) == ["stem", "conv"]


def test_a_denoiser_that_subtracts_from_its_input_has_a_head() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.body(x)

    assert roles_of(Denoiser(), 3, 6, 6) == ["stem", "head"]


def test_a_late_convolution_with_many_channels_is_no_stem() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 8)
            self.conv = nn.Conv1d(8, 8, 3)
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(self.embed(x).transpose(1, 2)).mean(-1))

    assert roles_of(Late(), 16, 4) == ["linear", "conv", "head"]


def test_the_last_convolution_of_a_generator_is_its_head_though_no_convolution_comes_first() -> None:
    module = nn.Sequential(nn.ConvTranspose2d(8, 4, 4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh())
    assert roles_of(module, 8, 2, 2) == ["conv", "head"]
    assert [layer.role.value for layer in walk(module).layers] == ["conv", "head"]


def test_heads_joined_by_a_concatenation_are_heads() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Conv2d(3, 8, 3)
            self.boxes = nn.Conv2d(8, 4, 1)
            self.classes = nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x).relu()
            return torch.cat([self.boxes(x), self.classes(x)], 1).flatten(2)

    assert roles_of(Detector(), 3, 6, 6) == ["stem", "head", "head"]


def test_a_linear_layer_before_a_recurrent_one_is_no_head() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 8)
            self.lstm = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.embed(x))[0]

    assert roles_of(Encoder(), 16, 4) == ["linear"]


class AttentionNetwork(nn.Module):
    """Named after attention, and yet an ordinary network inside."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_class_name_makes_attention_only_of_a_few_layers_below_the_model() -> None:
    few, many = AttentionNetwork(2), AttentionNetwork(9)
    assert roles_of(few, 8) == ["linear", "head"]
    assert roles_of(nn.Sequential(few, nn.Linear(8, 2)), 8) == ["attention", "attention", "head"]
    assert roles_of(nn.Sequential(many, nn.Linear(8, 2)), 8) == ["linear"] * 9 + ["head"]


def test_key_and_value_without_a_query_are_no_attention() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(4, 8)
            self.value = nn.Linear(8, 6)
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.value(self.key(x).relu()))

    assert roles_of(Memory(), 4) == ["linear", "linear", "head"]


def test_a_bottleneck_is_no_feed_forward() -> None:
    module = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    assert roles_of(module, 16) == ["linear", "linear", "head"]
