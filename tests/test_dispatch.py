"""Rows sorted by expert, and their product with their experts' weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from padconvert.layers.paths import grouped
from padconvert.layers.paths.dispatch import Dispatch


def dispatched(experts: int) -> tuple[Tensor, Dispatch]:
    """Choices that leave out an expert, give another one every row, and are not in order."""
    chosen_TJ = torch.tensor([[2, 0], [0, 5], [0, 2], [4, 0], [5, 0]])
    return chosen_TJ, Dispatch.of(chosen_TJ, experts)


def test_rows_are_sorted_by_expert_once() -> None:
    chosen_TJ, rows = dispatched(6)
    assert rows.counts == [5, 0, 2, 0, 1, 2]
    assert rows.ends_K.tolist() == [5, 5, 7, 7, 8, 10]
    assert rows.ends_K.dtype == torch.int32
    assert torch.equal(chosen_TJ.flatten()[rows.order_N], rows.expert_N)
    assert rows.token_N.tolist() == [0, 1, 2, 3, 4, 0, 2, 3, 1, 4]
    assert torch.equal(rows.order_N[rows.inverse_N], torch.arange(10))
    parts = {k: part.tolist() for k, (part,) in rows.chosen(rows.token_N)}
    assert parts == {0: [0, 1, 2, 3, 4], 2: [0, 2], 4: [3], 5: [1, 4]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_grouped_product_is_the_loop(dtype: torch.dtype, bias: bool) -> None:
    """torch computes it on a CPU too, where the paths do not ask it to."""
    _, rows = dispatched(6)
    torch.manual_seed(0)
    found = []
    given = [torch.randn(10, 16), torch.randn(6, 8, 16), torch.randn(6, 8)]
    for product in (grouped.linear, grouped.linear_by_loop):
        x, weight, shift = (value.to(dtype).requires_grad_() for value in given)
        out = product(x, weight, shift if bias else None, rows)
        out.float().square().sum().backward()
        found.append([out.detach(), *(value.grad for value in (x, weight, shift) if value.grad is not None)])
    assert len(found[0]) == 3 + bias
    for at_once, by_loop in zip(*found, strict=True):
        assert float(at_once.abs().max()) > 0.1
        tolerance = 1e-5 if dtype is torch.float32 else 0.15
        torch.testing.assert_close(at_once, by_loop, atol=tolerance, rtol=tolerance / 5)
    expected = torch.stack([given[1][k] @ given[0][n] for n, k in enumerate(rows.expert_N.tolist())])
    expected = expected + given[2][rows.expert_N] if bias else expected
    torch.testing.assert_close(found[0][0].float(), expected, atol=tolerance, rtol=tolerance)


def test_what_a_grouped_product_does_not_take() -> None:
    assert not grouped.serves(torch.zeros(2, 8, dtype=torch.bfloat16))  # on a CPU
    whole = torch.zeros(3, 8, 16, dtype=torch.bfloat16)
    assert grouped.suits(whole)
    assert not grouped.suits(whole[:, :7].contiguous())
    assert not grouped.suits(whole[:, :, :12].contiguous())
    assert not grouped.suits(whole[:1].expand(3, -1, -1))  # one expert seen three times
    assert not grouped.suits(whole.transpose(1, 2))
