"""The paper's own form of a partially dynamic convolution, rebuilt from its equations as the baseline. Never shipped.

    Ŵ = λ_d · M ⊙ Σ_k π_k(x) D_k  +  λ_s · (1 − M) ⊙ W_s        y = Ŵ ∗ x

D is dense, [K, *S], and so is the mask over every kernel: both parts are multiplied by it in every call, all K kernels
are summed to one weight a sample, and the batch is one grouped convolution with as many groups as samples.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from padconvert.layers.conv import PadConv2d
from padconvert.rewrite import names_of, pad_layers, swap_


class PaperConv2d(nn.Module):
    """The values of a (folded or training) Pad layer in the paper's form."""

    mask_KOI: Tensor

    @torch.no_grad()
    def __init__(self, layer: PadConv2d) -> None:
        super().__init__()
        assert layer.padding_mode == "zeros"
        view, dtype = layer.view("weight"), layer.stored_dtype
        mask_OI = view.as_full(layer.units("weight").mask()[:, None].expand(-1, view.size).to(dtype))
        experts_KOI = layer.expert_tensors("weight").to(dtype)  # scaled already
        self.register_buffer("mask_KOI", mask_OI.expand(layer.num_experts, *mask_OI.shape).clone())
        self.dynamic_KOI = nn.Parameter(experts_KOI.clone())
        self.static_OI = nn.Parameter(experts_KOI[0].clone())
        self.bias_KO = nn.Parameter(layer.expert_tensors("bias").to(dtype).clone()) if layer.has_bias else None
        self.dynamic_scale = nn.Parameter(torch.ones((), dtype=dtype, device=mask_OI.device))
        self.static_scale = nn.Parameter(torch.ones((), dtype=dtype, device=mask_OI.device))
        self.router = copy.deepcopy(layer.router)
        self.mixing_dtype = layer.mixing_dtype
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride, layer.padding, layer.dilation, layer.groups,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        assert self.router is not None
        routing_BK = self.router(x.to(self.mixing_dtype).flatten(2).mean(-1)).to(x.dtype)
        dynamic_KOI = self.dynamic_scale * self.mask_KOI * self.dynamic_KOI
        weight_KOI = dynamic_KOI + self.static_scale * (1 - self.mask_KOI) * self.static_OI
        batch, outputs = len(x), weight_KOI.shape[1]
        weight = (routing_BK @ weight_KOI.flatten(1)).reshape(batch * outputs, *weight_KOI.shape[2:])
        bias = None if self.bias_KO is None else (routing_BK @ self.bias_KO).flatten()
        out = nn.functional.conv2d(
            x.flatten(0, 1)[None], weight, bias, self.stride, self.padding, self.dilation, batch * self.groups
        )
        return out.reshape(batch, outputs, *out.shape[2:])


def in_the_papers_form(model: nn.Module) -> nn.Module:
    """A copy with every Pad convolution in the paper's form."""
    made = copy.deepcopy(model)
    replacements: dict[str, nn.Module] = {}
    for layer in pad_layers(made).values():
        assert isinstance(layer, PadConv2d)
        replacements |= dict.fromkeys(names_of(made, layer), PaperConv2d(layer))
    swap_(made, replacements)
    return made
