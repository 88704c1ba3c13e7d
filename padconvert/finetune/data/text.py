"""Texts as token numbers. Shapes: N examples, B of them in a batch, T positions of the batch's longest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from padconvert.errors import FileError, PolicyError
from padconvert.finetune.data.examples import Batch
from padconvert.finetune.data.tokenizer import TOKENISE_YOURSELF, Tokenizer, in_words

_AT_ONCE = 1024  # texts in one call: their numbers are Python's own until they are packed


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file's texts: one column, or two for pairs. `labels`: numbers, class names as written, or None."""

    path: Path
    columns: dict[str, list[str]]
    labels: Tensor | list[str] | None
    label_column: str | None
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(frozen=True, slots=True)
class TextTable:
    """What a reader gives for text, before a tokenizer: files whose columns agree, in order."""

    files: tuple[TextFile, ...]


@dataclass(frozen=True, slots=True)
class Padding:
    """What stands where a text is shorter than the batch's longest."""

    left: bool
    token: int | None
    token_type: int

    def value(self, name: str) -> int:
        match name:
            case "input_ids":
                assert self.token is not None, "texts of several lengths are refused without a pad token"
                return self.token
            case "token_type_ids":
                return self.token_type
            case _:
                return 0


class TextExamples:
    """Tokenised texts, packed end to end as int32; a batch is int64 [B, T], padded to its own longest text.

    `tokens`: what the tokenizer gives for each position (input_ids, attention_mask, …), by name, [all positions].
    `starts`: int64 [N + 1]; text i has the positions from starts[i] to starts[i + 1].
    """

    def __init__(
        self,
        tokens: dict[str, Tensor],
        starts: Tensor,
        labels: Tensor | None,
        class_names: tuple[str, ...] | None,
        padding: Padding,
        note: str | None = None,
    ) -> None:
        self.tokens, self.starts, self.labels, self.padding = tokens, starts, labels, padding
        self.class_names, self.note = class_names, note

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, indices: Tensor) -> Batch:
        start_B, length_B = self.starts[indices], self.starts[indices + 1] - self.starts[indices]
        longest = int(length_B.max())
        place_BT = torch.arange(longest).expand(len(indices), longest)
        if self.padding.left:
            place_BT = place_BT - (longest - length_B)[:, None]
        holds_BT = (place_BT >= 0) & (place_BT < length_B[:, None])
        source_BT = torch.where(holds_BT, start_B[:, None] + place_BT, 0)
        alike = bool(holds_BT.all())  # a tokenizer without a pad token can still serve these
        inputs = {
            name: values[source_BT].long() if alike else self._padded(name, values[source_BT], holds_BT)
            for name, values in self.tokens.items()
        }
        return Batch(inputs, None if self.labels is None else self.labels[indices])

    def _padded(self, name: str, values_BT: Tensor, holds_BT: Tensor) -> Tensor:
        return torch.where(holds_BT, values_BT.long(), self.padding.value(name))

    def fingerprint(self) -> str:
        """sha256 of every token and of where each text starts: what a training sees of the texts."""
        digest = hashlib.sha256(repr(self.padding).encode())
        for name, values in [*sorted(self.tokens.items()), ("starts", self.starts)]:
            digest.update(f"{name} {len(values)} ".encode())
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()


def tokenised(
    table: TextTable,
    tokenizer: Tokenizer | None,
    max_length: int,
    labels: Tensor | None,
    class_names: tuple[str, ...] | None,
) -> TextExamples:
    """The table's texts as tokens, each cut to `max_length`, or to what the tokenizer's model takes if that is less.

    Raises `FileError` without a tokenizer, and `PolicyError` for a `max_length` that leaves room for no token.
    """
    first = table.files[0]
    if tokenizer is None:
        raise FileError(
            f"{first.path}: column '{next(iter(first.columns))}' holds text, and the source brings no tokenizer. "
            f"Give a transformers directory that has one, or {TOKENISE_YOURSELF}; "
            "or choose numeric columns with data.input_key"
        )
    most = int(min(max_length, tokenizer.model_max_length))
    special = tokenizer.num_special_tokens_to_add(pair=len(first.columns) == 2)
    if most <= special:
        _check_own_limit(tokenizer.model_max_length, special)
        raise PolicyError(f"data.max_length: {most} leaves no room beside the {special} special tokens. Raise it")
    packed: dict[str, list[Tensor]] = {}
    lengths: list[int] = []
    for file in table.files:
        for start, given in _tokens(file, tokenizer, most):
            found = [len(numbers) for numbers in given["input_ids"]]
            if 0 in found:
                raise FileError(
                    f"{file.path}: row {start + found.index(0)}: the tokenizer knows no token of it. Remove it"
                )
            lengths += found
            for name, numbers in given.items():
                packed.setdefault(name, []).append(_packed(numbers))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    tokens = {name: torch.cat(parts) for name, parts in packed.items()}
    return TextExamples(tokens, starts, labels, class_names, _padding(tokenizer, lengths, first), _cut(lengths, most))


def _check_own_limit(limit: float, special: int) -> None:
    if limit <= special:
        raise FileError(
            f"the source's tokenizer_config.json: model_max_length {limit} leaves no room beside the {special} special "
            "tokens. Correct it, or take it out"
        )


def _tokens(
    file: TextFile, tokenizer: Tokenizer, most: int
) -> Iterator[tuple[int, dict[str, Sequence[Sequence[int]]]]]:
    """(number of the first row, what the tokenizer gives for some rows), over all rows."""
    columns = list(file.columns.values())
    for start in range(0, len(file), _AT_ONCE):
        texts = [column[start : start + _AT_ONCE] for column in columns]
        pair = texts[1] if len(texts) == 2 else None
        try:
            given = dict(tokenizer(texts[0], pair, truncation=True, max_length=most).items())
        except Exception as error:  # the tokenizer's own, of transformers or of the Rust library
            raise FileError(
                f"{file.path}: the source's tokenizer fails on rows {start} to {start + len(texts[0]) - 1}: "
                f"{in_words(error)}. Copy all of its files again, or {TOKENISE_YOURSELF}"
            ) from error
        yield start, given


def _packed(numbers: Sequence[Sequence[int]]) -> Tensor:
    return torch.from_numpy(np.fromiter(chain.from_iterable(numbers), dtype=np.int32))


def _padding(tokenizer: Tokenizer, lengths: Sequence[int], first: TextFile) -> Padding:
    """As the tokenizer pads; the end of a text pads where it has no token for that, as its models expect."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if token is None and len(set(lengths)) > 1:
        raise FileError(
            f"{first.path}: the texts differ in length, and the source's tokenizer has no token to pad them with. "
            "Name one as pad_token in its tokenizer_config.json"
        )
    return Padding(tokenizer.padding_side == "left", token, tokenizer.pad_token_type_id)


def _cut(lengths: Sequence[int], most: int) -> str | None:
    full = sum(length == most for length in lengths)
    return f"{full} of {len(lengths)} texts fill all {most} tokens, and are cut there if longer" if full else None
