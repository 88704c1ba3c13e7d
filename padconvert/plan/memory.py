"""What a run will hold in memory at its peak, from shapes alone, and the fewest bytes its file can have.

With S the source as it is stored and, both in the precision of training (half precision is trained in fp32):
S' the source, F' the fully dynamic network with all K copies of every converted layer,

    trained route        S + S' + 2 F' + (1 + o) · F'_trained + P   source, teacher, network and a pass's working
                                                                    copy; gradients; o tensors of the optimizer
                                                                    (1: SGD with momentum, 2: AdamW)
    with the controls    + F' + S' + S'_trained                     (`--compare`) a copy for the fully dynamic one; the
                                                                    static one with the gradients of its training
    data-free route      S + S' + 2 F' + P                          nothing is trained; the file is loaded back
    P = 64 bytes for every weight of a converted layer              ranking: scores, their order, indices, masks

`trained` leaves out what is not (`train.what: converted`). Activations, data and the program itself (a few hundred
megabytes for torch) come on top. Held against the resident memory of linear layers with 1000² to 2600² weights, the
estimate was 4 % above what a data-free run grew by, and 9 % below a trained one: enough to refuse the hopeless.
"""

from __future__ import annotations

import math

from padconvert.plan.cost import ITEMSIZE
from padconvert.plan.count import unit_size
from padconvert.plan.model import Plan
from padconvert.words import Granularity

TRAINING_BYTES = 4  # fp32, at least
RANKING_BYTES = 64  # measured


def peak_memory(plan: Plan, *, controls: bool = False) -> int:
    """Bytes of weights, gradients and optimizer state at the peak of a run, as estimated above. `controls`: with the
    static and the fully dynamic control beside it."""
    cost, train = plan.cost, plan.policy.train
    source = max(cost.bytes_source, TRAINING_BYTES * cost.params_source)
    full = max(cost.bytes_fully_dynamic, TRAINING_BYTES * cost.params_fully_dynamic)
    ranking = RANKING_BYTES * sum(math.prod(entry.info.weight_shape) for entry in plan.converted)
    peak = cost.bytes_source + source + 2 * full + ranking
    if plan.route == "data-free":
        return peak
    untrained = cost.bytes_untouched if train.what == "converted" else 0
    states = 2 if train.optimizer == "adamw" else 1 if train.momentum > 0 else 0
    peak += max(full - untrained, 0) * (1 + states)
    return peak + full + source + max(source - untrained, 0) if controls else peak


def least_file_bytes(plan: Plan) -> int:
    """The fewest bytes that the plan's file can have, header aside: its exact size, but where a pool ranks whole
    filters. Which of those win is open, so each pool may fall short by its largest filter, and neither indices nor
    biases are counted."""
    by_name = {entry.info.name: entry for entry in plan.converted}
    cost = plan.cost
    filters = [p for p in plan.pools if _granularity(plan, p.names[0]) is Granularity.CHANNEL]
    if not filters:
        return cost.bytes_output
    least = cost.bytes_source + cost.bytes_router
    for pool in plan.pools:
        largest = max(unit_size(by_name[name]) for name in pool.names) if pool in filters else 0
        first = by_name[pool.names[0]]
        assert first.choice is not None
        least += max(pool.target - largest, 0) * (first.choice.num_experts - 1) * ITEMSIZE[first.info.dtype]
    return least


def _granularity(plan: Plan, name: str) -> Granularity | None:
    choice = next(entry.choice for entry in plan.converted if entry.info.name == name)
    return None if choice is None else choice.granularity
