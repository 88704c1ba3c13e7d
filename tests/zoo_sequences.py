"""Small networks of linear, recurrent and attention layers for the zoo."""

# A module's call is untyped in torch.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 5))


class Mixer(nn.Module):
    """Mixes over tokens and over channels: a linear layer sees transposed, non-contiguous inputs."""

    def __init__(self, tokens: int = 16, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.token_mlp = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channel_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.token_mlp(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channel_mlp(x)).mean(1))


class CausalBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc = nn.Linear(width, 4 * width)
        self.fc_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc_proj(functional.gelu(self.fc(self.norm2(x))))


class CausalLM(nn.Module):
    """A GPT-2 of linear layers, its head tied to the embedding."""

    def __init__(self, vocabulary: int = 40, width: int = 16, context: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(CausalBlock(width, 2) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class EncoderNet(nn.Module):
    """torch's encoder layer: its fast path reads the weights of its children."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class DecoderNet(nn.Module):
    """torch's decoder layer has no fast path: its feed-forward layers are called."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.decoder(target, memory))


class AttentionPool(nn.Module):
    """`nn.MultiheadAttention` by itself, with a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        pooled, _ = self.attention(self.query.expand(len(x), -1, -1), x, x)
        return self.head(pooled[:, 0])


class LSTMTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(24, 16)
        self.tags = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(ids))
        return self.tags(self.hidden(states).relu())


class GRUNet(nn.Module):
    """Returns its hidden state beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(5, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.output = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states, last = self.gru(self.input(x).relu())
        return self.output(states), last


class Siamese(nn.Module):
    """One embedder, called for both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, 8)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        one, two = (self.fc(self.embedder(x).mean((2, 3))) for x in (left, right))
        return (one - two).abs().sum(1)
