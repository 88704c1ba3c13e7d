"""What a conversion came to, counted from the model and the file that were made: layers, parameters, bytes, verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from padconvert.checkpoint.header import Header
from padconvert.checkpoint.layout import expected_tensors
from padconvert.checkpoint.manifest import Manifest
from padconvert.checkpoint.read import Checkpoint
from padconvert.errors import VerificationError
from padconvert.finetune.evaluate import Judged
from padconvert.layers.pad import PadLayer
from padconvert.plan import LayerPlan, Plan, TensorSizes
from padconvert.plan.cost import active_copies, cost_of
from padconvert.plan.count import item_sizes
from padconvert.results import STARVED, Comparison, LayerResult, RouterUse, Totals
from padconvert.words import Verdict

_BUG = "This is an error of padconvert; please report it with the plan (--plan-out)."


def layer_results(plan: Plan, model: nn.Module | None) -> tuple[LayerResult, ...]:
    """Every layer's verdict and counts: those of `model` once it is partitioned, else what the plan knows."""
    return tuple(_layer_result(entry, model) for entry in plan.layers)


def _layer_result(entry: LayerPlan, model: nn.Module | None) -> LayerResult:
    info, choice = entry.info, entry.choice
    total = math.prod(info.weight_shape)
    n_dynamic = _dynamic_entries(entry, model)
    return LayerResult(
        name=info.name,
        aliases=info.aliases,
        kind=info.kind,
        verdict=entry.verdict,
        reason=entry.reason,
        granularity=None if choice is None else choice.granularity,
        num_experts=None if choice is None else choice.num_experts,
        dynamic_ratio=None if choice is None else float(choice.dynamic_ratio),
        n_static=None if n_dynamic is None else total - n_dynamic,
        n_dynamic=n_dynamic,
        detail=info.detail,
        type=info.type,
        role=info.role,
        dtype=info.dtype,
        weight_shape=info.weight_shape,
        macs=info.macs,
        group="" if choice is None else choice.group,
        place=entry.place.value,
        top_k=None if choice is None else choice.top_k,
    )


def _dynamic_entries(entry: LayerPlan, model: nn.Module | None) -> int | None:
    """Dynamic weight entries of a converted layer; None where only the partition will tell."""
    if entry.verdict is not Verdict.CONVERT:
        return None
    if model is not None:
        layer = model.get_submodule(entry.info.name)
        return layer.count_dynamic("weight") * layer.view("weight").size if isinstance(layer, PadLayer) else 0
    size = math.prod(entry.info.weight_shape) // max(entry.n_units, 1)
    return None if entry.n_dynamic is None else entry.n_dynamic * size


def planned_totals(plan: Plan, source_bytes: int) -> Totals:
    """The plan's prediction as totals; the header is not known yet. `source_bytes` is the source's whole file."""
    cost = plan.cost
    entries = sum(math.prod(entry.info.weight_shape) for entry in plan.converted)
    pooled = {name for pool in plan.pools for name in pool.names}
    dynamic = sum(pool.target for pool in plan.pools) + sum(
        _dynamic_entries(entry, None) or 0 for entry in plan.converted if entry.info.name not in pooled
    )
    return Totals(
        params_source=cost.params_source,
        params_output=cost.params_output,
        params_fully_dynamic=cost.params_fully_dynamic,
        bytes_source=source_bytes,
        bytes_output=cost.bytes_output,
        bytes_fully_dynamic=cost.bytes_fully_dynamic,
        bytes_values=cost.bytes_values,
        bytes_masks=cost.bytes_masks,
        bytes_router=cost.bytes_router,
        bytes_header=0,
        tensor_bytes_source=cost.bytes_source,
        tensor_bytes_output=cost.bytes_output,
        tensor_bytes_fully_dynamic=cost.bytes_fully_dynamic,
        dynamic_ratio=dynamic / entries if entries else 0.0,
        macs_source=_macs(plan),
        params_active_source=cost.params_source,
        params_active_output=cost.params_active_output,
        params_active_fully_dynamic=cost.params_active_fully_dynamic,
    )


def _macs(plan: Plan) -> int | None:
    """Multiply-adds per sample of all layers, where every called layer's are known."""
    known = [entry.info.macs for entry in plan.layers if entry.info.macs is not None]
    return sum(known) if known else None


def file_totals(plan: Plan, checkpoint: Checkpoint, model: nn.Module, sizes: TensorSizes, source_bytes: int) -> Totals:
    """The totals of a written file, counted from its header.

    Raises VerificationError where values or masks are not what the plan predicted (exactly; within one filter, or one
    hidden unit, where those of several layers or blocks are ranked together).
    """
    values = masks = router = params = 0
    for entry in checkpoint.manifest.layers:
        for name in expected_tensors(entry):
            slot = checkpoint.header.tensors[name]
            kind = name.rsplit(".", 1)[-1]
            if kind.endswith(("_bitmask", "_index")):
                masks += slot.nbytes
                params -= math.prod(slot.shape)
            elif kind.endswith(("_static", "_dynamic")):
                values += slot.nbytes
            else:
                router += slot.nbytes
    params += sum(math.prod(slot.shape) for slot in checkpoint.header.tensors.values())
    plain = sum(_plain_bytes(entry, checkpoint, model) for entry in plan.converted)
    _check_prediction(plan, model, sizes, values + plain, masks)
    predicted = planned_totals(plan, source_bytes)
    header = checkpoint.header.data_start
    results = [result for result in layer_results(plan, model) if result.n_dynamic is not None]
    entries = sum((result.n_dynamic or 0) + (result.n_static or 0) for result in results)
    return Totals(
        params_source=predicted.params_source,
        params_output=params,
        params_fully_dynamic=predicted.params_fully_dynamic,
        bytes_source=source_bytes,
        bytes_output=checkpoint.header.file_size,
        # the neighbour would need a header like ours
        bytes_fully_dynamic=predicted.bytes_fully_dynamic + header,
        bytes_values=values + plain,
        bytes_masks=masks,
        bytes_router=router,
        bytes_header=header,
        tensor_bytes_source=predicted.tensor_bytes_source,
        tensor_bytes_output=checkpoint.header.file_size - header,
        tensor_bytes_fully_dynamic=predicted.tensor_bytes_fully_dynamic,
        dynamic_ratio=sum(result.n_dynamic or 0 for result in results) / entries if entries else 0.0,
        macs_source=predicted.macs_source,
        params_active_source=predicted.params_active_source,
        params_active_output=params - idle_numbers(checkpoint.manifest, checkpoint.header),
        params_active_fully_dynamic=predicted.params_active_fully_dynamic,
    )


def idle_numbers(manifest: Manifest, header: Header) -> int:
    """Stored numbers that one token is not computed with: those of the experts that are not chosen, and of those that
    are mixed into one."""
    idle = 0
    for entry in manifest.layers:
        stored = entry.stored_experts
        dynamic = [name for name in expected_tensors(entry) if name.rsplit(".", 1)[-1].endswith("_dynamic")]
        numbers = sum(math.prod(header.tensors[name].shape) for name in dynamic)
        idle += numbers // stored * (stored - active_copies(stored, entry.facts.top_k))
    return idle


def _plain_bytes(entry: LayerPlan, checkpoint: Checkpoint, model: nn.Module) -> int:
    """Bytes of a planned layer that came out plain, since nothing in it stayed dynamic."""
    if isinstance(model.get_submodule(entry.info.name), PadLayer):
        return 0
    names = (f"{entry.info.name}.weight", f"{entry.info.name}.bias")
    return sum(checkpoint.header.tensors[name].nbytes for name in names if name in checkpoint.header.tensors)


def _check_prediction(plan: Plan, model: nn.Module, sizes: TensorSizes, values: int, masks: int) -> None:
    """Hold the file against the plan's arithmetic with the counts that the partition arrived at."""
    settled = [_settled(entry, model) for entry in plan.layers]
    cost = cost_of(settled, (), plan.route, sizes)
    counts = {entry.info.name: _dynamic_entries(entry, model) or 0 for entry in plan.converted}
    by_name = {entry.info.name: entry for entry in plan.converted}
    for pool in plan.pools:
        largest = max(item_sizes(pool.names, by_name))
        slack = 0 if largest == 1 else largest
        found = sum(counts[name] for name in pool.names)
        if abs(found - pool.target) > slack:
            raise VerificationError(f"the partition kept {found} entries dynamic, the plan says {pool.target}. {_BUG}")
    if (values, masks) != (cost.bytes_values, cost.bytes_masks):
        raise VerificationError(
            f"the file holds {values} bytes of values and {masks} of masks, the plan predicted {cost.bytes_values} "
            f"and {cost.bytes_masks}. {_BUG}"
        )


def _settled(entry: LayerPlan, model: nn.Module) -> LayerPlan:
    """The layer's plan with the counts of the partitioned model."""
    layer = model.get_submodule(entry.info.name)
    if entry.verdict is not Verdict.CONVERT or not isinstance(layer, PadLayer):
        return entry
    facts = layer.facts()
    return replace(entry, n_dynamic=facts.n_dynamic, n_bias_dynamic=facts.n_bias_dynamic)


#: of a verdict; with fewer, one example decides
FEWEST_EXAMPLES = 20


def verdict(output: Judged, static: Judged | None, mends: str = "") -> str:
    """One plain sentence: did the conversion gain over fine-tuning the static model for the same steps? After a loss,
    with what `mends` it. How much another training seed would change is not in it."""
    if static is None or output.right_N is None or static.right_N is None:
        return ""
    against = "fine-tuning the static model for the same steps"
    samples = len(output.right_N)
    if samples < FEWEST_EXAMPLES:
        return f"No verdict against {against}: fewer than {FEWEST_EXAMPLES} examples were evaluated, too few to tell."
    gain, chance = _gain(output.right_N, static.right_N)
    what = _points(gain, chance, samples)
    if gain > chance:
        return f"A gain over {against}: {what}."
    if gain < -chance:
        return f"A loss against {against}: {what}. {mends}".rstrip()
    return f"No gain over {against} that this evaluation could show: {what}."


def training_cost(output: Judged, source: Judged, mends: str) -> str:
    """A warning where the fine-tuned output does worse than the source did, beyond chance, and what mends it."""
    if output.right_N is None or source.right_N is None or len(output.right_N) < FEWEST_EXAMPLES:
        return ""
    gain, chance = _gain(output.right_N, source.right_N)
    if gain >= -chance:
        return ""
    what = _points(gain, chance, len(output.right_N))
    return f"The output does worse than its source, untrained: {what}. {mends}".rstrip()


def _gain(right_N: Tensor, other_N: Tensor) -> tuple[float, float]:
    """By how much the first has more examples right, as a share, and how much of that chance can be.

    Both answered the same examples, so what counts is where they differ: twice the standard error of the mean of the
    examples' differences is chance. One example more for either side is added, so that this is never 0 (Bonett and
    Price, 2012).
    """
    apart_N = right_N - other_N
    samples = len(apart_N) + 2
    mean = float(apart_N.sum()) / samples
    variance = (float(apart_N.square().sum()) + 2) / samples - mean**2
    return float(apart_N.mean()), 2 * math.sqrt(variance / samples)


def _points(gain: float, chance: float, samples: int) -> str:
    sign = "+" if gain >= 0 else "−"
    return f"{sign}{abs(100 * gain):.2f} points on {samples} examples, where ±{100 * chance:.2f} is chance"


def card_lines(measured: Comparison | None, routers: Sequence[RouterUse], task: str | None) -> tuple[str, ...]:
    """What was measured, as lines for the card of a directory: metrics beside both neighbours, and the routers' use."""
    lines = []
    if measured is not None:
        lines += [f"{name} on the run's evaluation data: {_compared(name, measured)}." for name in measured.output]
        lines += [measured.verdict] if measured.verdict else []
        if task is not None and task.startswith("glue/"):
            lines.append(f"The data was read as `{task}` is, which does not make it GLUE's own set.")
    if routers:
        entropies = [use.usage_entropy for use in routers]
        starved, collapsed = sum(use.starved for use in routers), sum(use.collapsed for use in routers)
        lines.append(
            f"Routers: {len(routers)}, {collapsed} of them collapsed; entropy of the experts' use {min(entropies):.2f} "
            f"to {max(entropies):.2f} of the highest; {starved} experts with less than {STARVED:.0%} of an even share."
        )
    return tuple(lines)


def _compared(name: str, measured: Comparison) -> str:
    every = {
        "before the conversion": measured.source,
        "static with the same training": measured.static,
        "this model": measured.output,
        "fully dynamic": measured.fully_dynamic,
    }
    return ", ".join(f"{who} {of[name]:.4f}" for who, of in every.items() if of is not None and name in of)
