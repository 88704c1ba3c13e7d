"""What a command imports before it has to: by name, so that no clock decides, and once by the clock."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

_SAY = (
    "import sys\n"
    "from padconvert.__main__ import main\n"
    "code = main(sys.argv[1:])\n"
    "print('imported', *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    "sys.exit(code)"
)


def imported(*words: str, code: int = 0) -> set[str]:
    """The top-level packages in memory after a command."""
    done = subprocess.run([sys.executable, "-c", _SAY, *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return set(done.stderr.splitlines()[-1].split()[1:])


def test_the_package_alone_costs_nothing() -> None:
    script = "import sys, padconvert; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pydantic", "typer", "rich", "yaml"} & set(done.stdout.split())


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_takes_nothing_heavy(words: list[str]) -> None:
    assert not {"torch", "numpy", "pydantic", "yaml", "transformers", "datasets"} & imported(*words)


@pytest.mark.parametrize("command", ["convert", "inspect", "verify", "export", "policy"])
def test_a_commands_help_takes_no_torch(command: str) -> None:
    assert not {"torch", "numpy", "transformers", "datasets"} & imported(command, "--help")


def test_a_policy_is_checked_without_torch(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\n")
    assert not {"torch", "numpy", "transformers"} & imported("policy", "check", str(policy))


def test_a_file_of_tensors_is_listed_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}, path)
    found = imported("inspect", str(path))
    assert "rich" in found  # it really did print its table
    assert not {"torch", "numpy", "safetensors", "transformers"} & found


def test_listing_reads_the_header_alone(tmp_path: Path) -> None:
    """A file of 8 GB with nothing in it but a hole: reading it would take seconds."""
    entries = 2**31
    text = b'{"a.weight":{"dtype":"F32","shape":[32768,65536],"data_offsets":[0,%d]}}' % (4 * entries)
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * entries)
    begin = time.perf_counter()
    found = imported("inspect", str(path))
    assert time.perf_counter() - begin < 5
    assert "torch" not in found
