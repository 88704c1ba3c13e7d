"""Of how many kinds a network's inputs are: before a conversion, a look at whether experts have something to divide.

Where one network serves several domains, what its layers see falls into groups that k-means finds, and experts can
each take one from the first step. Where inputs are of one kind there is one cloud, cut anyhow, and experts come apart
slowly (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import torch

from padconvert.finetune.data.batches import Batches
from padconvert.finetune.data.sources import Data
from padconvert.finetune.loop import routing_forwards
from padconvert.finetune.routing import separations
from padconvert.load.opened import Opened
from padconvert.plan import Plan
from padconvert.rewrite import pad_layers

#: a mean separation from which inputs are called several kinds: networks of several domains have 0.30 and 0.35, of one
#: 0.05 and 0.16. It does not tell how much is gained: that takes a long fine-tune of any of them (docs/results.md)
SEVERAL = 0.2


def kinds_of_inputs(opened: Opened, plan: Plan, data: Data, seed: int) -> dict[str, float]:
    """The `separation` (`layers/kmeans.py`) of what each converted layer sees of the training data, by its name."""
    model = opened.dynamic_copy(plan)
    batches = Batches(data.train, plan.policy.train.batch_size, seed)
    forwards = routing_forwards(model, batches, torch.device("cpu"))
    return separations(model, pad_layers(model), forwards, seed)


def said_of_kinds(kinds: Mapping[str, float]) -> str:
    """One line for a person."""
    if not kinds:
        return "too few examples to tell of how many kinds the inputs are"
    mean = fmean(kinds.values())
    verdict = "of several kinds, which experts can divide" if mean >= SEVERAL else "of one kind, a gain takes long"
    whose = "one layer" if len(kinds) == 1 else f"{len(kinds)} layers"
    return f"the inputs of {whose} fall apart by {max(mean, 0):.2f} on average (0 one cloud, 1 points): {verdict}"
