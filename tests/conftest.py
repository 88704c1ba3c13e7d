"""What every test stands on: stable terminal output, one torch thread, the hypothesis profiles, the real data."""

from __future__ import annotations

import os
from pathlib import Path

# Before typer and rich are imported: they read these once.
os.environ["TERMINAL_WIDTH"] = "100"
os.environ["COLUMNS"] = "100"
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
os.environ.pop("FORCE_COLOR", None)

import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomized, so that a failure on one machine is a failure on all; "thorough" is for a long local search.
settings.register_profile(
    "default", derandomize=True, max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# The number of threads changes the order of sums and so the last bits; pytest-xdist brings the parallelism.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: `PADCONVERT_DATA`, or `../shared/data` beside the repository; else the test skips."""
    named = os.environ.get("PADCONVERT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder (set PADCONVERT_DATA)")
    return folder


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is also the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
