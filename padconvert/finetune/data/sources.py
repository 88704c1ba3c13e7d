"""From the policy's `data:` block to the two sets a run needs: what it trains on, and what it is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from padconvert.errors import FileError, UsageError
from padconvert.finetune.data import readers
from padconvert.finetune.data.batches import HOLDOUT
from padconvert.finetune.data.class_names import numbered
from padconvert.finetune.data.examples import Examples, Subset, TensorExamples, known_class_names, tensors_of
from padconvert.finetune.data.labels import labels_for
from padconvert.finetune.data.preparation import Prepared, preparation_of, seeded
from padconvert.finetune.data.readers.function import is_reference
from padconvert.finetune.data.spec import DataPolicy
from padconvert.finetune.data.tasks import TASKS, Task, task_named
from padconvert.finetune.data.text import TextExamples, TextTable, tokenised
from padconvert.finetune.data.tokenizer import Tokenizer

#: reading all of an image folder takes minutes; this many tell other data apart
CHECKED_EXAMPLES = 256


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """`train` and `eval` share no example; `eval` is None where nothing is held out. `notes` say what was decided."""

    train: Prepared
    eval: Prepared | None
    notes: tuple[str, ...]
    task: Task | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes by number, as the data or the task names them, else None."""
        own = self.train.class_names
        return own or (self.task.classes or None if self.task is not None else None)

    @property
    def num_outputs(self) -> int | None:
        """How many outputs a head for this data has: one for numbers, else one a class; None without known labels."""
        if self.task is not None and self.task.regression:
            return 1
        if self.class_names is not None:
            return len(self.class_names)
        labels = [each.labels for each in (self.train, self.eval) if each is not None and each.labels is not None]
        if not labels:
            return None
        if labels[0].is_floating_point():
            return labels[0][0].numel()
        return max(int(each.max()) for each in labels) + 1


def open_data(
    spec: DataPolicy,
    base: Path | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    label2id: Mapping[str, int] | None = None,
) -> Data:
    """The data that `spec` names; relative paths are taken from `base`, or the current directory.

    Text needs the source's `tokenizer`; labels that are words are numbered by its `label2id` if it has names of its
    own. Without `spec.eval`, a share `spec.holdout` of the training data, drawn by `seed`, is held out for evaluation.
    Raises `UsageError` where no training data is named, `FileError` for data that cannot be read or used, and
    `PolicyError` where the `data:` block cannot apply to it.
    """
    if not spec.train:
        raise UsageError("no training data is named. Give --data, or data.train in the policy")
    task = task_named(spec.task)
    train = read(spec.train, spec, base, tokenizer=tokenizer, label2id=label2id)
    if spec.eval:
        held = read(spec.eval, spec, base, like=train, tokenizer=tokenizer, label2id=label2id)
        notes = (f"evaluated on {', '.join(spec.eval)}", *_notes(train, "training"), *_notes(held, "evaluation"))
        return Data(_prepared(train, spec), _prepared(held, spec), notes, task)
    if spec.holdout == 0:
        notes = ("no evaluation data (data.holdout is 0)", *_notes(train, "training"))
        return Data(_prepared(train, spec), None, notes, task)
    kept, rest = _split(train, spec.holdout, seed)
    note = f"evaluated on {len(rest)} of {len(train)} examples, held out of the training data (seed {seed})"
    return Data(_prepared(kept, spec), _prepared(rest, spec), (note, *_notes(train, "training")), task)


def checksum(data: Data) -> str:
    """sha256 of the training data: its length, all labels that are at hand, and examples spread evenly over it; of
    texts every token."""
    examples = data.train
    digest = hashlib.sha256(f"{len(examples)} {examples.preparation}".encode())
    indices = torch.linspace(0, len(examples) - 1, min(CHECKED_EXAMPLES, len(examples)), dtype=torch.float64).long()
    batch = examples.batch(indices)
    for tensor in [*tensors_of(batch.inputs).values(), batch.labels, examples.labels]:
        if tensor is not None:
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    whole = examples.raw.whole if isinstance(examples.raw, Subset) else examples.raw
    if isinstance(whole, TextExamples):
        digest.update(whole.fingerprint().encode())
    return digest.hexdigest()


def open_eval(
    spec: DataPolicy,
    refs: Sequence[str],
    base: Path | None = None,
    tokenizer: Tokenizer | None = None,
    label2id: Mapping[str, int] | None = None,
) -> Prepared:
    """`refs` alone, read and prepared as `spec` says. Raises as `open_data`."""
    return _prepared(read(refs, spec, base, tokenizer=tokenizer, label2id=label2id), spec)


def read(
    refs: Sequence[str],
    spec: DataPolicy,
    base: Path | None = None,
    like: Examples | None = None,
    tokenizer: Tokenizer | None = None,
    label2id: Mapping[str, int] | None = None,
) -> Examples:
    """All of `refs` as raw examples, text as tokens; with `like`, classes must be the same. Raises `FileError`."""
    task = task_named(spec.task)
    found = readers.read([_located(ref, base) for ref in refs], spec)
    theirs = None if like is None else known_class_names(like)
    if isinstance(found, TextTable):
        labels, names = numbered(found, task, label2id, theirs)
        return tokenised(found, tokenizer, spec.max_length, labels, names)
    if isinstance(found, TensorExamples) and found.labels is not None:
        found = replace(found, labels=labels_for(task, found.labels, ", ".join(refs)))
    _check_classes(refs, known_class_names(found), theirs)
    return found


def _check_classes(refs: Sequence[str], ours: Sequence[str] | None, theirs: Sequence[str] | None) -> None:
    if ours and theirs and ours != theirs:
        raise FileError(
            f"{', '.join(refs)}: has the classes {', '.join(ours)}, the training data {', '.join(theirs)}. "
            "Both need the same class folders, empty ones too"
        )


def _notes(examples: Examples, which: str) -> tuple[str, ...]:
    note = examples.note if isinstance(examples, TextExamples) else None
    return () if note is None else (f"{which} data: {note}",)


def _split(examples: Examples, share: float, seed: int) -> tuple[Subset, Subset]:
    count = len(examples)
    if count < 2:
        raise FileError("the training data: a single example cannot be held out. Name evaluation data, or more data")
    order = torch.randperm(count, generator=seeded(seed, HOLDOUT))
    held = min(count - 1, max(1, round(share * count)))
    return Subset(examples, order[held:].sort().values), Subset(examples, order[:held].sort().values)


def _prepared(examples: Examples, spec: DataPolicy) -> Prepared:
    task = task_named(spec.task)
    return Prepared(examples, preparation_of(spec), task.metrics if task is not None else ())


def _located(ref: str, base: Path | None) -> str:
    """`ref` as a path that exists, or unchanged when it names a function."""
    path = (base or Path()) / ref
    if path.exists():
        return str(path)
    if is_reference(ref):
        return ref
    if ref in TASKS:
        raise FileError(
            f"{ref}: names a task, and nothing is downloaded. Name its files: --task {ref} --data train.tsv"
        )
    raise FileError(f"{path}: does not exist. Check the path; relative ones start at {(base or Path()).resolve()}")
