"""The command line as a whole: exit codes, one clear line, one JSON document, and a frozen set of options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.main

from padconvert import __main__ as command
from padconvert import errors
from padconvert.cli import parse
from padconvert.cli.app import app
from padconvert.errors import PadconvertError, UsageError
from padconvert.options import POLICY_KEYS, ConvertOptions

# Options are a promise: one may be added here, none may go.
OPTIONS = {
    "convert": "--output -o --dynamic-ratio --experts --granularity --policy --preset --set --plan --arch --arch-arg "
    "--input-shape --trust --state-key --data --eval-data --text-column --label-column --task --steps --batch-size "
    "--lr --compare --max-shard-size "
    "--work-dir --seed --device --dry-run --plan-out --force --json --report --quiet -q --max-accuracy-drop --max-size "
    "--max-memory --require-layers --strict",
    "inspect": "--policy --preset --set --arch --arch-arg --input-shape --trust --state-key --data --text-column "
    "--task --seed --audit --json",
    "verify": "--against --data --loader --arch --arch-arg --trust --state-key --device --json",
    "export": "--output -o --format --trust --force --json",
    "bench": "--against --batch-size --threads --layers --quick --input-shape --data --arch --arch-arg --trust "
    "--state-key --device --json",
    "doctor": "--json",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_set_of_options_is_frozen(name: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {word for parameter in commands[name].params for word in parameter.opts if word.startswith("-")}
    assert found == set(OPTIONS[name].split())
    assert set(commands) == {*OPTIONS, "policy"}


def failing(error: BaseException) -> object:
    def run(_: list[str]) -> int:
        raise error

    return run


EVERY_ERROR: list[type[PadconvertError]] = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PadconvertError)
]


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_own_errors_are_one_line_and_their_exit_code(
    kind: type[PadconvertError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_run", failing(kind("here: this; do that")))
    assert command.main(["convert"]) == kind.exit_code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: here: this; do that\n")


def test_exit_codes_are_the_promised_ones() -> None:
    assert sorted(kind.exit_code for kind in EVERY_ERROR) == [1, 2, 3, 4, 5, 6, 7, 8, 130]


def test_with_json_an_error_is_one_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_run", failing(UsageError("no «such» thing")))
    assert command.main(["convert", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document == {"schema": "padconvert.error/1", "error": "no «such» thing", "exit_code": 2}


def test_an_unexpected_exception_is_one_line_and_debug_lets_it_through(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_run", failing(ZeroDivisionError("three\nlines\nlong")))
    monkeypatch.delenv("PADCONVERT_DEBUG", raising=False)
    assert command.main([]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(said in line for said in ("ZeroDivisionError: three", "PADCONVERT_DEBUG=1"))
    monkeypatch.setenv("PADCONVERT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        command.main([])


def test_the_systems_own_errors_name_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_run", failing(OSError(28, "No space left on device", "out.safetensors")))
    assert command.main([]) == 4
    assert capsys.readouterr().err == "error: out.safetensors: No space left on device\n"


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("padconvert.doctor.examine", interrupted)
    assert command.main(["doctor"]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["convrt"], 2, "Did you mean 'convert'"),
        ([], 2, "padconvert --help"),
        (["convert"], 2, "Missing argument"),
        (["convert", "m.pt", "--bogus"], 2, "--bogus"),
        (["convert", "m.pt", "--dynamic-ratio", "x"], 2, "--dynamic-ratio"),
        (["convert", "m.pt", "--dynamic-ratio", "1.5"], 2, "--dynamic-ratio"),
        (["convert", "m.pt", "--dynamic-ratio", "nan"], 2, "--dynamic-ratio"),
        (["convert", "m.pt", "--experts", "1"], 2, "--experts"),
        (["convert", "m.pt", "--set", "train.steps"], 2, "KEY=VALUE"),
        (["convert", "m.pt", "--set", "train.stepz=3"], 2, "Did you mean 'steps'"),
        (["convert", "m.pt", "--preset", "papr"], 2, "paper"),
        (["convert", "m.pt", "--policy", "absent.yaml"], 3, "absent.yaml"),
        (["convert", "m.pt", "--input-shape", "3"], 2, "1,3,32,32"),
        (["convert", "m.pt", "--arch-arg", "depth"], 2, "KEY=VALUE"),
        (["convert", "m.pt", "--report", "r.txt"], 2, ".html"),
        (["convert", "m.pt", "--report", "absent/r.html"], 4, "absent"),
        (["convert", "m.pt"], 4, "m.pt"),
        (["inspect", "m.pt"], 4, "m.pt"),
        (["verify", "m.pt"], 4, "m.pt"),
    ],
)
@pytest.mark.usefixtures("in_tmp")
def test_a_wrong_call_is_one_clear_line(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert list(Path().iterdir()) == []


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    """`padconvert … | head -0`: no traceback, no message."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "padconvert", "policy", "schema"], stdout=write_end, stderr=subprocess.PIPE, cwd=tmp_path
    )
    os.close(write_end)
    assert done.stderr == b""
    assert done.returncode != 0


def test_the_working_directory_stands_in_for_nothing(tmp_path: Path) -> None:
    """A file that happens to be called yaml.py must not run because of where padconvert was called."""
    (tmp_path / "yaml.py").write_text("raise SystemExit('ran code of the working directory')", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "padconvert", "policy", "schema"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("in_tmp")
def test_own_code_is_searched_only_when_asked_for_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["elsewhere"])
    parse.allow_own_code([None], ["data.npz", "folder"])
    assert sys.path == ["elsewhere"]
    parse.allow_own_code([None], ["mine:data"])
    assert sys.path == ["elsewhere", os.getcwd()]
    parse.allow_own_code(["mine:net"])
    assert sys.path == ["elsewhere", os.getcwd()]


def test_words_that_are_parsed_here() -> None:
    assert parse.input_shape("1,3,32,32") == (3, 32, 32)
    assert parse.input_shape(None) is None
    assert parse.arch_args(["depth=20", "name=a b", "wide=true"]) == {"depth": 20, "name": "a b", "wide": True}
    for shape in ("", "1,3,x", "1,3,-2", "1,0"):
        with pytest.raises(UsageError, match="input-shape"):
            parse.input_shape(shape)
    for pair in ("depth", "2x=1", "a={"):
        with pytest.raises(UsageError, match="arch-arg"):
            parse.arch_args([pair])


@pytest.mark.parametrize("name", POLICY_KEYS)
def test_short_options_reach_the_policy_and_win_over_set(name: str) -> None:
    values = {
        "dynamic_ratio": 0.25, "experts": 3, "granularity": "channel", "data": ("a.npz",), "eval_data": ("b.npz",),
        "text_columns": ("a", "b"), "label_column": "mine", "task": "glue/mrpc",
        "steps": 7, "batch_size": 5, "lr": 0.125,
    }  # fmt: skip
    value, key = values[name], POLICY_KEYS[name]
    options = ConvertOptions(sets=(f"{key}=",), **{name: value})  # type: ignore[arg-type]
    found: object = options.resolve_policy().policy
    for part in key.split("."):
        found = getattr(found, part)
    assert float(found) == value if isinstance(value, float) else found == value  # type: ignore[arg-type]


def test_the_option_of_a_list_is_named_as_it_is_said() -> None:
    origins = ConvertOptions(text_columns=("a",)).resolve_policy().origins
    assert origins["data.text_columns"] == "option --text-column"


def test_a_shard_has_a_size() -> None:
    assert ConvertOptions(max_shard_size=1).max_shard_size == 1
    with pytest.raises(UsageError, match="--max-shard-size 0: take a size of at least one byte"):
        ConvertOptions(max_shard_size=0)


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["versions"]["torch"] == torch.__version__
    assert document["devices"][0] == "cpu"
    assert document["threads"] == torch.get_num_threads()
    assert {extra["name"] for extra in document["extras"]} == {"hf", "data", "onnx", "report"}


def test_doctor_names_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("padconvert.doctor._version", lambda package: None if package == "matplotlib" else "1.0")
    assert command.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "matplotlib missing: pip install 'padconvert[report]'" in said
    assert "✓ data" in said
