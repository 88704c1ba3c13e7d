"""Hostile files: each is refused with its exit code, and nothing it asks for happens."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from load_attacks import ATTACKS, TRUSTED, TRUSTED_CODE, edited, members, module_file, write
from padconvert.errors import FileError, UnsafeError, UsageError
from padconvert.load import open_source
from padconvert.load.audit import audit


@pytest.fixture
def workplace(in_tmp: Path) -> Path:
    """The current directory, with a module that the test trusts."""
    (in_tmp / f"{TRUSTED}.py").write_text(TRUSTED_CODE, encoding="utf-8")
    return in_tmp


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_hostile_file_is_refused_and_has_no_effect(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(workplace))
    make, error = ATTACKS[name]
    path = workplace / "model.pt"
    make(path)
    with pytest.raises(error) as raised:
        open_source(path, trust=(TRUSTED,))
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert not (workplace / "canary").exists()


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_audit_says_the_same_without_effect(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(workplace))
    make, error = ATTACKS[name]
    path = workplace / "model.pt"
    make(path)
    if name == "truth_values_of_255":
        pytest.skip("an audit reads no tensor's values")
    try:
        verdict = audit(path, trust=(TRUSTED,)).verdict
    except FileError:
        assert error is FileError
    else:
        assert verdict != "loads"
    assert not (workplace / "canary").exists()


@pytest.mark.parametrize("name", ["system_as_attribute", "system_beside_weights", "eval", "facts_of_a_legacy_file"])
def test_the_canary_is_alive(name: str, in_tmp: Path) -> None:
    """The attacks would work on a reader that unpickles."""
    path = in_tmp / "model.pt"
    ATTACKS[name][0](path)
    torch.load(path, weights_only=False)
    assert (in_tmp / "canary").exists()


def test_refused_names_are_listed_with_the_flag_that_would_allow_them(in_tmp: Path) -> None:
    module_file(in_tmp / "model.pt", "some_net.parts.Net")
    with pytest.raises(UnsafeError, match=r"some_net\.parts\.Net; .*--trust some_net"):
        open_source(in_tmp / "model.pt")


def test_a_class_of_a_script_is_refused_with_what_to_do(in_tmp: Path) -> None:
    module_file(in_tmp / "model.pt", "__main__.Net")
    with pytest.raises(UnsafeError, match=r"__main__\.Net.*Move the class into a module"):
        open_source(in_tmp / "model.pt")


@pytest.mark.parametrize("package", ["os", "builtins", "torch", "__main__", "a-b", ""])
def test_what_is_no_package_of_models_cannot_be_trusted(package: str, in_tmp: Path) -> None:
    torch.save(nn.Linear(2, 2), in_tmp / "model.pt")
    with pytest.raises(UsageError, match="--trust"):
        open_source(in_tmp / "model.pt", trust=(package,))


@pytest.mark.parametrize("legacy", [False, True])
def test_every_cut_of_a_file_is_one_clear_line(legacy: bool, in_tmp: Path) -> None:
    path = in_tmp / "model.pt"
    torch.save(nn.Linear(3, 2), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for length in range(0, len(whole), 17):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError) as raised:
            open_source(path)
        assert "\n" not in str(raised.value)


_WHOLE: dict[str, bytes] = {}


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_of_the_pickle_never_ends_in_a_traceback(tmp_path: Path, at: int, byte: int) -> None:
    path = tmp_path / "model.pt"
    if not _WHOLE:
        torch.save(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), path)
        _WHOLE.update(members(path))
    data = bytearray(_WHOLE["data.pkl"])
    data[at % len(data)] = byte
    write(path, _WHOLE | {"data.pkl": bytes(data)})
    # either it still loads, or it is refused in one of two ways; any other exception fails the test
    with contextlib.suppress(FileError, UnsafeError):
        assert open_source(path).kind in ("module", "state_dict", "checkpoint")


def test_a_state_set_once_more_is_what_the_second_build_would_have_changed(in_tmp: Path) -> None:
    """The same file with one BUILD loads, so the refusal above is about the second."""
    path = in_tmp / "model.pt"
    edited(path, nn.Linear(2, 2), lambda data: data[:-1] + b"2" + b"0" + b".")
    assert isinstance(open_source(path).module, nn.Linear)
