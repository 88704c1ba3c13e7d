"""From the policy's `data:` block to the two sets a run needs: what it trains on, and what it is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from padconvert.errors import FileError, UsageError
from padconvert.finetune.data import readers
from padconvert.finetune.data.batches import HOLDOUT
from padconvert.finetune.data.examples import Examples, Subset, tensors_of
from padconvert.finetune.data.preparation import Prepared, preparation_of, seeded
from padconvert.finetune.data.readers.function import is_reference
from padconvert.finetune.data.spec import DataPolicy

#: reading all of an image folder takes minutes; this many tell other data apart
CHECKED_EXAMPLES = 256


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """`train` and `eval` share no example; `eval` is None where nothing is held out. `notes` say what was decided."""

    train: Prepared
    eval: Prepared | None
    notes: tuple[str, ...]


def open_data(spec: DataPolicy, base: Path | None = None, seed: int = 0) -> Data:
    """The data that `spec` names; relative paths are taken from `base`, or the current directory.

    Without `spec.eval`, a share `spec.holdout` of the training data, drawn by `seed`, is held out for evaluation.
    Raises `UsageError` where no training data is named, `FileError` for data that cannot be read or used, and
    `PolicyError` where the `data:` block cannot apply to it.
    """
    if not spec.train:
        raise UsageError("no training data is named. Give --data, or data.train in the policy")
    train = read(spec.train, spec, base)
    if spec.eval:
        held = read(spec.eval, spec, base, like=train)
        return Data(_prepared(train, spec), _prepared(held, spec), (f"evaluated on {', '.join(spec.eval)}",))
    if spec.holdout == 0:
        return Data(_prepared(train, spec), None, ("no evaluation data (data.holdout is 0)",))
    kept, held = _split(train, spec.holdout, seed)
    note = f"evaluated on {len(held)} of {len(train)} examples, held out of the training data (seed {seed})"
    return Data(_prepared(kept, spec), _prepared(held, spec), (note,))


def checksum(data: Data) -> str:
    """sha256 of the training data: its length, all labels that are at hand, and examples spread evenly over it."""
    examples = data.train
    digest = hashlib.sha256(f"{len(examples)} {examples.preparation}".encode())
    indices = torch.linspace(0, len(examples) - 1, min(CHECKED_EXAMPLES, len(examples)), dtype=torch.float64).long()
    batch = examples.batch(indices)
    for tensor in [*tensors_of(batch.inputs).values(), batch.labels, examples.labels]:
        if tensor is not None:
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_eval(spec: DataPolicy, refs: Sequence[str], base: Path | None = None) -> Prepared:
    """`refs` alone, read and prepared as `spec` says. Raises as `open_data`."""
    return _prepared(read(refs, spec, base), spec)


def read(refs: Sequence[str], spec: DataPolicy, base: Path | None = None, like: Examples | None = None) -> Examples:
    """All of `refs` as raw examples; with `like`, classes must be the same. Raises `FileError`."""
    found = [_located(ref, base) for ref in refs]
    examples = readers.read(found, spec)
    ours, theirs = getattr(examples, "class_names", None), getattr(like, "class_names", None)
    if ours and theirs and ours != theirs:
        raise FileError(
            f"{', '.join(refs)}: has the classes {', '.join(ours)}, the training data {', '.join(theirs)}. "
            "Both need the same class folders, empty ones too"
        )
    return examples


def _split(examples: Examples, share: float, seed: int) -> tuple[Subset, Subset]:
    count = len(examples)
    if count < 2:
        raise FileError("the training data: a single example cannot be held out. Name evaluation data, or more data")
    order = torch.randperm(count, generator=seeded(seed, HOLDOUT))
    held = min(count - 1, max(1, round(share * count)))
    return Subset(examples, order[held:].sort().values), Subset(examples, order[:held].sort().values)


def _prepared(examples: Examples, spec: DataPolicy) -> Prepared:
    return Prepared(examples, preparation_of(spec))


def _located(ref: str, base: Path | None) -> str:
    """`ref` as a path that exists, or unchanged when it names a function."""
    path = (base or Path()) / ref
    if path.exists():
        return str(path)
    if is_reference(ref):
        return ref
    raise FileError(f"{path}: does not exist. Check the path; relative ones start at {(base or Path()).resolve()}")
