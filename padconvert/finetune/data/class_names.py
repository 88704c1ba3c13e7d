"""From labels as a table holds them, numbers or words, to the numbers that a task needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from padconvert.errors import FileError
from padconvert.finetune.data.labels import labels_for
from padconvert.finetune.data.tasks import Task
from padconvert.finetune.data.text import TextFile, TextTable

_NAMELESS = re.compile(r"LABEL_\d+")  # what transformers calls classes that nobody named


def numbered(
    table: TextTable, task: Task | None, label2id: Mapping[str, int] | None, known: Sequence[str] | None
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """All labels as `labels_for` gives them, and the classes' names by number where the labels are words.

    Words are numbered by `label2id` (a model's own), else by the task, else as in `known` (the training data's), else
    in sorted order; upper and lower case are one where no two classes differ by them alone. Labels that are all whole
    numbers, written as words, are class numbers. Raises `FileError` naming the row.
    """
    first = table.files[0]
    if first.labels is None:
        return None, None
    if not any(isinstance(file.labels, list) for file in table.files):
        parts = [labels_for(task, f.labels, str(f.path)) for f in table.files if isinstance(f.labels, Tensor)]
        return torch.cat(parts), first.class_names
    words = [_words(file) for file in table.files]
    if task is not None and task.regression:
        return torch.cat([_values(file, each) for file, each in zip(table.files, words, strict=True)]), None
    if all(re.fullmatch(r"-?\d{1,18}", word) for each in words for word in each):
        return torch.tensor([int(word) for each in words for word in each]), None
    numbers = _numbering(words, task, label2id, known)
    lookup = {**{name.casefold(): number for name, number in numbers.items()}, **numbers}
    found = []
    for file, each in zip(table.files, words, strict=True):
        found += [_number(file, row, word, lookup, numbers) for row, word in enumerate(each)]
    return torch.tensor(found), tuple(sorted(numbers, key=lambda name: numbers[name]))


def _words(file: TextFile) -> list[str]:
    assert file.labels is not None, "files without labels are not read with others"
    return file.labels if isinstance(file.labels, list) else [str(number) for number in file.labels.tolist()]


def _numbering(
    words: Sequence[Sequence[str]], task: Task | None, label2id: Mapping[str, int] | None, known: Sequence[str] | None
) -> dict[str, int]:
    if label2id and not all(_NAMELESS.fullmatch(name) for name in label2id):
        return dict(label2id)
    names = (task.classes if task is not None else ()) or known or sorted({word for each in words for word in each})
    return {name: number for number, name in enumerate(names)}


def _number(file: TextFile, row: int, word: str, lookup: Mapping[str, int], numbers: Mapping[str, int]) -> int:
    number = lookup.get(word, lookup.get(word.casefold()))
    if number is None:
        raise FileError(
            f"{file.path}: column '{file.label_column}', row {row}: '{word[:60]}' is none of the classes "
            f"{', '.join(numbers)}. Correct it, or write class numbers"
        )
    return number


def _values(file: TextFile, words: Sequence[str]) -> Tensor:
    found = []
    for row, word in enumerate(words):
        try:
            found.append(float(word))
        except ValueError as error:
            raise FileError(
                f"{file.path}: column '{file.label_column}', row {row}: '{word[:60]}' is no number, and the task "
                "is one of numbers. Correct it, or set data.task: classification"
            ) from error
    return torch.tensor(found)
