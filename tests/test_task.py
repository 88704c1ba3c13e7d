"""Data that does not fit the source: the message says which of the two to change, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from directories import saved, tiny
from padconvert.__main__ import main
from padconvert.errors import FileError
from padconvert.finetune.data.examples import TensorExamples
from padconvert.finetune.train import check_examples
from padconvert.policy import load_policy
from padconvert.task import positions_of, tokenizer_for
from test_text_data import save_tokenizer, written

CPU = torch.device("cpu")


class Bare(nn.Module):
    """A network of tokens without a head, as transformers' are: outputs [B, T, 4]."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.embed(ids)
        return out


def test_data_that_does_not_fit_says_what_to_change() -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(FileError, match=r"it has token id 9, and the source's vocabulary goes from 0 to 8\. Take the"):
        check_examples(Bare(), TensorExamples(torch.tensor([[1, 2], [3, 9]]), labels), "the data", CPU)
    with pytest.raises(FileError, match=r"no head for classes\. '--task classification' gives it one"):
        check_examples(Bare(), TensorExamples(torch.tensor([[1, 2, 3], [3, 8, 1]]), labels), "the data", CPU)


def test_a_network_takes_as_many_tokens_as_it_has_positions(tmp_path: Path) -> None:
    assert positions_of({"model_type": "bert", "max_position_embeddings": 64, "pad_token_id": 3}) == 64
    assert positions_of({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}) == 512
    assert positions_of({"model_type": "gpt2", "n_positions": 32}) == 32
    assert positions_of({"model_type": "llama", "max_position_embeddings": 64, "rope_theta": 1e4}) is None
    assert positions_of({"model_type": "t5"}) is None
    folder = saved(tiny(max_position_embeddings=32), tmp_path / "m")
    save_tokenizer(folder, model_max_length=10**30)
    found = tokenizer_for(folder, load_policy().policy, ["a.tsv"])
    assert found is not None
    assert found.model_max_length == 32


def test_labels_of_one_class_are_to_blame_and_not_the_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tiny(), tmp_path / "m")
    save_tokenizer(folder)
    data = written(tmp_path / "a.tsv", "sentence\tlabel\n" + "a cat\tgood\n" * 8)
    words = ["convert", str(folder), "-o", str(tmp_path / "out"), "--task", "classification", "--data", data]
    assert main(words) == 4
    said = capsys.readouterr().err
    assert f"{data}: its labels are all of one class, and --task classification needs two or more" in said
    assert not (tmp_path / "out").exists()
