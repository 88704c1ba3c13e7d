"""Tables: parquet, CSV, TSV and JSON lines, with columns of numbers, images or text. Read by `datasets`."""

from __future__ import annotations

import glob
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from padconvert.errors import FileError
from padconvert.finetune.data.arrays import concatenated
from padconvert.finetune.data.examples import Examples, TensorExamples, checked
from padconvert.finetune.data.extras import needed
from padconvert.finetune.data.images import ImageExamples, Picture
from padconvert.finetune.data.spec import DEFAULT_LABEL, NO_LABELS, DataPolicy, input_names
from padconvert.finetune.data.tasks import task_named
from padconvert.finetune.data.text import TextFile, TextTable

TAKES = ".parquet, .csv, .tsv, .jsonl (tables)"

# suffix → the constructor of `datasets.Dataset`, and how it reads; a TSV quotes nothing
_FORMATS: dict[str, tuple[str, dict[str, object]]] = {
    ".parquet": ("from_parquet", {}),
    ".csv": ("from_csv", {}),
    ".tsv": ("from_csv", {"sep": "\t", "quoting": 3}),
    ".jsonl": ("from_json", {}),
}
_DEFAULT_INPUT = "x"
_NO_ROWS = "{}: holds no rows. Name a file with at least one"


def matches(ref: str) -> bool:
    return Path(ref).suffix.lower() in _FORMATS and not Path(ref).is_dir()


def read(refs: Sequence[str], spec: DataPolicy) -> Examples | TextTable:
    """The rows of all files. Inputs are the text columns that the policy or its task name, else the columns that
    `input_key` names, else all but the label column.

    Numeric columns become float32 [N, columns], a single column of number lists [N, …], an image column uint8
    [N, C, H, W]; text is left to a tokenizer. Raises `FileError`.
    """
    paths = [Path(ref) for ref in refs]
    tables = [_Table(path, spec) for path in paths]
    if any(table.text_columns for table in tables):
        return _text_table(tables)
    if not any(table.image_column for table in tables):
        return concatenated([table.numbers() for table in tables], paths)
    return _image_examples(tables, spec)


def _text_table(tables: Sequence[_Table]) -> TextTable:
    first = tables[0]
    for table in tables[1:]:
        if table.text_columns != first.text_columns or (table.label_column is None) != (first.label_column is None):
            raise FileError(f"{table.path}: does not fit {first.path}: other columns. Read them one by one")
        if table.class_names != first.class_names:
            raise FileError(f"{table.path}: does not fit {first.path}: other classes. Read them one by one")
    return TextTable(tuple(table.text_file() for table in tables))


def _image_examples(tables: Sequence[_Table], spec: DataPolicy) -> Examples:
    odd = next(
        (table for table in tables if not table.image_column or table.class_names != tables[0].class_names), None
    )
    if odd:
        raise FileError(f"{odd.path}: does not fit {tables[0].path}: other columns or classes. Read them one by one")
    labels = [table.labels for table in tables if table.labels is not None]
    if len(labels) not in (0, len(tables)):
        raise FileError(f"{tables[0].path}: some of the files have labels, some have none. Read them one by one")
    pictures = [picture for table in tables for picture in table.pictures()]
    return ImageExamples(pictures, torch.cat(labels) if labels else None, tables[0].class_names, spec.size)


class _Table:
    """One file's columns, in memory, and which of them are what."""

    def __init__(self, path: Path, spec: DataPolicy) -> None:
        self.path = path
        self.dataset = _loaded(path)
        if len(self.dataset) == 0:
            raise FileError(_NO_ROWS.format(path))
        self.label_column = self._label_column(spec)
        self.text_columns = self._text_columns(spec)
        self.inputs = self.text_columns or self._inputs(spec)
        self.image_column = self._image_column()
        self.labels = None if self.text_columns else self._labels()

    @property
    def columns(self) -> list[str]:
        return list(self.dataset.column_names)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = getattr(self.dataset.features[self.label_column], "names", None) if self.label_column else None
        return tuple(names) if names else None

    def numbers(self) -> TensorExamples:
        """The numeric columns as examples."""
        columns = [self._numbers(name) for name in self.inputs]
        if len(columns) == 1 and columns[0].ndim > 1:
            inputs = columns[0]
        elif wide := next((name for name, column in zip(self.inputs, columns, strict=True) if column.ndim > 1), None):
            raise FileError(f"{self.path}: column '{wide}' holds lists beside other inputs. Choose with data.input_key")
        else:
            inputs = torch.stack(columns, dim=1)
        classes = len(self.class_names) if self.class_names else None
        return checked(TensorExamples(inputs.float(), self.labels, classes), str(self.path))

    def pictures(self) -> list[Picture]:
        """The encoded images, named by file and row."""
        from datasets import Image

        column = self.dataset.cast_column(self.image_column, Image(decode=False))[self.image_column]
        return [self._picture(row, cell) for row, cell in enumerate(column)]

    def _picture(self, row: int, cell: Any) -> Picture:
        name = f"{self.path}: column '{self.image_column}', row {row}"
        if cell and cell.get("bytes"):
            return Picture(cell["bytes"], name)
        if cell and cell.get("path"):
            return Picture(self.path.parent / cell["path"], name)
        raise FileError(f"{name} is empty. Remove or fill it")

    def _label_column(self, spec: DataPolicy) -> str | None:
        if spec.label_column in self.columns:
            return spec.label_column
        if spec.label_column == NO_LABELS:
            return None
        task = task_named(spec.task) if spec.label_column == DEFAULT_LABEL else None
        if task and (found := next((name for name in task.labels if name in self.columns), None)):
            return found
        raise FileError(
            f"{self.path}: has no column '{spec.label_column}' (it has {', '.join(self.columns)}). "
            f"Name it with --label-column or data.label_column, or set it to {NO_LABELS} when there are no labels"
        )

    def _inputs(self, spec: DataPolicy) -> list[str]:
        named = input_names(spec)
        if all(name in self.columns for name in named):
            return named
        if named != [_DEFAULT_INPUT]:
            missing = next(name for name in named if name not in self.columns)
            raise FileError(
                f"{self.path}: has no column '{missing}' (it has {', '.join(self.columns)}). Correct data.input_key"
            )
        inputs = [name for name in self.columns if name != self.label_column]
        if not inputs:
            raise FileError(f"{self.path}: has no column beside '{self.label_column}'. Add the inputs")
        return inputs

    def _image_column(self) -> str | None:
        from datasets import Image

        images = [name for name in self.inputs if isinstance(self.dataset.features[name], Image)]
        if images and len(self.inputs) > 1:
            raise FileError(
                f"{self.path}: has images beside other inputs ({', '.join(self.inputs)}). "
                f"Choose with data.input_key: {images[0]}"
            )
        return images[0] if images else None

    def _text_columns(self, spec: DataPolicy) -> list[str]:
        """One column of texts or a pair: as named, as the task has them, or the only input; none for numbers."""
        if spec.text_columns:
            return self._named_text(spec.text_columns)
        named = input_names(spec) != [_DEFAULT_INPUT]
        task = None if named else task_named(spec.task)
        for columns in task.texts if task else ():
            if all(name in self.columns for name in columns):
                return list(columns)
        inputs = self._inputs(spec)
        text = [name for name in inputs if self._is_text(name)]
        if not text or len(text) == len(inputs) <= (2 if named else 1):
            return text
        raise FileError(
            f"{self.path}: column '{text[0]}' holds text, and is not the only input (the inputs are "
            f"{', '.join(inputs)}). Name one text column or a pair with --text-column or data.text_columns, or choose "
            "numeric columns with data.input_key"
        )

    def _named_text(self, names: Sequence[str]) -> list[str]:
        for name in names:
            if name not in self.columns:
                raise FileError(
                    f"{self.path}: has no column '{name}' (it has {', '.join(self.columns)}). "
                    "Correct --text-column or data.text_columns"
                )
            if name == self.label_column:
                raise FileError(f"{self.path}: column '{name}' cannot be text and label. Name another --label-column")
        if len(names) > 2 or len(set(names)) < len(names):
            raise FileError(
                f"{self.path}: {', '.join(names)} are named as text. "
                "Name one column with --text-column, or two for pairs"
            )
        return list(names)

    def text_file(self) -> TextFile:
        """The texts and labels, every cell of them filled."""
        named = self.label_column if self.label_column is not None and self._is_text(self.label_column) else None
        found = self._texts([*self.text_columns, *([] if named is None else [named])])
        columns = {name: found[name] for name in self.text_columns}
        labels = self._labels() if named is None else found[named]
        return TextFile(self.path, columns, labels, self.label_column, self.class_names)

    def _texts(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The columns as they stand. In a CSV '007' is a number and 'NA' an empty cell, until it is read again."""
        csv = _FORMATS[self.path.suffix.lower()][0] == "from_csv"
        dataset = _loaded(self.path, names) if csv else self.dataset
        found: dict[str, list[str]] = {}
        for name in names:
            where = f"{self.path}: column '{name}'"
            if not csv and not self._is_text(name):
                raise FileError(f"{where} holds {dataset.features[name]}, not text. Choose with --text-column")
            texts: list[str | None] = dataset.with_format("arrow")[:].column(name).to_pylist()
            empty = next((row for row, text in enumerate(texts) if text is None or not text.strip()), None)
            if empty is not None:
                raise FileError(f"{where}, row {empty} is empty. Fill or remove it")
            found[name] = [text for text in texts if text is not None]
        return found

    def _is_text(self, name: str) -> bool:
        return self._dtype(name) in ("string", "large_string")

    def _dtype(self, name: str) -> str | None:
        dtype = getattr(self.dataset.features[name], "dtype", None)
        return dtype if isinstance(dtype, str) else None

    def _labels(self) -> Tensor | None:
        if self.label_column is None:
            return None
        if self._is_text(self.label_column):
            raise FileError(
                f"{self.path}: label column '{self.label_column}' holds text. "
                "Write the class numbers that the model was trained with"
            )
        return self._numbers(self.label_column)

    def _numbers(self, name: str) -> Tensor:
        """A column as int64 or float64 [N, …]."""
        where = f"{self.path}: column '{name}'"
        column = self.dataset.with_format("arrow")[:].column(name)
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise FileError(f"{where}, row {row} is empty. Fill or remove it")
        try:
            array = np.asarray(column.to_pylist() if self._dtype(name) is None else column.to_numpy())
        except ValueError as error:
            raise FileError(f"{where} holds lists of different lengths. Make them equal") from error
        if array.dtype.kind not in "biuf":
            raise FileError(f"{where} holds {self.dataset.features[name]}, not numbers. Choose with data.input_key")
        return torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))


def _loaded(path: Path, text: Sequence[str] = ()) -> Any:
    """The file as a `datasets.Dataset` in memory; its cache lives and dies in a temporary folder.

    With `text`, those columns of a CSV alone, as they stand.
    """
    datasets = needed("datasets", str(path))
    constructor, options = _FORMATS[path.suffix.lower()]
    if text:
        options = {**options, "usecols": list(text), "converters": dict.fromkeys(text, str), "na_filter": False}
    with tempfile.TemporaryDirectory() as cache, _quiet(datasets):
        try:
            read_file = getattr(datasets.Dataset, constructor)
            # a path is a pattern there
            return read_file([glob.escape(str(path))], cache_dir=cache, keep_in_memory=True, **options)
        except Exception as error:  # pandas', pyarrow's and its own: they share no parent
            if "corresponds to no data" in str(error):
                raise FileError(_NO_ROWS.format(path)) from error
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise FileError(
                f"{path}: is not a readable {path.suffix} table ({reason}). Repair or rewrite it"
            ) from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars and no log lines of `datasets` within: what matters becomes an error."""
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
