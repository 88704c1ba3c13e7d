"""Train the output and, to compare, its two neighbours: the static source and the fully dynamic network."""

from __future__ import annotations

import copy
import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

import padconvert
from padconvert.account import training_cost, verdict
from padconvert.errors import UsageError
from padconvert.finetune.data.sources import Data, checksum
from padconvert.finetune.evaluate import Judged
from padconvert.finetune.resume import WorkDir
from padconvert.finetune.train import Trainer
from padconvert.finetune.usage import router_use
from padconvert.fold import fold_
from padconvert.layers.kmeans import usual_top_probability
from padconvert.load.opened import Opened
from padconvert.options import ConvertOptions
from padconvert.partition import Partitioner
from padconvert.plan import Plan, plan_to_json
from padconvert.policy import settings_of
from padconvert.precision import restore_dtypes_, upcast_
from padconvert.progress import Progress
from padconvert.results import Comparison, RouterUse
from padconvert.rewrite import pad_layers


@dataclass(frozen=True, slots=True)
class Trained:
    comparison: Comparison | None = None
    history: Sequence[dict[str, float]] = ()
    routers: tuple[RouterUse, ...] = ()
    warnings: tuple[str, ...] = ()


def train_(
    opened: Opened,
    model: nn.Module,
    plan: Plan,
    data: Data,
    options: ConvertOptions,
    device: torch.device,
    progress: Progress,
) -> Trained:
    """Train `model` and partition it in place."""
    source = upcast_(copy.deepcopy(opened.module))
    work_dir = _work_dir(opened, plan, data, options)
    trainer = Trainer.of(plan.policy, data, source, options.seed, device, progress, work_dir)
    before = trainer.judged(source)
    static, full = _controls(trainer, source, model, opened, options)
    progress.stage("train")
    if not opened.goes_on:
        trainer.set_routers_(model, pad_layers(model))
    partitioner = Partitioner(model, plan) if plan.converted and not opened.goes_on else None
    history = trainer.fit_(model, partitioner, "output")
    stored = _as_stored(model, opened.module)
    after = trainer.judged(stored)
    routers = router_use(stored, data.eval or data.train, plan.policy.train.batch_size, device)
    if not before.metrics:
        return Trained(None, history, routers)
    fine_tuned, whole = (each.metrics if each is not None else None for each in (static, full))
    mends = what_mends(plan)
    said = verdict(after, static, mends)
    cost = training_cost(after, before, "" if mends in said else mends)
    compared = Comparison(before.metrics, after.metrics, fine_tuned, whole, said)
    return Trained(compared, history, routers, (cost,) if cost else ())


def what_mends(plan: Plan) -> str:
    """What to try where the output does worse than the static control: what did it in the study (docs/results.md)."""
    train, choices = plan.policy.train, [layer.choice for layer in plan.converted if layer.choice is not None]
    asked = train.top_probability
    tries = [f"a lower learning rate (--lr, now {train.lr:g})"]
    if train.expert_lr_scale > 1:
        tries.insert(0, "experts that learn as fast as the rest (--set train.expert_lr_scale=1)")
    if asked is not None and any(asked > usual_top_probability(each.num_experts, each.top_k) for each in choices):
        tries.insert(0, "routers that start less sure (--set train.top_probability=null)")
    return f"Try {', '.join(tries[:-1])}{' or ' if tries[:-1] else ''}{tries[-1]}."


def _as_stored(model: nn.Module, source: nn.Module) -> nn.Module:
    """A copy that computes with the values as the file will hold them: folded, rounded to the source's dtypes."""
    return upcast_(restore_dtypes_(fold_(copy.deepcopy(model)), source))


def _controls(
    trainer: Trainer, source: nn.Module, model: nn.Module, opened: Opened, options: ConvertOptions
) -> tuple[Judged | None, Judged | None]:
    """With `--compare`: the static source and the fully dynamic network after the same steps on the same batches."""
    if not (options.compare or trainer.policy.train.compare):
        return None, None
    if opened.goes_on:
        raise UsageError("--compare needs the static source to train beside; convert that instead of an artefact.")
    trainer.progress.stage("train the static control")
    static = copy.deepcopy(source)
    trainer.fit_(static, None, "static")
    trainer.progress.stage("train the fully dynamic control")
    full = copy.deepcopy(model)
    trainer.set_routers_(full, pad_layers(full))
    trainer.fit_(full, None, "fully_dynamic")
    return trainer.judged(static), trainer.judged(full)


def _work_dir(opened: Opened, plan: Plan, data: Data, options: ConvertOptions) -> WorkDir | None:
    if options.work_dir is None:
        return None
    fingerprint = {
        **settings_of(plan.policy),
        "source sha256": opened.sha256,
        "--state-key": options.state_key,
        "data": checksum(data),
        "seed": options.seed,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "padconvert": padconvert.__version__,
        "python": platform.python_version(),
    }
    decisions = plan_to_json(replace(plan, origins={}, notes=()))  # not where they were said
    return WorkDir(options.work_dir, fingerprint, hashlib.sha256(decisions.encode()).hexdigest())
