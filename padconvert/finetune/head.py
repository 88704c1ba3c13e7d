"""Train a new head alone, before anything is converted, so that every variant starts from the same trained network."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from padconvert.errors import VerificationError
from padconvert.finetune.data.batches import Batches
from padconvert.finetune.data.sources import Data
from padconvert.finetune.objectives import dtype_of, forward, task_loss
from padconvert.policy import Policy
from padconvert.precision import restore_dtypes_, upcast_
from padconvert.progress import Progress


def train_head_(
    model: nn.Module,
    new: Collection[str],
    data: Data,
    policy: Policy,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> int:
    """Train the parameters `new` of `model` in place on the task loss, all others frozen; returns the steps taken.

    Raises VerificationError where the loss is not finite, FileError where the labels do not fit.
    """
    steps = max(1, round(policy.train.head * policy.train.steps))
    work = upcast_(copy.deepcopy(model)).train()
    trained = [parameter for name, parameter in work.named_parameters() if name in new]
    frozen = {name: parameter.requires_grad for name, parameter in work.named_parameters()}
    for name, parameter in work.named_parameters():
        parameter.requires_grad_(name in new)
    optimizer = torch.optim.AdamW(trained, lr=policy.train.head_lr, foreach=False)
    batches = Batches(data.train, policy.train.batch_size, seed)
    for step in range(steps):
        torch.manual_seed(seed + step)
        batch = batches.at(step).to(device, dtype_of(work))
        assert batch.labels is not None, "a head is made for labels"
        loss = task_loss(forward(work, batch.inputs), batch.labels)
        if not bool(torch.isfinite(loss)):
            raise VerificationError(f"The loss of the new head is not finite at step {step + 1}. Lower train.head_lr.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.step(step + 1, steps, loss=float(loss.detach()))
    for name, parameter in work.named_parameters():
        parameter.requires_grad_(frozen[name])
    model.load_state_dict(restore_dtypes_(work, model).state_dict())
    return steps
