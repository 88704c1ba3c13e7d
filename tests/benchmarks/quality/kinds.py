"""How far the inputs of each task's layers fall into kinds, before any fine-tune: what `inspect --data` would show.

    PYTHONPATH=tests python -m benchmarks.quality.kinds [--task NAME]...

Trains the sources that are missing, and writes `results/kinds.json`, which the report reads.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from statistics import fmean

import torch

import padconvert
from benchmarks.quality.arms import BASE, PAD
from benchmarks.quality.study import RESULTS, source_of, trainer_of
from benchmarks.quality.tasks import TASKS, Task
from padconvert.finetune.loop import routing_forwards
from padconvert.finetune.routing import separations
from padconvert.rewrite import pad_layers

FILE = RESULTS / "kinds.json"
CPU = torch.device("cpu")


def of_task(task: Task) -> list[float]:
    """Layer by layer, of the first seed's source."""
    source = source_of(task, 0, CPU)
    settings = {**PAD.overrides(BASE, task.ratio), "train.batch_size": task.batch}
    trainer = trainer_of(task, settings, source, 0, CPU)
    model = copy.deepcopy(source)
    sample = trainer.data.train.batch(torch.arange(2)).inputs
    padconvert.rewrite_(model, padconvert.plan(model, trainer.policy, inputs=sample))
    found = separations(model, pad_layers(model), routing_forwards(model, trainer.setting.batches, CPU), 0)
    return [round(value, 3) for value in found.values()]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--task", action="append", default=[], choices=list(TASKS), metavar="NAME", help="; ".join(TASKS)
    )
    known: dict[str, list[float]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for name in parser.parse_args(words).task or list(known):
        known[name] = of_task(TASKS[name])
        print(f"{name}: {fmean(known[name]):.2f} in the mean of {known[name]}", flush=True)
        FILE.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
