"""What a run will hold in memory at its peak, from shapes alone, and the fewest bytes its file can have.

The peak is the largest of these moments; each holds what lies left of the bar, and for a while what lies right of it:

    data-free    2 S                              | 4 L + pieces    (of which the 2 S are pages of the two files, which
                                                                     the system takes back when it needs them)
    trained      S + S'·(1 or 2) + F + I + G·(1+o) | a step:    F + 2 F₁ + batch · (W + 2 W₁)
                                                  | a round:   F + F₁·(scoring) + R, or 11 R in one ranking, or its
                                                  |            micro-batch's gradients
                                                  | evaluated: F₁ + 2 batch · W₁
    controls     S + S'·(2 or 3) + 2 (F + I) + G·(1+o) | a step   (`--compare`: the static and the fully dynamic one)

    S   the source's tensors as stored           S'  in the precision of training (half precision is trained in fp32),
                                                     once more for the teacher of a distillation
    F   the fully dynamic network: all K copies  F₁  the experts of the largest layer
    I   8 bytes an entry: where each belongs     R   8 bytes an entry: the scores (both with `element` only)
    G   gradients of what is trained             o   tensors of the optimizer: 1 for SGD with momentum, 2 for AdamW
    L   the largest layer's weight
    W   weights whose layers build one for every sample of a batch (convolutions, `sequence` routing); W₁ the largest

`_SCORING` is how many copies of a layer's experts a score computes with, most in fp64; `_HEAP` what the allocator keeps
of freed pieces. `tests/test_memory.py` holds the sum against the resident memory of real runs. Not counted: the data,
activations other than those weights, and Python with torch itself, a few hundred megabytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from padconvert.plan.cost import ITEMSIZE
from padconvert.plan.count import item_sizes
from padconvert.plan.model import LayerPlan, Plan
from padconvert.words import Granularity, Routing

TRAINING_BYTES = 4  # fp32, at least
EVALUATION_BATCH = 256  # the least that metrics are taken on
_INDEX_BYTES = _SCORE_BYTES = 8
_RANKING = 11  # a sort of all entries' scores, in units of the scores
_SCORING = {"taylor": 12, "snip": 12, "fisher": 12, "variance": 6, "magnitude": 5, "random": 5}
_HEAP = 4 / 3
_PIECES = 48 * 10**6  # what is on its way through a data-free run, whatever its source


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The letters of the sum above, in bytes; `ranked` is R of the largest pool."""

    stored: int
    source: int
    full: int
    experts_1: int
    index: int
    scores: int
    ranked: int
    per_sample: int
    per_sample_1: int


def peak_memory(plan: Plan, *, controls: bool = False, train_samples: int = 0, eval_samples: int = 0) -> int:
    """Bytes at the peak of a run, as estimated above. `controls`: with the static and the fully dynamic control
    beside it. The samples bound the batches; 0 where there are none."""
    sizes = _sizes(plan)
    held = sizes.stored + sizes.full + sizes.index
    if plan.route == "data-free":
        largest = max((_weight_bytes(entry) for entry in plan.converted), default=0)
        return 2 * sizes.stored + 4 * largest + _PIECES
    train, partition = plan.policy.train, plan.policy.partition
    teacher = train.objective != "task" and (train.objective != "auto" or train.distill_weight > 0)
    held += sizes.source * (2 if teacher else 1)
    states = 2 if train.optimizer == "adamw" else 1 if train.momentum > 0 else 0
    untrained = plan.cost.bytes_untouched if train.what == "converted" else 0
    held += max(sizes.full - untrained, 0) * (1 + states)
    moments = [
        _step(sizes, min(train.batch_size, train_samples)),
        _step(sizes, 1 if partition.score == "fisher" else min(partition.micro_batch, train_samples)),
        sizes.full + _SCORING[partition.score] * sizes.experts_1 + sizes.scores,
        sizes.scores + _RANKING * sizes.ranked,
        sizes.experts_1 + 2 * min(max(train.batch_size, EVALUATION_BATCH), eval_samples) * sizes.per_sample_1,
    ]
    if controls:
        moments.append(sizes.source + sizes.full + sizes.index + moments[0])
    return math.ceil(_HEAP * (held + max(moments)))


def _step(sizes: _Sizes, batch: int) -> int:
    """A forward and backward pass beside the weights and their gradients: what it keeps of every layer, and works with
    in one."""
    return sizes.full + 2 * sizes.experts_1 + batch * (sizes.per_sample + 2 * sizes.per_sample_1)


def _sizes(plan: Plan) -> _Sizes:
    cost, by_name = plan.cost, {entry.info.name: entry for entry in plan.converted}
    element = {name: _entries(entry) for name, entry in by_name.items() if _granularity(entry) is Granularity.ELEMENT}
    sampled = [_weight_bytes(e) for e in by_name.values() if e.choice and e.choice.routing is not Routing.TOKEN]
    pools = [sum(element.get(name, 0) for name in pool.names) for pool in plan.pools]
    return _Sizes(
        stored=cost.bytes_source,
        source=max(cost.bytes_source, TRAINING_BYTES * cost.params_source),
        full=max(cost.bytes_fully_dynamic, TRAINING_BYTES * cost.params_fully_dynamic),
        experts_1=max((_weight_bytes(e) * e.choice.num_experts for e in by_name.values() if e.choice), default=0),
        index=_INDEX_BYTES * sum(element.values()),
        scores=_SCORE_BYTES * sum(element.values()),
        ranked=_SCORE_BYTES * max([*pools, *element.values()], default=0),
        per_sample=sum(sampled),
        per_sample_1=max(sampled, default=0),
    )


def _entries(entry: LayerPlan) -> int:
    return math.prod(entry.info.weight_shape)


def _weight_bytes(entry: LayerPlan) -> int:
    return _entries(entry) * max(ITEMSIZE[entry.info.dtype], TRAINING_BYTES)


def _granularity(entry: LayerPlan) -> Granularity | None:
    return None if entry.choice is None else entry.choice.granularity


def least_file_bytes(plan: Plan) -> int:
    """The fewest bytes that the plan's file can have, header aside: its exact size, but where a pool ranks whole
    filters or hidden units. Which of those win is open, so each pool may fall short by its largest one, and neither
    indices nor biases are counted."""
    by_name = {entry.info.name: entry for entry in plan.converted}
    cost = plan.cost
    filters = [p for p in plan.pools if _granularity(by_name[p.names[0]]) is not Granularity.ELEMENT]
    if not filters:
        return cost.bytes_output
    least = cost.bytes_source + cost.bytes_router
    for pool in plan.pools:
        largest = max(item_sizes(pool.names, by_name)) if pool in filters else 0
        first = by_name[pool.names[0]]
        assert first.choice is not None
        least += max(pool.target - largest, 0) * (first.choice.num_experts - 1) * ITEMSIZE[first.info.dtype]
    return least
