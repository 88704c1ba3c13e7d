"""Compute paths: every one against the formula of design §3 written out, and what keeps the kept weight safe."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from padconvert.errors import UsageError
from padconvert.layers.build import upcycle
from padconvert.layers.conv import PadConv
from padconvert.layers.paths import buffer, buffer_packed, call, chooser, measure, pieces, rows_grouped
from padconvert.layers.paths.case import case_of
from padconvert.layers.paths.chooser import PATHS, able, choose
from padconvert.words import Granularity, Routing

DOUBLE = torch.float64
GRANULARITIES = [Granularity.ELEMENT, Granularity.CHANNEL]
Source = nn.Conv1d | nn.Conv2d | nn.Conv3d

CONVOLUTIONS: dict[str, tuple[Callable[[], Source], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(6, 8, 3, padding=1), (6, 9, 8)),
    "strided_groups": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding="valid", groups=4, bias=False), (4, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), (6, 5, 7)),
    "pointwise_strided": (lambda: nn.Conv2d(6, 8, 1, stride=2, bias=False), (6, 5, 7)),
    "pointwise_padded": (lambda: nn.Conv2d(6, 8, 1, padding=1), (6, 5, 4)),
    "reflect_dilated": (
        lambda: nn.Conv2d(3, 5, 3, padding=(2, 1), dilation=2, padding_mode="reflect"),
        (3, 8, 7),
    ),
    "same_circular_1d": (lambda: nn.Conv1d(6, 8, 4, padding="same", dilation=2, padding_mode="circular"), (6, 19)),
    "replicate_3d": (
        lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1, padding_mode="replicate", bias=False),
        (2, 5, 5, 5),
    ),
    "pointwise_3d": (lambda: nn.Conv3d(4, 6, 1, stride=(1, 2, 1)), (4, 3, 5, 2)),
}


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv(chooser.VARIABLE, raising=False)


def made_unequal(source: nn.Module, granularity: Granularity, *, dynamic: float = 0.4, scales: bool = True) -> PadConv:
    """A partitioned layer whose experts, scales and router all differ from their start values."""
    generator = torch.Generator().manual_seed(1)
    pad = upcycle(
        cast(nn.Conv2d, source), num_experts=3, granularity=granularity, router="linear", routing=Routing.MAP,
        learned_scales=scales, generator=generator,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in pad.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.5)
        if dynamic < 1:
            for part in pad.parts:
                units = pad.view(part).units
                mask = torch.rand(units, generator=torch.Generator().manual_seed(units)) < dynamic
                mask[0], mask[-1] = True, False
                pad.partition_(part, mask, torch.tensor([0.2, 0.3, 0.5]))
    return cast(PadConv, pad.eval())


def formula(pad: PadConv, source: nn.Module, x: Tensor) -> Tensor:
    """The source's own convolution, sample by sample, with W(b) put together unit by unit."""
    static_scale, dynamic_scale = pad.scales()
    routing_BK = pad.route(x)
    outs = []
    for b in range(len(x)):
        values = {}
        for part in pad.parts:
            view, units = pad.view(part), pad.units(part)
            static, dynamic = getattr(pad, f"{part}_static"), getattr(pad, f"{part}_dynamic")
            whole = torch.zeros(view.units, view.size, dtype=x.dtype)
            if static is not None:
                whole = whole.index_copy(0, units.static, view.cut_packed(static) * static_scale)
            summed = sum(routing_BK[b, k] * view.cut_packed(dynamic[k]) for k in range(3))
            values[part] = whole.index_copy(0, units.dynamic, cast(Tensor, summed) * dynamic_scale).reshape(view.shape)
        outs.append(torch.func.functional_call(source, values, (x[b : b + 1],)))
    return torch.cat(outs)


def forced(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(chooser.VARIABLE, name)


# ---- the same values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_every_path_computes_the_formula_and_its_gradients(case: str, granularity: Granularity) -> None:
    make, shape = CONVOLUTIONS[case]
    source = make().double()
    for dynamic in (0.4, 1.0):
        pad = made_unequal(source, granularity, dynamic=dynamic)
        x = torch.randn(3, *shape, dtype=DOUBLE, requires_grad=True)
        expected = formula(pad, source, x)
        towards = torch.randn_like(expected)
        inputs = [x, *pad.parameters()]
        gradients = torch.autograd.grad((expected * towards).sum(), inputs)
        names = [name for name, why in able(case_of(pad, x)).items() if not why]
        assert {"aggregate", "loop", "mix"} <= set(names)
        for name in names:
            found = PATHS[name].convolve(pad, x)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=name)
            own = torch.autograd.grad((found * towards).sum(), inputs)
            for ours, theirs in zip(own, gradients, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_every_path_infers_the_formula(case: str, granularity: Granularity) -> None:
    make, shape = CONVOLUTIONS[case]
    source = make().double()
    for batch, dynamic in ((1, 0.4), (5, 0.4), (2, 1.0)):
        pad = made_unequal(source, granularity, dynamic=dynamic)
        x = torch.randn(batch, *shape, dtype=DOUBLE)
        with torch.inference_mode():
            expected = formula(pad, source, x)
            names = [name for name, why in able(case_of(pad, x)).items() if not why]
            assert "buffer" in names
            for name in names:
                for _ in range(2):  # the second call finds what the first left
                    torch.testing.assert_close(PATHS[name].convolve(pad, x), expected, rtol=0, atol=1e-12, msg=name)


def test_each_case_has_the_paths_it_should() -> None:
    def names(case: str, granularity: Granularity) -> set[str]:
        make, shape = CONVOLUTIONS[case]
        pad = made_unequal(make(), granularity)
        with torch.no_grad():
            return {name for name, why in able(case_of(pad, torch.randn(2, *shape))).items() if not why}

    everywhere = {"aggregate", "loop", "buffer", "mix", "pieces"}
    assert names("plain", Granularity.CHANNEL) == everywhere | {"rows", "rows_grouped", "unfold", "buffer_packed"}
    assert names("plain", Granularity.ELEMENT) == everywhere | {"unfold"}
    assert names("pointwise", Granularity.ELEMENT) == everywhere | {"unfold", "matmul", "buffer_matmul"}
    assert names("strided_groups", Granularity.CHANNEL) == everywhere
    assert names("pointwise_3d", Granularity.CHANNEL) == everywhere | {
        "rows",
        "rows_grouped",
        "matmul",
        "buffer_packed",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_half_precision_is_as_near_as_the_source_itself(dtype: torch.dtype, granularity: Granularity) -> None:
    for case in ("plain", "pointwise"):
        make, shape = CONVOLUTIONS[case]
        pad = made_unequal(make().to(dtype), granularity)
        x = torch.randn(3, *shape).to(dtype)
        with torch.no_grad():
            exact = copy.deepcopy(pad).float()(x.float())
            for name in (name for name, why in able(case_of(pad, x)).items() if not why):
                found = PATHS[name].convolve(pad, x)
                assert found.dtype == dtype, name
                error = float((found.float() - exact).abs().max() / exact.abs().max())
                assert error < {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype], name


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_autocast_computes_in_its_dtype_and_mixes_in_fp32(granularity: Granularity) -> None:
    for case in ("plain", "pointwise"):
        make, shape = CONVOLUTIONS[case]
        pad = made_unequal(make(), granularity)
        x = torch.randn(3, *shape)
        for gradient in (False, True):
            with torch.set_grad_enabled(gradient):
                exact = pad(x)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    assert torch.equal(pad.route(x), pad.route(x))
                    for name in (name for name, why in able(case_of(pad, x)).items() if not why):
                        found = PATHS[name].convolve(pad, x)
                        assert found.dtype == torch.bfloat16, name
                        assert float((found.float() - exact).detach().abs().max() / exact.detach().abs().max()) < 3e-2


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("case", ["plain", "pointwise", "pointwise_3d"])
def test_channels_last_stays_channels_last(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = CONVOLUTIONS[case]
    form = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    pad = made_unequal(make(), Granularity.CHANNEL)
    x = torch.randn(2, *shape)
    forced(monkeypatch, name)
    with torch.no_grad():
        expected, found = pad(x), pad(x.contiguous(memory_format=form))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.is_contiguous(memory_format=form)
    assert expected.is_contiguous()


@pytest.mark.parametrize("name", PATHS)
def test_empty_batches_and_unbatched_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pad = made_unequal(nn.Conv1d(3, 4, 3, dtype=DOUBLE), Granularity.CHANNEL)
    x = torch.randn(2, 3, 9, dtype=DOUBLE)
    forced(monkeypatch, name)
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            assert pad(x[:0]).shape == (0, 4, 7)
            torch.testing.assert_close(pad(x[0]), pad(x)[0], rtol=0, atol=1e-12)


def test_a_gradient_can_be_differentiated_again() -> None:
    pad = made_unequal(nn.Conv2d(2, 3, 3, dtype=DOUBLE), Granularity.CHANNEL)
    x = torch.randn(2, 2, 4, 4, dtype=DOUBLE, requires_grad=True)
    for name in (name for name, why in able(case_of(pad, x)).items() if not why):
        assert torch.autograd.gradgradcheck(lambda x, name=name: PATHS[name].convolve(pad, x), (x,)), name


# ---- pieces of the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["pieces", "rows_grouped"])
def test_a_batch_in_pieces_is_the_batch(name: str, granularity: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 2, 2 and 1 samples; and 40 rows, whose dynamic ones are filled up to blocks by static ones."""
    source = nn.Conv2d(3, 40, 3, stride=2, padding=1, dtype=DOUBLE)
    pad = made_unequal(source, granularity, dynamic=0.3)
    x = torch.randn(5, 3, 7, 6, dtype=DOUBLE, requires_grad=True)
    case = case_of(pad, x)
    if PATHS[name].unable(case):
        assert (name, granularity) == ("rows_grouped", Granularity.ELEMENT)
        return
    assert granularity is Granularity.ELEMENT or 0 < rows_grouped._filling(case) < case.n_static
    expected = formula(pad, source, x)
    towards = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * towards).sum(), [x, *pad.parameters()])
    for entries in (2 * case.entries, 10 * case.entries):
        monkeypatch.setattr(call, "GROUPED", entries)
        found = PATHS[name].convolve(pad, x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        own = torch.autograd.grad((found * towards).sum(), [x, *pad.parameters()])
        for ours, theirs in zip(own, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("frozen", ["input", "weights", "bias"])
def test_pieces_compute_the_gradients_that_are_wanted(frozen: str) -> None:
    source = nn.Conv2d(6, 8, 3, dtype=DOUBLE)
    pad = made_unequal(source, Granularity.CHANNEL)
    x = torch.randn(3, 6, 9, 8, dtype=DOUBLE, requires_grad=frozen != "input")
    for name, parameter in pad.named_parameters():
        if frozen == "bias" and name.startswith("bias"):
            parameter.requires_grad_(False)
        if frozen == "weights" and not name.startswith("bias"):
            parameter.requires_grad_(False)
    inputs = [each for each in (x, *pad.parameters()) if each.requires_grad]
    expected, found = formula(pad, source, x), pieces.convolve(pad, x)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("granularity", "dynamic"), [(Granularity.CHANNEL, 1.0), *((g, 0.4) for g in GRANULARITIES)])
def test_a_transformed_weight_takes_a_path_that_can_be_transformed(granularity: Granularity, dynamic: float) -> None:
    """`x` is a plain tensor there; pieces would be the choice without the transform."""
    pad = made_unequal(nn.Conv2d(16, 32, 3, padding=1, dtype=DOUBLE), granularity, dynamic=dynamic)
    x = torch.randn(8, 16, 16, 16, dtype=DOUBLE)
    assert choose(pad, x) == "pieces" or dynamic < 1
    values = dict(pad.named_parameters())
    found = torch.func.grad(lambda values: torch.func.functional_call(pad, values, (x,)).square().sum())(values)
    wanted = torch.autograd.grad(pad(x).square().sum(), list(values.values()))
    for name, theirs in zip(values, wanted, strict=True):
        torch.testing.assert_close(found[name], theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, in its forward mode
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_linear_layer_can_be_transformed(granularity: Granularity) -> None:
    pad = made_unequal(nn.Linear(6, 5, dtype=DOUBLE), granularity)
    x, tangent = torch.randn(7, 6, dtype=DOUBLE), torch.randn(7, 6, dtype=DOUBLE)
    values: dict[str, Tensor] = dict(pad.named_parameters())

    def of(values: dict[str, Tensor]) -> Tensor:
        return cast(Tensor, torch.func.functional_call(pad, values, (x,)).square().sum())

    wanted = torch.autograd.grad(pad(x).square().sum(), list(values.values()))
    for theirs, ours in zip(wanted, torch.func.grad(of)(values).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    forward = torch.func.jvp(lambda x: pad(x), (x,), (tangent,))[1]
    small = 1e-6
    torch.testing.assert_close(
        forward, (pad(x + small * tangent) - pad(x - small * tangent)) / (2 * small), rtol=1e-6, atol=1e-6
    )


def test_pieces_keep_no_weight_of_a_sample_for_the_gradient() -> None:
    pad = made_unequal(nn.Conv2d(6, 8, 3), Granularity.CHANNEL, scales=False)
    kept: list[int] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        pieces.convolve(pad, torch.randn(50, 6, 4, 4))
    assert max(kept) < 50 * pad.view("weight").size * pad.count_dynamic("weight")


# ---- the buffer ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[("buffer", 2), ("buffer_packed", 1), ("buffer_packed", 2)], ids=str)
def buffered(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[PadConv, nn.Module, Tensor]]:
    """A layer that has just inferred through its buffer."""
    path, batch = request.param
    source = nn.Conv2d(6, 8, 3, padding=1, dtype=DOUBLE)
    pad = made_unequal(source, Granularity.ELEMENT if path == "buffer" else Granularity.CHANNEL, scales=False)
    x = torch.randn(batch, 6, 9, 8, dtype=DOUBLE)
    forced(monkeypatch, path)
    with torch.no_grad():
        assert choose(pad, x) == path
        pad(x)
    assert pad in buffer._buffers.kept
    return (pad, source, x)  # type: ignore[return-value]


def check(pad: PadConv, source: nn.Module, x: Tensor, before: Tensor) -> None:
    """The layer computes the formula of what it holds now, which is not what it held before."""
    with torch.no_grad():
        found = pad(x)
        torch.testing.assert_close(found, formula(pad, source, x), rtol=0, atol=1e-12)
    assert float((found - before).abs().max()) > 1e-3


CHANGES: dict[str, Callable[[PadConv], object]] = {
    "static_in_place": lambda pad: cast(Tensor, pad.weight_static).mul_(1.5),
    "one_static_entry": lambda pad: cast(Tensor, pad.weight_static)[3].add_(2.0),
    "static_by_data": lambda pad: cast(Tensor, pad.weight_static).data.mul_(1.5),
    "dynamic_in_place": lambda pad: cast(Tensor, pad.weight_dynamic).mul_(1.5),
    "dynamic_by_data": lambda pad: cast(Tensor, pad.weight_dynamic).data.mul_(1.5),
    "bias": lambda pad: cast(Tensor, pad.bias_static).add_(1.5),
    "other_data": lambda pad: setattr(pad.weight_static, "data", torch.randn_like(cast(Tensor, pad.weight_static))),
    "other_parameter": lambda pad: setattr(
        pad, "weight_static", nn.Parameter(torch.randn_like(cast(Tensor, pad.weight_static)))
    ),
    "scales": lambda pad: (pad.add_scales_(), cast(Tensor, pad.scale_logit).fill_(1.0)),  # type: ignore[func-returns-value]
    "router": lambda pad: cast(nn.Module, pad.router).get_parameter("weight").neg_(),
    "partition": lambda pad: pad.partition_(
        "weight", (mask := pad.units("weight").mask()) & (mask.cumsum(0) > 1), torch.tensor([0.9, 0.1, 0.0])
    ),
    "state": lambda pad: pad.load_state_dict({n: v + 0.5 if v.is_floating_point() else v
                                              for n, v in pad.state_dict().items()}),
    "half_and_back": lambda pad: pad.bfloat16().double(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_seen(change: str, buffered: tuple[PadConv, nn.Module, Tensor]) -> None:
    pad, source, x = buffered
    with torch.no_grad():
        before = pad(x)
        CHANGES[change](pad)
    check(pad, source, x, before)


def test_an_update_under_inference_mode_is_seen(buffered: tuple[PadConv, nn.Module, Tensor]) -> None:
    pad, source, x = buffered
    with torch.inference_mode():
        before = pad(x).clone()
        cast(Tensor, pad.weight_static)[5].add_(3.0)
    check(pad, source, x, before)


def test_parameters_made_under_inference_mode_are_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, "buffer")
    with torch.inference_mode():
        source = nn.Conv2d(6, 8, 3, padding=1, dtype=DOUBLE)
        pad = made_unequal(source, Granularity.CHANNEL)
        x = torch.randn(2, 6, 9, 8, dtype=DOUBLE)
        before = pad(x)
        cast(Tensor, pad.weight_static)[0, 0, 0, 0] += 5
        torch.testing.assert_close(pad(x), formula(pad, source, x), rtol=0, atol=1e-12)
        assert float((pad(x) - before).abs().max()) > 1e-3
    assert pad not in buffer._buffers.kept


def test_outputs_do_not_share_the_buffer(buffered: tuple[PadConv, nn.Module, Tensor]) -> None:
    pad, _, x = buffered
    with torch.no_grad():
        first = pad(x)
        kept = first.clone()
        pad(torch.randn_like(x))
    assert torch.equal(first, kept)


def test_a_buffer_is_in_no_state_no_copy_and_no_pickle(buffered: tuple[PadConv, nn.Module, Tensor]) -> None:
    pad, source, x = buffered
    fresh = made_unequal(source, pad.granularity, scales=False)
    assert list(pad.state_dict()) == list(fresh.state_dict())
    assert len(pickle.dumps(pad)) == len(pickle.dumps(fresh))
    again = copy.deepcopy(pad)
    assert again not in buffer._buffers.kept
    with torch.no_grad():
        cast(Tensor, again.weight_static).mul_(2)
        before = pad(x)
    check(again, source, x, before)
    with torch.no_grad():
        assert torch.equal(pad(x), before)
    stream = io.BytesIO()
    torch.save(pad.state_dict(), stream)


@pytest.mark.parametrize("path", [buffer, buffer_packed])
@pytest.mark.parametrize("rows", [8, 9])  # two threads take halves of 8 rows' mix; of 9 they cannot
def test_a_mix_that_is_cut_for_threads_is_whole(path: ModuleType, rows: int) -> None:
    source = nn.Conv2d(3, rows, 3, padding=1, dtype=DOUBLE)
    pad = made_unequal(source, Granularity.CHANNEL)
    x = torch.randn(1, 3, 5, 5, dtype=DOUBLE)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            torch.testing.assert_close(path.convolve(pad, x), formula(pad, source, x), rtol=0, atol=1e-12)
    finally:
        torch.set_num_threads(threads)


def test_a_buffer_goes_with_its_layer() -> None:
    pad = made_unequal(nn.Conv2d(3, 4, 3), Granularity.CHANNEL)
    count = len(buffer._buffers.kept)
    with torch.no_grad():
        buffer.convolve(pad, torch.randn(1, 3, 5, 5))
    assert len(buffer._buffers.kept) == count + 1
    del pad
    assert len(buffer._buffers.kept) == count


def test_autograd_never_meets_the_buffer(buffered: tuple[PadConv, nn.Module, Tensor]) -> None:
    pad, source, x = buffered
    x.requires_grad_()
    assert not choose(pad, x).startswith("buffer")
    first, second = pad(x), pad(x * 2)
    with torch.no_grad():
        pad(x)
    (first.sum() + second.sum()).backward()
    wanted = torch.autograd.grad((formula(pad, source, x) + formula(pad, source, x * 2)).sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted, rtol=0, atol=1e-10)


def test_threads_have_buffers_of_their_own(buffered: tuple[PadConv, nn.Module, Tensor]) -> None:
    pad, source, x = buffered
    inputs = [torch.randn_like(x) for _ in range(4)]
    with torch.no_grad():
        expected = [formula(pad, source, each) for each in inputs]
    wrong: list[int] = []
    start = threading.Barrier(4)

    def run(at: int) -> None:
        start.wait()
        with torch.no_grad():
            founds = (pad(inputs[at]) for _ in range(50))
            wrong.extend(at for found in founds if not torch.allclose(found, expected[at], rtol=0, atol=1e-12))

    threads = [threading.Thread(target=run, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_exported_program_takes_any_batch_whatever_is_forced(
    granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(monkeypatch, "buffer")
    source = nn.Conv2d(6, 8, 3, padding=1, dtype=DOUBLE)
    pad = made_unequal(source, granularity)
    x = torch.randn(2, 6, 9, 8, dtype=DOUBLE)
    with torch.no_grad():
        pad(x)
        program = torch.export.export(pad, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        more = torch.randn(5, 6, 9, 8, dtype=DOUBLE)
        torch.testing.assert_close(program.module()(more), formula(pad, source, more), rtol=0, atol=1e-12)


# ---- the choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_the_environment_forces_a_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pad = made_unequal(nn.Conv2d(6, 8, 1), Granularity.CHANNEL)
    called = []
    own = PATHS[name].convolve
    monkeypatch.setattr(PATHS[name], "convolve", lambda layer, x: called.append(name) or own(layer, x))  # type: ignore[func-returns-value]
    forced(monkeypatch, name)
    with torch.no_grad():
        pad(torch.randn(2, 6, 5, 5))
    assert called == [name]


def test_an_unknown_path_is_an_error_with_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, "bufer")
    pad = made_unequal(nn.Conv2d(6, 8, 1), Granularity.CHANNEL)
    with pytest.raises(
        UsageError, match=r"PADCONVERT_PATH=bufer.*aggregate, buffer, buffer_matmul, buffer_packed, pieces, loop.*mix"
    ):
        pad(torch.randn(2, 6, 5, 5))


def test_a_forced_path_that_cannot_is_replaced_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chooser._say_once.cache_clear()
    forced(monkeypatch, "matmul")
    source = nn.Conv2d(6, 8, 3, dtype=DOUBLE)
    pad = made_unequal(source, Granularity.CHANNEL)
    x = torch.randn(2, 6, 5, 5, dtype=DOUBLE)
    for _ in range(2):
        torch.testing.assert_close(pad(x), formula(pad, source, x), rtol=0, atol=1e-12)
    assert len(caplog.records) == 1
    assert "matmul cannot compute a layer (only for 1x1 convolutions" in caplog.text


def test_equal_cases_are_given_equal_paths_without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for clock in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(f"time.{clock}", lambda: pytest.fail("a choice read the clock"))
    x = torch.randn(4, 6, 9, 8)
    first, second = (made_unequal(nn.Conv2d(6, 8, 3, padding=1), Granularity.CHANNEL) for _ in range(2))
    with torch.no_grad():
        chosen = choose(first, x)
        chooser.estimated.cache_clear()
        assert choose(second, x) == chosen
        assert case_of(first, x) == case_of(second, x)


def test_a_choice_depends_on_the_shape() -> None:
    """Small maps of many channels are bound by their weights, large maps by their multiply-adds."""

    def chosen(channels: int, side: int, batch: int) -> str:
        source = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        pad = made_unequal(source, Granularity.CHANNEL, dynamic=0.3)
        with torch.no_grad():
            return choose(pad, torch.empty(batch, channels, side, side))

    assert chosen(64, 56, 1) == "buffer"
    assert chosen(512, 7, 32) in ("rows", "mix")


def test_a_race_of_paths_drops_the_slow_and_leaves_equal_ones_to_the_estimate() -> None:
    race = measure._Race(["estimated", "fastest", "near", "slow"])
    for name, seconds in (("estimated", 1.01), ("fastest", 1.0), ("near", 1.1), ("slow", 1.3)):
        for each in (seconds, seconds, 9.0):  # a single disturbed turn does not count
            race.told(name, each)
    assert race.within(measure.BEHIND) == ["estimated", "fastest", "near"]
    assert race.within(measure.EQUAL)[:1] == ["estimated"]


def test_measured_choices_belong_to_the_model_they_were_measured_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is played: `loop` is said to take no time, every other path a second."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(chooser, "promising", lambda *_: ["buffer", "loop", "aggregate"])
    for name in ("buffer", "aggregate"):
        own = PATHS[name].convolve

        def slow(layer: PadConv, x: Tensor, own: Callable[..., Tensor] = own) -> Tensor:
            now[0] += 1
            return own(layer, x)

        monkeypatch.setattr(PATHS[name], "convolve", slow)
    layer = made_unequal(nn.Conv2d(3, 4, 3), Granularity.CHANNEL)
    model = nn.Sequential(layer, nn.ReLU(), made_unequal(nn.Conv2d(4, 4, 3), Granularity.ELEMENT))
    x = torch.randn(2, 3, 9, 9)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert measure.tune_(lambda: model(x), model) == {"0": "loop", "2": "loop"}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert choose(layer, x) == "loop"
        assert choose(layer, torch.randn(2, 3, 8, 9)) != "loop"
        assert choose(copy.deepcopy(layer), x) != "loop"
        assert now[0] > 0
        measure.untune_(model)
        assert choose(layer, x) != "loop"
