"""Pad layers against the formula of design §3, written out sample by sample."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from padconvert.layers.build import Static, build_layer, upcycle
from padconvert.layers.conv import PadConv1d, PadConv2d
from padconvert.layers.kmeans import separation, usual_top_probability
from padconvert.layers.linear import PadLinear
from padconvert.layers.packed import Units, assemble, pack_bits, unpack_bits
from padconvert.layers.pad import PadLayer
from padconvert.layers.routers import linear, mlp, router_class, tensor_shapes
from padconvert.words import Granularity, Routing

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Conv1d | nn.Conv2d | nn.Conv3d], tuple[int, ...]]] = {
    "strided_groups": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, dtype=DOUBLE), (6, 9, 9)),
    "same_circular": (
        lambda: nn.Conv1d(6, 8, 4, padding="same", dilation=2, padding_mode="circular", dtype=DOUBLE),
        (6, 19),
    ),
    "reflect": (lambda: nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="reflect", dtype=DOUBLE), (3, 8, 7)),
    "replicate_3d_no_bias": (
        lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1, padding_mode="replicate", bias=False, dtype=DOUBLE),
        (2, 5, 5, 5),
    ),
    "depthwise_valid": (lambda: nn.Conv2d(4, 8, 3, padding="valid", groups=4, dtype=DOUBLE), (4, 6, 6)),
}


def made_unequal(
    layer: Static, granularity: Granularity, *, router: str = "linear", routing: Routing = Routing.TOKEN, seed: int = 0
) -> PadLayer:
    """A partitioned layer whose experts, scales and router all differ from their start values."""
    generator = torch.Generator().manual_seed(seed)
    pad = upcycle(
        layer,
        num_experts=3,
        granularity=granularity,
        router=router,
        routing=routing,
        learned_scales=True,
        generator=generator,
    )
    with torch.no_grad():
        for parameter in pad.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)
        for part in pad.parts:
            units = pad.view(part).units
            mask = torch.arange(units) % 3 == 0
            pad.partition_(part, mask, torch.tensor([0.2, 0.3, 0.5]))
    return pad


def formula(pad: PadLayer, part: str, routing_K: Tensor) -> Tensor:
    """λ_d · m ⊙ Σ_k π_k D_k + λ_s · (1 − m) ⊙ W_s, unit by unit."""
    view, units = pad.view(part), pad.units(part)
    assert pad.scale_logit is not None
    dynamic_scale = 2 * torch.sigmoid(pad.scale_logit)
    full = torch.zeros(view.units, view.size, dtype=DOUBLE)
    static, dynamic = getattr(pad, f"{part}_static"), getattr(pad, f"{part}_dynamic")
    for place, unit in enumerate(units.static.tolist()):
        full[unit] = (2 - dynamic_scale) * static[place].reshape(-1)
    for place, unit in enumerate(units.dynamic.tolist()):
        full[unit] = dynamic_scale * sum(routing_K[k] * dynamic[k, place].reshape(-1) for k in range(3))
    return full.reshape(view.shape)


@pytest.mark.parametrize("granularity", [Granularity.ELEMENT, Granularity.CHANNEL])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_is_the_formula_for_every_sample(case: str, granularity: Granularity) -> None:
    make, shape = CONVOLUTIONS[case]
    static = make()
    pad = made_unequal(static, granularity, router="mlp")
    x = torch.randn(3, *shape, dtype=DOUBLE)
    found = pad(x)
    routing_BK = pad.router(x.flatten(2).mean(-1))  # type: ignore[misc]
    assert float((routing_BK[0] - routing_BK[1]).detach().abs().max()) > 1e-3
    for b in range(3):
        plain = copy.deepcopy(static)
        plain.weight.data = formula(pad, "weight", routing_BK[b])
        if plain.bias is not None:
            plain.bias.data = formula(pad, "bias", routing_BK[b])
        torch.testing.assert_close(found[b], plain(x[b]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("granularity", [Granularity.ELEMENT, Granularity.CHANNEL])
def test_a_linear_layer_is_the_formula_for_every_token(granularity: Granularity) -> None:
    pad = made_unequal(nn.Linear(5, 6, dtype=DOUBLE), granularity)
    x = torch.randn(2, 4, 5, dtype=DOUBLE)
    found = pad(x)
    for b, t in itertools.product(range(2), range(4)):
        routing_K = pad.router(x[b, t])  # type: ignore[misc]
        expected = formula(pad, "weight", routing_K) @ x[b, t] + formula(pad, "bias", routing_K)
        torch.testing.assert_close(found[b, t], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(pad(x[0, 0]), found[0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("granularity", [Granularity.ELEMENT, Granularity.CHANNEL])
def test_sequence_routing_takes_one_weight_a_sample(granularity: Granularity) -> None:
    pad = made_unequal(nn.Linear(5, 6, dtype=DOUBLE), granularity, routing=Routing.SEQUENCE)
    x = torch.randn(2, 4, 5, dtype=DOUBLE)
    found = pad(x)
    for b in range(2):
        routing_K = pad.router(x[b].mean(0))  # type: ignore[misc]
        expected = x[b] @ formula(pad, "weight", routing_K).T + formula(pad, "bias", routing_K)
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_upcycling_and_turning_static_keep_the_function(case: str, router: str, scales: bool) -> None:
    make, shape = CONVOLUTIONS[case]
    static = make()
    x = torch.randn(4, *shape, dtype=DOUBLE)
    for granularity in (Granularity.ELEMENT, Granularity.CHANNEL):
        pad = upcycle(
            static,
            num_experts=5,
            granularity=granularity,
            router=router,
            routing=Routing.TOKEN,
            learned_scales=scales,
            generator=torch.Generator().manual_seed(3),
        )
        torch.testing.assert_close(pad(x), static(x), rtol=0, atol=1e-12)
        units = pad.view("weight").units
        for dynamic in (units // 2, 1, 0):
            pad.partition_("weight", torch.arange(units) < dynamic, torch.tensor([0.1, 0.2, 0.3, 0.3, 0.1]))
            torch.testing.assert_close(pad(x), static(x), rtol=0, atol=1e-12)


def test_a_newly_static_entry_takes_the_mean_of_its_experts() -> None:
    pad = made_unequal(nn.Linear(4, 3, bias=False, dtype=DOUBLE), Granularity.ELEMENT)
    assert pad.weight_dynamic is not None
    assert pad.scale_logit is not None
    before, old = pad.weight_dynamic.detach().clone(), pad.units("weight").dynamic.tolist()
    dynamic_scale = 2 * torch.sigmoid(pad.scale_logit.detach())
    keep = pad.units("weight").mask()
    keep[old[1]] = False
    pad.partition_("weight", keep, torch.tensor([0.5, 0.25, 0.25]))
    assert pad.weight_static is not None
    place = pad.units("weight").static.tolist().index(old[1])
    mean = 0.5 * before[0, 1] + 0.25 * before[1, 1] + 0.25 * before[2, 1]
    torch.testing.assert_close(pad.weight_static[place], mean * dynamic_scale / (2 - dynamic_scale))
    torch.testing.assert_close(pad.weight_dynamic, torch.cat([before[:, :1], before[:, 2:]], 1))


def test_a_mask_never_grows() -> None:
    pad = made_unequal(nn.Linear(4, 3, dtype=DOUBLE), Granularity.ELEMENT)
    with pytest.raises(AssertionError, match="only shrinks"):
        pad.partition_("weight", torch.ones(12, dtype=torch.bool), torch.ones(3) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_mixes_in_fp32(dtype: torch.dtype) -> None:
    static = nn.Conv2d(8, 8, 3, dtype=torch.float32)
    x = torch.randn(2, 8, 6, 6)
    pad = made_unequal(static.to(dtype), Granularity.ELEMENT)
    assert pad.expert_tensors("weight").dtype == torch.float32
    assert pad.route(x.to(dtype)).dtype == torch.float32
    out = pad(x.to(dtype)).detach()
    assert out.dtype == dtype
    exact = copy.deepcopy(pad).float()(x.to(dtype).float()).detach()
    assert (
        float((out.float() - exact).abs().max() / exact.abs().max())
        < {
            torch.float32: 1e-6,
            torch.bfloat16: 2e-2,
            torch.float16: 3e-3,
        }[dtype]
    )


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_batch_one_trains(router: str) -> None:
    pad = made_unequal(nn.Conv2d(3, 4, 3, dtype=DOUBLE), Granularity.CHANNEL, router=router).train()
    pad(torch.randn(1, 3, 5, 5, dtype=DOUBLE)).square().sum().backward()
    for name, parameter in pad.named_parameters():
        assert parameter.grad is not None, name
    assert float(pad.router.get_parameter("weight" if router == "linear" else "expand.weight").grad.abs().max()) > 0  # type: ignore[union-attr]


def test_empty_batches_and_unbatched_inputs() -> None:
    pad = made_unequal(nn.Conv1d(3, 4, 3, dtype=DOUBLE), Granularity.CHANNEL)
    x = torch.randn(2, 3, 9, dtype=DOUBLE)
    assert pad(x[:0]).shape == (0, 4, 7)
    torch.testing.assert_close(pad(x[0]), pad(x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("granularity", [Granularity.ELEMENT, Granularity.CHANNEL])
def test_an_empty_layer_of_the_same_facts_takes_the_state(granularity: Granularity) -> None:
    pad = made_unequal(nn.Conv2d(3, 4, 3, dtype=DOUBLE), granularity)
    pad.scale_logit = None
    other = build_layer(pad.facts())
    other.load_state_dict(pad.state_dict())
    x = torch.randn(2, 3, 5, 5, dtype=DOUBLE)
    assert torch.equal(other(x), pad(x))
    assert sorted(pad.state_dict()) == sorted(
        ["weight_static", "weight_dynamic", "bias_static", "bias_dynamic", "router.weight", "router.bias"]
        + (["dynamic_index"] if granularity is Granularity.CHANNEL else ["dynamic_bitmask", "bias_dynamic_bitmask"])
    )


def test_parents_may_read_facts_but_not_the_weight() -> None:
    pad = made_unequal(nn.Linear(5, 6), Granularity.ELEMENT)
    assert (pad.weight.dtype, tuple(pad.weight.shape)) == (torch.float32, (6, 5))
    with pytest.raises(TypeError):
        torch.nn.functional.linear(torch.randn(2, 5), pad.weight)  # type: ignore[arg-type]
    assert isinstance(pad, PadLinear)
    assert (pad.in_features, pad.out_features) == (5, 6)
    conv = made_unequal(nn.Conv2d(4, 6, 3, stride=2, groups=2), Granularity.ELEMENT)
    assert isinstance(conv, PadConv2d)
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride) == (4, 6, (3, 3), (2, 2))
    assert isinstance(made_unequal(nn.Conv1d(4, 6, 3), Granularity.ELEMENT), PadConv1d)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_folding_a_router_keeps_its_routing(name: str) -> None:
    torch.manual_seed(0)
    router = router_class(name)(6, 4).double()
    points_NC = torch.randn(200, 6, dtype=DOUBLE) * torch.tensor([1, 5, 0.1, 2, 3, 1]) + 4
    router.initialise_(points_NC, torch.Generator().manual_seed(1))
    router.anneal_(0.5, 30.0)
    before = router(points_NC)
    router.fold_()
    torch.testing.assert_close(router(points_NC), before, rtol=0, atol=1e-10)
    stored = {key: tuple(value.shape) for key, value in router.state_dict().items()}
    assert stored == tensor_shapes(name, 6, 4)


def test_the_mlp_routers_temperature_falls_to_one() -> None:
    router = mlp.Router(6, 4)
    router.initialise_(None, torch.Generator().manual_seed(1))
    x = torch.randn(50, 6)
    plain = router(x)
    router.anneal_(0.0, 30.0)
    assert float((router(x) - 0.25).detach().abs().max()) < float((plain - 0.25).detach().abs().max()) / 10
    router.anneal_(0.5, 30.0)
    assert router.temperature is not None
    assert float(router.temperature) == 15.5
    router.anneal_(1.0, 30.0)
    assert torch.equal(router(x), plain)


@pytest.mark.parametrize("wanted", [0.5, 0.8])
def test_kmeans_routing_separates_clusters_at_the_wanted_sharpness(wanted: float) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0], [40, 0], [0, 40], [40, 40]])
    points_NC = (centres[:, None] + torch.randn(4, 100, 2, generator=generator) * 6).flatten(0, 1)
    router = linear.Router(2, 4)
    router.initialise_(points_NC, generator, wanted)
    routing = router(points_NC)
    assert float(routing.detach().amax(-1).mean()) == pytest.approx(wanted, abs=1e-3)
    top = routing.argmax(-1).view(4, 100)
    assert len({int(row.mode().values) for row in top}) == 4
    assert all(int((row == row.mode().values).sum()) >= 95 for row in top)


@pytest.mark.parametrize(("experts", "expected"), [(2, 2 / 3), (4, 0.5), (8, 5 / 12)])
def test_a_first_routing_is_as_sure_of_two_experts_as_of_eight(experts: int, expected: float) -> None:
    """A third of the way from even to certain: with a number for all, two experts would begin, and stay, even."""
    assert usual_top_probability(experts) == pytest.approx(expected)
    assert usual_top_probability(experts, top_k=2) == 0.8
    generator = torch.Generator().manual_seed(0)
    points_NC = torch.randn(500, 3, generator=generator)
    router = linear.Router(3, experts)
    router.initialise_(points_NC, generator)
    assert float(router(points_NC).detach().amax(-1).mean()) == pytest.approx(expected, abs=1e-3)


def test_kmeans_of_equal_points_is_no_error() -> None:
    router = linear.Router(3, 4)
    router.initialise_(torch.ones(10, 3), torch.Generator().manual_seed(0))
    assert torch.allclose(router(torch.ones(1, 3)), torch.full((1, 4), 0.25))


@pytest.mark.parametrize(("apart", "low", "high"), [(0.0, -0.06, 0.06), (12.0, 0.9, 1.0)])
def test_separation_tells_groups_from_one_cloud(apart: float, low: float, high: float) -> None:
    """Four groups of deviation 1 round corners `apart` from each other. The channels' units do not count."""
    generator = torch.Generator().manual_seed(0)
    corners = apart * torch.tensor([[0.0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
    points_NC = (corners[:, None] + torch.randn(4, 500, 3, generator=generator)).flatten(0, 1)
    scale = torch.tensor([1e-3, 1.0, 1e3])
    found = separation(points_NC * scale, 4, torch.Generator().manual_seed(1))
    assert low < found < high
    assert separation(points_NC, 4, torch.Generator().manual_seed(1)) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("points", [torch.ones(10, 3), torch.zeros(4, 1), torch.eye(4)])
def test_separation_of_few_or_equal_points_is_no_error(points: torch.Tensor) -> None:
    found = separation(points, 4, torch.Generator().manual_seed(0))
    assert -1 <= found <= 1


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_are_little_endian_and_come_back(bits: list[bool]) -> None:
    packed = pack_bits(torch.tensor(bits))
    assert packed.tolist() == list(sum(bit << i for i, bit in enumerate(bits)).to_bytes((len(bits) + 7) // 8, "little"))
    assert unpack_bits(packed, len(bits)).tolist() == bits


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_of_assembled_experts_are_those_of_copies(size: int) -> None:
    units = Units.of_mask(torch.tensor([True, False, False, True, False]))
    static_NS = torch.randn(3, size, dtype=DOUBLE, requires_grad=True)
    dynamic_KDS = torch.randn(4, 2, size, dtype=DOUBLE, requires_grad=True)
    weight_KUS = torch.randn(4, 5, size, dtype=DOUBLE)

    full_KUS = assemble(static_NS, dynamic_KDS, units, 4)
    taken = torch.autograd.grad((full_KUS * weight_KUS).sum(), (static_NS, dynamic_KDS))

    for k in range(4):
        torch.testing.assert_close(full_KUS[k, units.static], static_NS.detach(), rtol=0, atol=0)
        torch.testing.assert_close(full_KUS[k, units.dynamic], dynamic_KDS[k].detach(), rtol=0, atol=0)
    torch.testing.assert_close(taken[0], weight_KUS[:, units.static].sum(0), rtol=0, atol=1e-15)
    torch.testing.assert_close(taken[1], weight_KUS[:, units.dynamic], rtol=0, atol=0)
    assert torch.autograd.gradgradcheck(lambda s, d: assemble(s, d, units, 4).square(), (static_NS, dynamic_KDS))
