"""The other readers: safetensors, image folders, tables, functions. Values in, the same values out."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from padconvert.errors import FileError
from padconvert.finetune.data import readers
from padconvert.finetune.data.examples import Batch
from padconvert.finetune.data.images import ImageExamples
from padconvert.finetune.data.sources import open_data, open_eval, read
from padconvert.finetune.data.spec import DataSpec

image = pytest.importorskip("PIL.Image")
datasets = pytest.importorskip("datasets")


def everything(refs: list[Any], spec: DataSpec | None = None) -> Batch:
    examples = open_eval(spec or DataSpec(), [str(ref) for ref in refs])
    return examples.batch(torch.arange(len(examples)))


def inputs_of(batch: Batch) -> Tensor:
    assert isinstance(batch.inputs, Tensor)
    return batch.inputs


def labels_of(batch: Batch) -> list[float]:
    assert batch.labels is not None
    return list(batch.labels.tolist())


def test_the_folder_is_the_list() -> None:
    names = [reader.__name__.rpartition(".")[2] for reader in readers.readers()]
    assert names == ["function", "image_folder", "npz", "safetensors_file", "table"]
    assert all(reader.TAKES for reader in readers.readers())


# ---- safetensors -------------------------------------------------------------------------------------------------


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(6, dtype=torch.bfloat16).view(3, 2), "y": torch.tensor([2, 0, 1])}, path)
    batch = everything([path])
    assert inputs_of(batch).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert labels_of(batch) == [2, 0, 1]
    with pytest.raises(FileError, match=r"no array 'pixels' \(it holds x, y\)"):
        everything([path], DataSpec(input_key="pixels"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FileError, match="not a readable safetensors file"):
        everything([path])


def test_numbers_that_are_no_real_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(FileError, match="has dtype float8_e4m3fn"):
        everything([path])


# ---- image folders -----------------------------------------------------------------------------------------------


def picture(seed: int, height: int = 6, width: int = 5, mode: str = "RGB") -> Any:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with names that some readers take for splits or patterns."""
    for number, name in enumerate(["cat[1]", "train"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            picture(10 * number + i).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "train" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_class_folders(folder: Path) -> None:
    batch = everything([folder])
    expected = np.stack([np.asarray(picture(seed)) for seed in (0, 1, 10, 11)]).transpose(0, 3, 1, 2)
    assert np.array_equal(inputs_of(batch).numpy(), expected.astype(np.float32))
    assert labels_of(batch) == [0, 0, 1, 1]
    raw = read([str(folder)], DataSpec())
    assert raw.num_classes == 2
    assert isinstance(raw, ImageExamples)
    assert raw.class_names == ("cat[1]", "train")
    assert inputs_of(raw.batch(torch.tensor([3]))).dtype == torch.uint8


def test_layout_is_for_arrays_and_leaves_images_alone(folder: Path) -> None:
    assert inputs_of(everything([folder], DataSpec(layout="nhwc"))).shape == (4, 3, 6, 5)


def test_images_without_class_folders_have_no_labels(folder: Path) -> None:
    batch = everything([folder / "train"])
    assert batch.labels is None
    assert len(batch) == 2


def test_grey_images_have_one_channel_unless_one_has_colour(tmp_path: Path) -> None:
    for i in range(2):
        picture(i, mode="L").save(tmp_path / f"{i}.png")
    batch = everything([tmp_path])
    assert torch.equal(inputs_of(batch)[1, 0], torch.from_numpy(np.array(picture(1, mode="L"))).float())
    picture(2).save(tmp_path / "2.png")
    assert inputs_of(everything([tmp_path])).shape == (3, 3, 6, 5)


def test_sizes_differ_unless_the_policy_says_one(folder: Path) -> None:
    picture(5, height=9, width=7).save(folder / "train" / "2.png")
    with pytest.raises(FileError, match=r"2.png: is 9 x 7 pixels, .*0.png is 6 x 5.*data.size: \[height, width\]"):
        everything([folder])
    batch = everything([folder], DataSpec(size=(6, 5)))
    assert inputs_of(batch).shape == (5, 3, 6, 5)
    assert torch.equal(
        inputs_of(batch)[:4], inputs_of(everything([folder / "cat[1]", folder / "train"], DataSpec(size=(6, 5))))[:4]
    )


def test_unreadable_images(folder: Path) -> None:
    whole = (folder / "train" / "0.png").read_bytes()
    (folder / "train" / "9.png").write_bytes(whole[: len(whole) - 30])  # its header is whole, its pixels are not
    examples = open_eval(DataSpec(), [str(folder)])
    with pytest.raises(FileError, match=r"9.png: is not a readable image"):
        examples.batch(torch.tensor([4]))
    (folder / "train" / "9.png").write_text("text")
    with pytest.raises(FileError, match=r"9.png: is not a readable image"):
        everything([folder])


def test_folders_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="holds no images"):
        everything([tmp_path / "empty"])
    (tmp_path / "other" / "dog").mkdir(parents=True)
    picture(0).save(tmp_path / "other" / "dog" / "0.png")
    with pytest.raises(FileError, match=r"has other class folders than"):
        everything([folder, tmp_path / "other"])
    with pytest.raises(FileError, match=r"has the classes dog, the training data cat\[1\], train"):
        open_data(DataSpec(train=(str(folder),), eval=(str(tmp_path / "other"),)))
    picture(0).save(folder / "loose.png")
    with pytest.raises(FileError, match=r"loose.png: lies beside the class folders"):
        everything([folder])


# ---- tables ------------------------------------------------------------------------------------------------------


def test_csv_tsv_jsonl_and_parquet_give_the_same(tmp_path: Path) -> None:
    columns = {"a": [1, 2, 3], "label": [0, 2, 1], "b": [0.5, -1.25, 4.0]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    table = datasets.Dataset.from_dict(columns)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.tsv").write_text("a\tlabel\tb\n" + "".join(f"{r['a']}\t{r['label']}\t{r['b']}\n" for r in rows))
    (tmp_path / "a.jsonl").write_text("".join(f"{r}\n".replace("'", '"') for r in rows))
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        batch = everything([tmp_path / name])
        assert inputs_of(batch).tolist() == [[1, 0.5], [2, -1.25], [3, 4.0]], name
        assert inputs_of(batch).dtype == torch.float32
        assert labels_of(batch) == [0, 2, 1]
    both = everything([tmp_path / "a.csv", tmp_path / "a.parquet"])
    assert labels_of(both) == [0, 2, 1, 0, 2, 1]
    chosen = everything([tmp_path / "a.csv"], DataSpec(input_key="b", label_column="a"))
    assert inputs_of(chosen).tolist() == [[0.5], [-1.25], [4.0]]
    assert labels_of(chosen) == [1, 2, 3]
    assert everything([tmp_path / "a.csv"], DataSpec(label_column="none")).labels is None


def test_paths_are_no_patterns_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "we[i]rd").mkdir()
    path = tmp_path / "we[i]rd" / "a*.csv"
    path.write_text("a,label\n1.5,0\n")
    (tmp_path / "we[i]rd" / "ab.csv").write_text("a,label\n2.5,0\n")
    assert inputs_of(everything([path])).tolist() == [[1.5]]
    assert list((tmp_path / "cache").iterdir()) == []
    assert sorted(child.name for child in tmp_path.iterdir()) == ["cache", "we[i]rd"]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_floating_labels_and_lists(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"x": [[[1, 2]], [[3, 4]]], "label": [0.5, 1.5]}).to_parquet(tmp_path / "a.parquet")
    batch = everything([tmp_path / "a.parquet"])
    assert inputs_of(batch).tolist() == [[[1, 2]], [[3, 4]]]
    assert labels_of(batch) == [0.5, 1.5]


def test_an_image_column(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [picture(seed) for seed in range(3)]
    encoded = []
    for one in pictures:
        buffer = io.BytesIO()
        one.save(buffer, format="png")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    table = datasets.Dataset.from_dict({"image": encoded, "label": [1, 0, 1]}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    raw = read([str(tmp_path / "a.parquet")] * 2, DataSpec())
    assert raw.num_classes == 2
    batch = raw.batch(torch.tensor([5, 0]))
    expected = np.stack([np.asarray(pictures[2]), np.asarray(pictures[0])]).transpose(0, 3, 1, 2)
    assert np.array_equal(inputs_of(batch).numpy(), expected)
    assert labels_of(batch) == [1, 1]


@pytest.mark.parametrize(
    ("name", "text", "spec", "message"),
    [
        ("a.csv", "", DataSpec(), r"not a readable .csv table \(No columns"),
        ("a.csv", "a,label\n1,2\n3,4,5,6,7\n", DataSpec(), r"not a readable .csv table"),
        ("a.jsonl", "{nope\n", DataSpec(), r"not a readable .jsonl table"),
        ("a.parquet", "x", DataSpec(), r"not a readable .parquet table"),
        ("a.csv", "a,label\n", DataSpec(), "holds no rows"),
        ("a.csv", "a,b\n1,2\n", DataSpec(), r"no column 'label' \(it has a, b\).*--label-column"),
        ("a.csv", "a,label\n1,2\n", DataSpec(input_key="z"), r"no column 'z' \(it has a, label\)"),
        ("a.csv", "label\n1\n", DataSpec(), "no column beside 'label'"),
        ("a.csv", "a,label\n1,0\n,1\n", DataSpec(), "column 'a', row 1 is empty"),
        ("a.csv", "a,label\n1,cat\n2,dog\n", DataSpec(), "label column 'label' holds text"),
        ("a.tsv", 'sentence\tlabel\n"so far\t1\n', DataSpec(), "column 'sentence' holds text.*no tokenizer.*input_ids"),
        ("a.jsonl", '{"x": [1], "label": 0}\n{"x": [1, 2], "label": 0}\n', DataSpec(), "lists of different lengths"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, name: str, text: str, spec: DataSpec, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FileError, match=message) as caught:
        everything([tmp_path / name], spec)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_a_real_tsv_is_split_at_tabs_only(data_dir: Path) -> None:
    path = data_dir / "text" / "sst2" / "dev.tsv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with pytest.raises(FileError, match=r"column 'sentence' holds text.*no tokenizer"):
        everything([path])


# ---- functions ---------------------------------------------------------------------------------------------------

MODULE = """
import numpy as np
import torch
from torch.utils.data import Dataset

class Squares(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        if i == 3:
            raise RuntimeError("no fourth square")
        return torch.full((2,), float(i * i)), i

class Own:
    num_classes = 7
    def __len__(self):
        return 5
    def batch(self, indices):
        from padconvert.finetune.data.examples import Batch
        return Batch(indices.float()[:, None], indices % 7)

def arrays():
    return np.arange(6.0).reshape(3, 2), np.array([1, 0, 2])
def named():
    return {"left": torch.ones(2, 3), "right": torch.zeros(2, 1)}, None
def images():
    return np.zeros((2, 4, 5, 3), np.uint8), [0, 1]
def squares():
    return Squares()
def own():
    return Own()
def broken():
    return 1 / 0
def wrong():
    return "words"
def ragged():
    return [[1, 2], [3]], [0, 1]
def empty():
    return torch.ones(0, 2), torch.ones(0)
text = "not a function"
"""


@pytest.fixture
def source(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (in_tmp / "own_data.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(in_tmp))])
    yield in_tmp
    sys.modules.pop("own_data", None)


@pytest.mark.usefixtures("source")
def test_functions_that_give_arrays() -> None:
    batch = everything(["own_data:arrays"])
    assert inputs_of(batch).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert labels_of(batch) == [1, 0, 2]
    named = everything(["own_data:named"])
    assert isinstance(named.inputs, dict)
    assert named.inputs["left"].tolist() == [[1] * 3] * 2
    assert named.labels is None
    assert inputs_of(everything(["own_data:images"], DataSpec(layout="nhwc"))).shape == (2, 3, 4, 5)


@pytest.mark.usefixtures("source")
def test_functions_that_give_datasets_and_examples() -> None:
    examples = open_eval(DataSpec(scale=2), ["own_data:squares"])
    batch = examples.batch(torch.tensor([2, 1]))
    assert inputs_of(batch).tolist() == [[2, 2], [0.5, 0.5]]
    assert labels_of(batch) == [2, 1]
    with pytest.raises(
        FileError, match=r"own_data:squares: .* failed at own_data.py:11: RuntimeError: no fourth square"
    ):
        examples.batch(torch.tensor([3]))
    own = open_eval(DataSpec(), ["own_data:own"])
    assert own.num_classes == 7
    assert labels_of(own.batch(torch.tensor([4, 2]))) == [4, 2]


def test_the_current_directory_joins_only_when_code_is_asked_for(source: Path) -> None:
    np.savez(source / "a.npz", x=np.ones((2, 2)))
    everything(["a.npz"])
    assert str(source) not in sys.path
    everything(["own_data:arrays"])
    assert str(source) in sys.path


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("own_data:broken", r"failed at own_data.py:33: ZeroDivisionError: division by zero"),
        ("own_data:wrong", r"returned str\. It has to return \(inputs, labels\)"),
        ("own_data:ragged", "gives a list that is no array"),
        ("own_data:empty", "holds no examples"),
        ("own_data:gone", "has no function 'gone'"),
        ("own_data:text", "has no function 'text'"),
        ("gone_module:f", "importing 'gone_module' failed: ModuleNotFoundError"),
    ],
)
def test_functions_that_fail(ref: str, message: str) -> None:
    with pytest.raises(FileError, match=message) as caught:
        everything([ref])
    assert str(caught.value).startswith(ref)


def test_a_file_whose_name_looks_like_a_function_is_a_file(in_tmp: Path) -> None:
    if os.name == "nt":
        pytest.skip("no colons in file names")
    (in_tmp / "a:b").mkdir()
    picture(0).save(in_tmp / "a:b" / "0.png")
    assert len(everything(["a:b"])) == 1
