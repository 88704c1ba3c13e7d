"""A feed-forward block as a mixture of experts (`neuron`, E = 8, top-2), beside the dense block and transformers' own
mixture of the same size, Mixtral's: gated, without biases, at its fastest implementation for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import made
from benchmarks.rows import Row, Setting, Table, paired_row, run
from padconvert.bench import synchronised
from padconvert.paired import Effort, measure

WIDTH, HIDDEN = 384, 1536
TOKENS, QUICK_TOKENS = (128, 1024, 4096), (128,)
#: `batched_mm` gathers the weights of every token's experts: 38 GB for 4096 of them
IMPLEMENTATIONS = ("eager", "grouped_mm")
EFFORT = Effort(rounds=41, least=11, seconds=30.0)
DEPENDS = ("padconvert/layers", "tests/benchmarks/experts.py", "tests/benchmarks/made.py")


class Mixtral(nn.Module):
    """transformers' block for tokens [T, C]."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=made.MOE_EXPERTS,
            num_experts_per_tok=made.TOP_K,
        )  # fmt: skip
        config._experts_implementation = implementation
        self.block: Any = MixtralSparseMoeBlock(config)  # type: ignore[no-untyped-call]
        for parameter in self.block.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x[None])
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found.reshape(x.shape)


def contenders(given: Setting) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense, gated = (made.Ffn(WIDTH, HIDDEN, each).to(given.device, given.dtype).eval() for each in (False, True))
    found: dict[str, nn.Module] = {
        "dense": dense, "neuron": made.mixture(dense), "dense gated": gated, "neuron gated": made.mixture(gated),
    }  # fmt: skip
    theirs = {f"mixtral {each}": Mixtral(each).to(given.device, given.dtype).eval() for each in IMPLEMENTATIONS}
    return {**found, **theirs}


def take(tokens: int, given: Setting) -> Row:
    x = torch.randn(tokens, WIDTH, dtype=given.dtype, device=given.device)
    blocks = contenders(given)
    calls = {name: synchronised(lambda block=block: block(x), given.device) for name, block in blocks.items()}  # type: ignore[misc]
    with torch.no_grad():
        found = measure(calls, given.effort(EFFORT))
    bases = ("dense", "dense gated", *(f"mixtral {each}" for each in IMPLEMENTATIONS))
    return paired_row(found, bases, tokens=tokens)


def main(given: Setting) -> None:
    table = Table("experts", given, DEPENDS)
    for tokens in QUICK_TOKENS if given.quick else TOKENS:
        table.row(f"T {tokens}", lambda tokens=tokens: take(tokens, given))  # type: ignore[misc]


if __name__ == "__main__":
    run(main)
