"""A transformers directory's own tokenizer, from its files alone: no network, no code from the directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from padconvert.errors import FileError, UnsafeError
from padconvert.finetune.data.extras import needed

#: each of these alone, or with others beside it, makes a tokenizer
FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    "tokenizer_config.json",
)
TOKENISE_YOURSELF = (
    "give token numbers in an .npz with arrays such as input_ids, attention_mask and y, and set "
    "data.input_key: input_ids,attention_mask"
)


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers offer it."""

    @property
    def padding_side(self) -> str: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def pad_token_type_id(self) -> int: ...

    model_max_length: int

    def num_special_tokens_to_add(self, pair: bool = ...) -> int: ...
    def __call__(
        self, text: Sequence[str], text_pair: Sequence[str] | None = ..., *, truncation: bool, max_length: int
    ) -> Mapping[str, Sequence[Sequence[int]]]: ...


def tokenizer_of(directory: Path) -> Tokenizer:
    """The tokenizer in a transformers directory.

    Raises `FileError` where its files are absent or cannot be read, `UnsafeError` where it needs code of its own.
    """
    if not any((directory / name).is_file() for name in FILES):
        raise FileError(
            f"{directory}: has no tokenizer (none of {', '.join(FILES)}). Copy the files of the model's tokenizer "
            f"there, or {TOKENISE_YOURSELF}"
        )
    transformers = needed("transformers", str(directory), extra="hf")
    with _quiet(transformers):
        try:
            found = transformers.AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # OSError, ValueError, KeyError and the Rust library's own
            raise _refused(directory, error) from error
    _check_limit(directory, found.model_max_length)
    return cast(Tokenizer, found)


def _check_limit(directory: Path, limit: object) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise FileError(
            f"{directory}: its tokenizer_config.json gives {json.dumps(limit, default=str)} as model_max_length, "
            "which is no number of tokens. Correct it, or take it out"
        )


def in_words(error: Exception) -> str:
    """What a tokenizer's error says, without the words of Python's own errors, which are about code."""
    if isinstance(error, TypeError | AttributeError | LookupError | NameError | AssertionError):
        return "a value in its files is missing, or of another kind than a tokenizer has there"
    return (str(error).strip().splitlines() or ["its files do not make up a tokenizer"])[0]


def _refused(directory: Path, error: Exception) -> FileError | UnsafeError:
    if "trust_remote_code" in str(error):
        return UnsafeError(
            f"{directory}: its tokenizer is code in the directory, which is never run. Instead, {TOKENISE_YOURSELF}"
        )
    return FileError(
        f"{directory}: its tokenizer cannot be read ({in_words(error)}). Copy all of its files again, "
        f"or {TOKENISE_YOURSELF}"
    )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No log lines of transformers within: what matters becomes an error."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
