"""Feed-forward blocks as mixtures of experts, held against their formula: y = Σ_k π_k down_k(act(up_k(x)))."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from padconvert.finetune.balance import balancing_loss, load_balance, z_loss
from padconvert.fold import fold_
from padconvert.layers.build import build_layer, upcycle
from padconvert.layers.collecting import collecting
from padconvert.layers.ffn import PadLinearMember, join_groups_
from padconvert.layers.linear import PadLinear
from padconvert.layers.padding import attending, ignore_padding_, watch_padding_
from padconvert.layers.paths import grouped
from padconvert.layers.routers import router_class
from padconvert.partition.evidence import cuts_of, measure
from padconvert.partition.scores import score_named
from padconvert.words import Granularity, Place, Routing

E, D, H, B, T = 4, 6, 10, 3, 5


class Ffn(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.gate = nn.Linear(D, H, bias=False) if gated else None

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        del attention_mask
        if self.gate is None:
            return self.down(functional.gelu(self.up(x)))  # type: ignore[no-any-return]
        return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]

    @property
    def names(self) -> list[str]:
        return ["up", "down"] if self.gate is None else ["gate", "up", "down"]


def as_experts(block: Ffn, granularity: Granularity, top_k: int, routing: Routing, scales: bool = True) -> Ffn:
    """The block's dynamic form, κ = 1, all experts equal."""
    torch.manual_seed(7)
    made = copy.deepcopy(block)
    for place, name in enumerate(block.names):
        member = upcycle(
            getattr(block, name),
            num_experts=E,
            granularity=granularity,
            router="linear",
            routing=routing,
            learned_scales=scales,
            generator=torch.Generator().manual_seed(3),
            top_k=top_k,
            group=block.names[0],
            place=Place.LAST if name == "down" else Place.PEER if place else Place.FIRST,
        )
        setattr(made, name, member)
    join_groups_(made)
    return made


@torch.no_grad()
def make_unequal_(model: nn.Module) -> None:
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if name.endswith("_dynamic"):
            parameter.add_(0.3 * torch.randn_like(parameter))
        if name.endswith("scale_logit"):
            parameter.fill_(0.4)


@torch.no_grad()
def partition_(model: Ffn) -> None:
    mean = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for name in model.names:
        layer = getattr(model, name)
        for part in layer.unit_parts if layer.granularity is Granularity.NEURON else layer.parts:
            units = layer.view(part).units
            layer.partition_(part, torch.arange(units) % 3 == 1, mean)


def by_formula(model: Ffn, x: Tensor) -> Tensor:
    """Every expert on every token; merged, one weight for every sequence."""
    layers = {name: getattr(model, name) for name in model.names}
    first = layers[model.names[0]]
    routing = first.route(x)
    if routing.dim() == 2:
        routing = routing[:, None].expand(B, T, E)
    weights = {n: layer.expert_tensors("weight") for n, layer in layers.items()}
    biases = {n: layer.expert_tensors("bias") if layer.has_bias else None for n, layer in layers.items()}

    def ffn(x: Tensor, weight: dict[str, Tensor], bias: dict[str, Tensor | None]) -> Tensor:
        each = {n: functional.linear(x, weight[n], bias[n]) for n in model.names[:-1]}
        hidden = functional.silu(each["gate"]) * each["up"] if "gate" in each else functional.gelu(each["up"])
        return functional.linear(hidden, weight["down"], bias["down"])

    if first.top_k == 0:
        mixed = []
        for b in range(B):
            share = routing[b, 0]
            weight = {n: torch.einsum("k,koi->oi", share, w) for n, w in weights.items()}
            bias = {n: None if v is None else share @ v for n, v in biases.items()}
            mixed.append(ffn(x[b], weight, bias))
        return torch.stack(mixed)
    out = torch.zeros_like(x)
    for k in range(E):
        bias = {n: None if v is None else v[k] for n, v in biases.items()}
        out = out + routing[..., k : k + 1] * ffn(x, {n: w[k] for n, w in weights.items()}, bias)
    return out


def inputs() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


CASES = pytest.mark.parametrize(
    ("top_k", "routing"),
    [(2, Routing.TOKEN), (1, Routing.TOKEN), (E, Routing.TOKEN), (2, Routing.SEQUENCE), (0, Routing.SEQUENCE)],
)
GRANULARITIES = pytest.mark.parametrize("granularity", list(Granularity))
GATED = pytest.mark.parametrize("gated", [False, True])


@CASES
@GRANULARITIES
@GATED
def test_a_block_of_experts_is_the_formula(gated: bool, granularity: Granularity, top_k: int, routing: Routing) -> None:
    source, x = Ffn(gated).double(), inputs()
    model = as_experts(source, granularity, top_k, routing).eval()
    torch.testing.assert_close(model(x), source(x), atol=1e-14, rtol=0)  # promise 1
    make_unequal_(model)
    unequal = model(x).detach()
    torch.testing.assert_close(unequal, by_formula(model, x), atol=1e-12, rtol=0)
    assert float((unequal - source(x).detach()).abs().max()) > 1e-2
    partition_(model)
    parted = model(x).detach()
    torch.testing.assert_close(parted, by_formula(model, x), atol=1e-12, rtol=0)
    assert float((parted - unequal).abs().max()) > 1e-3


@pytest.mark.parametrize("tokens", [1, 300])
@GRANULARITIES
def test_scales_on_weights_or_on_outputs_are_the_formula_with_its_gradients(
    granularity: Granularity, tokens: int
) -> None:
    """Of one token the outputs are smaller than the experts, of 300 the experts are."""
    model = as_experts(Ffn(True).double(), granularity, 2, Routing.TOKEN).eval()
    make_unequal_(model)
    partition_(model)
    x = torch.randn(1, tokens, D, dtype=torch.float64)
    found, wanted = model(x), by_formula(model, x)
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)
    learned = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(out.square().sum(), learned, allow_unused=True) for out in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-9)


@GRANULARITIES
def test_under_autocast_scales_are_rounded_no_more_than_weights_are(granularity: Granularity) -> None:
    model = as_experts(Ffn(True), granularity, 2, Routing.TOKEN).eval()
    make_unequal_(model)
    partition_(model)
    x = torch.randn(1, 2, D)
    logits = [p for name, p in model.named_parameters() if name.endswith("scale_logit")]
    assert logits
    wanted = torch.autograd.grad(model(x).square().sum(), logits)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(model(x).float().square().sum(), logits)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02 * float(other.abs().max() + 1))


@CASES
@GRANULARITIES
@GATED
def test_folded_and_rebuilt_it_computes_the_same(
    gated: bool, granularity: Granularity, top_k: int, routing: Routing
) -> None:
    source, x = Ffn(gated).double(), inputs()
    model = as_experts(source, granularity, top_k, routing).eval()
    make_unequal_(model)
    partition_(model)
    before = model(x)
    fold_(model)
    torch.testing.assert_close(model(x), before, atol=1e-12, rtol=0)
    again = Ffn(gated).double()
    for name in model.names:
        setattr(again, name, build_layer(getattr(model, name).facts()))
    join_groups_(again)
    again.load_state_dict(model.state_dict())  # one by one the members of a neuron block could not know their units
    assert torch.equal(again.eval()(x), model(x))
    assert torch.equal(copy.deepcopy(again)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(again))(x), model(x))


@CASES
@GRANULARITIES
@GATED
def test_inference_writes_in_place_what_autograd_computes(
    gated: bool, granularity: Granularity, top_k: int, routing: Routing
) -> None:
    model, x = as_experts(Ffn(gated).double(), granularity, top_k, routing).eval(), inputs()
    make_unequal_(model)
    for ready in (lambda _: None, partition_, fold_):
        ready(model)
        expected = model(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)
            assert model(x[:0]).shape == x[:0].shape


def test_a_hidden_state_in_another_layout_or_with_room_before_it_is_read_alike() -> None:
    """Inference reads runs of its memory: wherever it begins, and however a pointwise operation left it."""
    model, x = as_experts(Ffn(gated=False).double(), Granularity.NEURON, 2, Routing.TOKEN).eval(), inputs()
    make_unequal_(model)
    partition_(model)
    expected = model(x).detach()
    with torch.no_grad():
        for moved in (
            lambda h: torch.cat([h * 0 + 7, h])[len(h) :],
            lambda h: h.transpose(0, 2).contiguous().transpose(0, 2),
        ):
            hidden = functional.gelu(model.up(x))
            assert moved(hidden).storage_offset() or not moved(hidden).is_contiguous()
            torch.testing.assert_close(model.down(moved(hidden)), expected, atol=1e-12, rtol=0)


def test_a_grouped_product_takes_the_experts_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that a GPU takes, without its kernel: forward and backward, with and without autograd."""
    model = as_experts(Ffn(gated=True), Granularity.ELEMENT, 2, Routing.TOKEN).eval()
    make_unequal_(model)
    x = inputs().float()
    expected = model(x)
    expected.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    calls: list[int] = []
    monkeypatch.setattr(grouped, "serves", lambda _: True)
    monkeypatch.setattr(grouped, "suits", lambda _: True)

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return grouped.linear_by_loop(*given)  # the kernel does not take rows as short as these

    monkeypatch.setattr(grouped, "linear", counted)
    out = model(x)
    out.square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected.detach())
    assert len(calls) == 6
    torch.testing.assert_close(out, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


def test_a_neuron_block_stores_its_units_once_and_columns_of_its_last_layer() -> None:
    model = as_experts(Ffn(gated=True), Granularity.NEURON, 2, Routing.TOKEN)
    partition_(model)
    shapes = {name: tuple(value.shape) for name, value in fold_(model).state_dict().items()}
    assert shapes == {
        "gate.weight_static": (7, D),
        "gate.weight_dynamic": (E, 3, D),
        "gate.dynamic_index": (3,),
        "gate.router.weight": (E, D),
        "gate.router.bias": (E,),
        "up.weight_static": (7, D),
        "up.weight_dynamic": (E, 3, D),
        "up.bias_static": (7,),
        "up.bias_dynamic": (E, 3),
        "down.weight_static": (D, 7),
        "down.weight_dynamic": (E, D, 3),
        "down.bias_static": (D,),
    }


@pytest.mark.parametrize("granularity", [Granularity.ELEMENT, Granularity.CHANNEL])
@pytest.mark.parametrize("routing", [Routing.TOKEN, Routing.SEQUENCE])
def test_a_layer_on_its_own_computes_its_chosen_experts(granularity: Granularity, routing: Routing) -> None:
    """`level: linear`, the paper's code."""
    source = nn.Linear(D, H).double()
    layer = upcycle(
        source,
        num_experts=E,
        granularity=granularity,
        router="linear",
        routing=routing,
        learned_scales=True,
        generator=torch.Generator().manual_seed(1),
        top_k=2,
    ).eval()
    x = inputs()
    torch.testing.assert_close(layer(x), source(x), atol=1e-14, rtol=0)
    make_unequal_(layer)
    pi = layer.route(x).reshape(B, -1, E).expand(B, T, E)
    assert ((pi > 0).sum(-1) == 2).all()
    each = functional.linear(x, layer.expert_tensors("weight").flatten(0, 1)).reshape(B, T, E, H)
    expected = torch.einsum("btk,btkh->bth", pi, each + layer.expert_tensors("bias"))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


@GRANULARITIES
def test_the_experts_gradients_sum_to_the_sources(granularity: Granularity) -> None:
    source, x = Ffn(gated=False).double(), inputs()
    model = as_experts(source, granularity, 2, Routing.TOKEN, scales=False).eval()
    source(x).square().sum().backward()
    model(x).square().sum().backward()
    for name in source.names:
        layer, static = getattr(model, name), getattr(source, name)
        found = layer.view("weight").as_full(layer.view("weight").cut_packed(layer.weight_dynamic.grad)).sum(0)
        torch.testing.assert_close(found, static.weight.grad, atol=1e-12, rtol=0)


# ---- routing -----------------------------------------------------------------------------------------------------


def test_gates_are_a_softmax_over_the_chosen() -> None:
    router = router_class("linear")(D, E, 2).eval()
    router.initialise_(None, torch.Generator().manual_seed(0))
    x = inputs().float()
    logits = functional.linear(x, router.weight, router.bias)  # type: ignore[arg-type]
    top = logits.topk(2, -1)
    expected = torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(-1))
    torch.testing.assert_close(router(x), expected)
    torch.testing.assert_close(router(x).sum(-1), torch.ones(B, T))


def test_the_choice_is_noisy_in_training_only() -> None:
    router = router_class("linear")(D, E, 2)
    x = torch.zeros(200, D)  # all logits equal: only noise can choose
    chosen = lambda: {tuple(row.nonzero().flatten().tolist()) for row in router(x)}  # noqa: E731
    assert len(chosen()) == 6  # type: ignore[no-untyped-call]
    router.eval()
    assert len(chosen()) == 1  # type: ignore[no-untyped-call]
    assert router_class("linear")(D, E)(x).std() == 0  # without top-k there is no noise


def test_balancing_losses_have_their_values() -> None:
    router = router_class("linear")(2, 2, 1).eval()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))  # type: ignore[operator]
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with collecting() as notes:
        router(x)
    p = float(torch.tensor([4.0, 0.0]).softmax(0)[0])
    first = (3 * p + (1 - p)) / 4
    assert float(load_balance(notes[0]).detach()) == pytest.approx(2 * (0.75 * first + 0.25 * (1 - first)), rel=1e-5)
    log_sum = float(torch.tensor([4.0, 0.0]).logsumexp(0))
    assert float(z_loss(notes[0]).detach()) == pytest.approx(log_sum**2, rel=1e-5)

    class Weights:
        balance_weight, z_weight = 0.5, 0.25

    expected = 0.5 * load_balance(notes[0]).detach() + 0.25 * z_loss(notes[0]).detach()
    total = balancing_loss(notes, Weights())
    assert total is not None
    torch.testing.assert_close(total, expected)
    total.backward()
    assert float(router.weight.grad.abs().max()) > 0  # type: ignore[operator, union-attr]
    assert balancing_loss([], Weights()) is None


def test_nothing_is_gathered_for_soft_routers_or_outside() -> None:
    class Weights:
        balance_weight, z_weight = 0.5, 0.25

    router = router_class("linear")(D, E)
    with collecting() as notes:
        router(torch.zeros(3, D))
    assert len(notes) == 1
    assert balancing_loss(notes, Weights()) is None
    router(torch.zeros(3, D))
    assert len(notes) == 1


# ---- padding -----------------------------------------------------------------------------------------------------


def padded() -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[1] * T, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    return inputs() + 0 * mask[..., None], mask


@pytest.mark.parametrize("top_k", [0, 2])
def test_routing_by_sequence_does_not_see_padding(top_k: int) -> None:
    model = as_experts(Ffn(gated=False).double(), Granularity.ELEMENT, top_k, Routing.SEQUENCE).eval()
    make_unequal_(model)
    x, mask = padded()
    alone = model(x[1:2, :3]).detach()  # the second sequence without its padding
    torch.testing.assert_close(model(x, attention_mask=mask)[1:2, :3], alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(model(x, mask)[1:2, :3], alone, atol=1e-12, rtol=0)  # by place, as by keyword
    with attending(mask):
        torch.testing.assert_close(model(x)[1:2, :3], alone, atol=1e-12, rtol=0)
    assert float((model(x).detach()[1:2, :3] - alone).abs().max()) > 1e-3
    with pytest.raises(RuntimeError, match="attention_mask"):
        model(x, attention_mask=mask[:, None, None])


def test_a_calls_mask_does_not_outlive_it() -> None:
    model = as_experts(Ffn(gated=False).double(), Granularity.ELEMENT, 2, Routing.SEQUENCE).eval()
    make_unequal_(model)
    x, mask = padded()
    free = model(x)
    model(x, attention_mask=mask)
    assert torch.equal(model(x), free)
    with pytest.raises(RuntimeError):
        model(x[:, :, :2], attention_mask=mask)
    assert torch.equal(model(x), free)


def test_the_hooks_come_once_and_go() -> None:
    model = nn.Linear(2, 2)
    watch_padding_(model)
    watch_padding_(model)
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    ignore_padding_(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_pre_hooks_with_kwargs
    assert not model._forward_hooks_always_called


def test_padding_is_no_evidence() -> None:
    router = router_class("linear")(D, E, 2)
    x, mask = padded()
    with collecting() as notes, attending(mask):
        router(x.float())
    assert notes[0].routing_TK.shape == (9, E)


# ---- the slot ----------------------------------------------------------------------------------------------------


def test_a_member_called_out_of_turn_says_so() -> None:
    model = as_experts(Ffn(gated=True), Granularity.ELEMENT, 2, Routing.TOKEN).eval()
    x = inputs().float()
    with pytest.raises(RuntimeError, match="before the block's first member"):
        model.up(x)
    model.gate(x)  # type: ignore[misc]
    with pytest.raises(RuntimeError, match=r"shape \[3, 4, ...\]"):
        model.up(x[:, :4])
    model(x)
    with pytest.raises(RuntimeError, match="before"):  # the last member has emptied the slot
        model.down(torch.zeros(B, T, 2 * H))


def test_threads_do_not_mix_their_routings() -> None:
    model = as_experts(Ffn(gated=True).double(), Granularity.ELEMENT, 2, Routing.TOKEN).eval()
    make_unequal_(model)
    xs = [torch.randn(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [model(x) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            wrong.extend([i] * (not torch.equal(model(xs[i]), expected[i])))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_computed_again_in_the_backward_pass_gives_the_same_gradients(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    grads = []
    for again in (False, True):
        model = as_experts(Ffn(gated=True).double(), Granularity.NEURON, 2, Routing.TOKEN).eval()
        make_unequal_(model)
        x = inputs().requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 5
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("granularity", [Granularity.ELEMENT, Granularity.NEURON])
@pytest.mark.parametrize(("top_k", "routing"), [(2, Routing.TOKEN), (2, Routing.SEQUENCE), (0, Routing.SEQUENCE)])
def test_an_exported_program_computes_the_same_at_other_sizes(
    granularity: Granularity, top_k: int, routing: Routing
) -> None:
    model = as_experts(Ffn(gated=True).double(), granularity, top_k, routing).eval()
    make_unequal_(model)
    partition_(model)
    x = inputs()
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 1: length},))
    for other in (x, torch.cat([x, 2 * x])[:, :4]):
        torch.testing.assert_close(program.module()(other), model(other), atol=1e-12, rtol=0)


# ---- partition ---------------------------------------------------------------------------------------------------


def test_a_hidden_unit_is_ranked_by_all_that_the_block_has_of_it() -> None:
    """First order is exact in the limit: turning one hidden unit static changes the loss by its score · its entries."""
    model = as_experts(Ffn(gated=True).double(), Granularity.NEURON, 2, Routing.TOKEN, scales=False).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_dynamic"):
                parameter.add_(1e-5 * torch.randn_like(parameter))
    x, target = inputs(), torch.randn(B, T, D, dtype=torch.float64)
    loss = lambda: (model(x) - target).square().sum()  # noqa: E731
    layers = {name: getattr(model, name) for name in model.names}
    assert cuts_of(layers) == {
        ("gate", "weight"): (("gate", "weight"), ("up", "weight"), ("up", "bias"), ("down", "weight"))
    }
    scores, mean = measure(model, layers, score_named("taylor"), [loss], torch.Generator())
    score_U = scores["gate", "weight"]
    before, entries = loss().detach(), 3 * D + 1  # type: ignore[no-untyped-call]
    for unit in range(H):
        single = copy.deepcopy(model)
        mask = torch.ones(H, dtype=torch.bool)
        mask[unit] = False
        for name in model.names:
            layer = getattr(single, name)
            for part in layer.unit_parts:
                layer.partition_(part, mask, mean[name])
        change = abs(float((single(x) - target).square().sum().detach() - before))
        assert change == pytest.approx(float(score_U[unit]) * entries, rel=2e-2, abs=1e-10)


def test_the_mean_routing_of_a_block_is_its_first_members() -> None:
    model = as_experts(Ffn(gated=False).double(), Granularity.ELEMENT, 2, Routing.TOKEN).eval()
    make_unequal_(model)
    x = inputs()
    layers = {name: getattr(model, name) for name in model.names}
    _, mean = measure(model, layers, score_named("variance"), [lambda: model(x).sum()], torch.Generator())
    expected = model.up.route(x).reshape(-1, E).mean(0)  # type: ignore[operator]
    torch.testing.assert_close(mean["up"], expected)
    torch.testing.assert_close(mean["down"], expected)


def test_a_block_becomes_plain_as_a_whole() -> None:
    source, x = Ffn(gated=True).double(), inputs()
    model = as_experts(source, Granularity.ELEMENT, 2, Routing.TOKEN).eval()
    make_unequal_(model)
    mean = torch.full((E,), 1 / E, dtype=torch.float64)
    for name in ("gate", "up"):
        layer = getattr(model, name)
        for part in layer.parts:
            layer.partition_(part, torch.zeros(layer.view(part).units, dtype=torch.bool), mean)
    before = model(x)
    half = fold_(copy.deepcopy(model))
    assert isinstance(half.gate, PadLinearMember)  # still widens for its last member
    torch.testing.assert_close(half(x), before, atol=1e-12, rtol=0)
    for part in model.down.parts:  # type: ignore[union-attr]
        model.down.partition_(part, torch.zeros(model.down.view(part).units, dtype=torch.bool), mean)  # type: ignore[operator]
    before = model(x)
    whole = fold_(model)
    assert not any(isinstance(module, PadLinear) for module in whole.modules())
    torch.testing.assert_close(whole(x), before, atol=1e-12, rtol=0)
