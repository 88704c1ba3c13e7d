"""The zoo: small networks with random weights, each named for what it holds, with a probe that fits.

`build(name)` gives the module in eval mode and its probe, the same for every call; a transformers model skips the
test where transformers is not installed. All but those in `UNPICKLABLE` survive `torch.save(module)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zoo_convolutions as convolutions
import zoo_sequences as sequences
import zoo_traps as traps
from padconvert.walk.probe import InputSpec, ProbeSpec

Build = Callable[[], tuple[nn.Module, ProbeSpec]]

# A parametrised module has a class made at run time, which torch refuses to pickle.
UNPICKLABLE = frozenset({"parametrized"})


def floats(*shape: int, name: str | None = None, dtype: str = "float32") -> InputSpec:
    return InputSpec(name, shape, dtype)


def ids(high: int, length: int = 16, name: str | None = None) -> InputSpec:
    return InputSpec(name, (length,), "int64", high)


def build(name: str) -> tuple[nn.Module, ProbeSpec]:
    """The named network, seeded, in eval mode."""
    return ZOO[name]()


def _entry(make: Callable[[], nn.Module], *inputs: InputSpec) -> Build:
    def entry() -> tuple[nn.Module, ProbeSpec]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = make()
            _settle(module)
        return module.eval(), ProbeSpec(inputs, 0, "the zoo")

    return entry


def _settle(module: nn.Module) -> None:
    """Make norms and biases look trained: fresh ones are zeros and ones, which hides a lost term."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is not None:
            assert child.running_var is not None
            child.running_mean.normal_(0, 0.1)
            child.running_var.uniform_(0.5, 1.5)
    for name, parameter in module.named_parameters():
        if name.endswith("bias") and not parameter.any():
            nn.init.normal_(parameter, 0, 0.1)


def _transformers(model: str, config: str, inputs: tuple[InputSpec, ...], **settings: Any) -> Build:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers", reason="this zoo entry is a transformers model")
        module: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return module

    return _entry(make, *inputs)


TOKENS = (ids(50, name="input_ids"),)
PIXELS = (floats(3, 32, 32, name="pixel_values"),)
BERT_SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}

ZOO: dict[str, Build] = {
    # convolutions
    "resnet": _entry(convolutions.ResNet, floats(3, 32, 32)),
    "mobilenet_depthwise": _entry(convolutions.MobileNet, floats(3, 32, 32)),
    "efficientnet_se": _entry(convolutions.EfficientNet, floats(3, 32, 32)),
    "unet_transposed": _entry(convolutions.UNet, floats(3, 32, 32)),
    "audio_1d_dilated": _entry(convolutions.DilatedAudio, floats(1, 256)),
    "audio_1d_separable": _entry(convolutions.SeparableAudio, floats(1, 256)),
    "video_3d": _entry(convolutions.Video, floats(3, 8, 32, 32)),
    "densenet": _entry(convolutions.DenseNet, floats(3, 32, 32)),
    "inception_concat": _entry(convolutions.Inception, floats(3, 32, 32)),
    "squeezenet_all_convolutions": _entry(convolutions.SqueezeNet, floats(3, 32, 32)),
    "onet_prelu_three_heads": _entry(convolutions.ONet, floats(3, 48, 48)),
    "grouped_dilated": _entry(convolutions.GroupedDilated, floats(4, 32, 32)),
    "padding_modes": _entry(convolutions.PaddingModes, floats(3, 32, 32)),
    "segmentation_dict_output": _entry(convolutions.Segmentation, floats(3, 32, 32)),
    "autoencoder_transposed": _entry(convolutions.Autoencoder, floats(1, 32, 32)),
    "vgg_flatten": _entry(convolutions.vgg, floats(1, 28, 28)),
    "no_bias": _entry(convolutions.NoBias, floats(3, 32, 32)),
    # sequences and vectors
    "mlp": _entry(sequences.mlp, floats(12)),
    "mixer_transposed_inputs": _entry(sequences.Mixer, floats(3, 16, 16)),
    "causal_lm_tied_head": _entry(sequences.CausalLM, ids(40)),
    "torch_encoder_layer": _entry(sequences.EncoderNet, floats(16, 6)),
    "torch_decoder_layer": _entry(sequences.DecoderNet, floats(4, 16), floats(6, 16)),
    "multihead_attention": _entry(sequences.AttentionPool, floats(16, 6)),
    "lstm_linear": _entry(sequences.LSTMTagger, ids(30)),
    "gru_tuple_output": _entry(sequences.GRUNet, floats(16, 5)),
    "siamese_called_twice": _entry(sequences.Siamese, floats(1, 16, 16), floats(1, 16, 16)),
    # traps
    "weight_tied": _entry(traps.WeightTied, floats(8)),
    "overlapping_views": _entry(traps.OverlappingViews, floats(8)),
    "module_reused": _entry(traps.ModuleReused, floats(3, 16, 16)),
    "half_precision": _entry(lambda: traps.SmallCNN().half(), floats(3, 16, 16, dtype="float16")),
    "bfloat16": _entry(lambda: traps.SmallCNN().bfloat16(), floats(3, 16, 16, dtype="bfloat16")),
    "double_precision": _entry(lambda: traps.SmallCNN().double(), floats(3, 16, 16, dtype="float64")),
    "non_contiguous": _entry(traps.non_contiguous, floats(3, 16, 16)),
    "frozen": _entry(traps.frozen, floats(3, 16, 16)),
    "shared_buffer": _entry(traps.SharedBuffer, floats(6)),
    "nested_containers": _entry(traps.Nested, floats(6)),
    "functional_reader": _entry(traps.FunctionalReader, floats(6)),
    "never_called": _entry(traps.NeverCalled, floats(3, 16, 16)),
    "subclassed": _entry(traps.Subclassed, floats(3, 16, 16)),
    "old_weight_and_spectral_norm": _entry(traps.old_norms, floats(6)),
    "parametrized": _entry(traps.parametrized, floats(3, 16, 16)),
    # transformers
    "bert": _transformers("BertForSequenceClassification", "BertConfig", TOKENS, **BERT_SIZE),
    "bert_masked_lm_tied": _transformers("BertForMaskedLM", "BertConfig", TOKENS, **BERT_SIZE),
    "distilbert": _transformers(
        "DistilBertForSequenceClassification", "DistilBertConfig", TOKENS,
        dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=50, max_position_embeddings=32,
    ),
    "albert_shared_layers": _transformers(
        "AlbertForSequenceClassification", "AlbertConfig", TOKENS, **BERT_SIZE, embedding_size=8
    ),
    "gpt2_own_conv1d": _transformers(
        "GPT2LMHeadModel", "GPT2Config", TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=50,
        bos_token_id=0, eos_token_id=0,
    ),
    "llama": _transformers(
        "LlamaForCausalLM", "LlamaConfig", TOKENS, **BERT_SIZE, num_key_value_heads=1, tie_word_embeddings=False
    ),
    "t5_encoder_decoder": _transformers(
        "T5ForConditionalGeneration", "T5Config", (*TOKENS, ids(50, 8, name="decoder_input_ids")),
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50, feed_forward_proj="gated-gelu",
    ),
    "vit": _transformers(
        "ViTForImageClassification", "ViTConfig", PIXELS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, image_size=32, patch_size=8,
    ),
    "swin_windows": _transformers(
        "SwinForImageClassification", "SwinConfig", PIXELS, image_size=32, patch_size=2, embed_dim=8, depths=[2, 1],
        num_heads=[1, 2], window_size=4,
    ),
    "transformers_resnet": _transformers(
        "ResNetForImageClassification", "ResNetConfig", PIXELS, embedding_size=8, hidden_sizes=[16, 24],
        depths=[1, 2], layer_type="bottleneck",
    ),
    "convnext": _transformers(
        "ConvNextForImageClassification", "ConvNextConfig", PIXELS, hidden_sizes=[8, 16], depths=[1, 1],
        num_stages=2, image_size=32, layer_scale_init_value=1.0,
    ),
    "segformer_own_hooks": _transformers(
        "SegformerForSemanticSegmentation", "SegformerConfig", PIXELS, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
    ),
    "whisper_audio": _transformers(
        "WhisperForConditionalGeneration", "WhisperConfig",
        (floats(8, 32, name="input_features"), ids(50, 4, name="decoder_input_ids")),
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, num_mel_bins=8, max_source_positions=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
}  # fmt: skip
