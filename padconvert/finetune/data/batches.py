"""Which examples a step sees: a pure function of the seed and the step's number."""

from __future__ import annotations

import torch
from torch import Tensor

from padconvert.finetune.data.examples import Batch, Examples
from padconvert.finetune.data.preparation import Prepared, seeded

# what a stream of random numbers is for; keeps streams of the same seed and number apart
HOLDOUT, EPOCH, AUGMENT = 0, 1, 2


class Batches:
    """Endless batches of `size` examples: each epoch a new seeded order, its last incomplete batch left out.

    `size` is `batch_size`, or all examples where there are fewer (then `note` says so). `at(t)` never depends on
    earlier calls, so a resume needs only the step's number.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int) -> None:
        self.examples, self.seed = examples, seed
        self.size = min(batch_size, len(examples))
        self.per_epoch = len(examples) // self.size
        self.note = None if self.size == batch_size else f"batches of {self.size}: there are no more examples"
        self._order: tuple[int, Tensor] | None = None  # of the epoch asked for last; only saves time

    def indices(self, step: int) -> Tensor:
        """The numbers of the examples of step `step` (from 0): int64 [size]."""
        epoch, place = divmod(step, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = seeded(self.seed, EPOCH, epoch)
            self._order = epoch, torch.randperm(len(self.examples), generator=generator)
        return self._order[1][place * self.size : (place + 1) * self.size]

    def at(self, step: int) -> Batch:
        """The batch of step `step`, not augmented."""
        return self.examples.batch(self.indices(step))

    def pair(self, step: int) -> tuple[Batch, Batch]:
        """The batch of step `step`, clean and augmented (one object where the data is not augmented)."""
        indices = self.indices(step)
        if isinstance(self.examples, Prepared):
            return self.examples.pair(indices, seeded(self.seed, AUGMENT, step))
        batch = self.examples.batch(indices)
        return batch, batch
