"""The whole corpus of hostile files, read in one process: each refused within 5 seconds and 500 MB, without effect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import exported_attacks
import load_attacks

if not sys.platform.startswith("linux"):
    pytest.skip("the memory of a process is read as Linux tells it", allow_module_level=True)

SECONDS, MEGABYTES = 5, 500
READS_NO_VALUES = "truth_values_of_255"  # an audit has nothing to refuse there


def test_every_attack_is_refused_within_the_limits(in_tmp: Path) -> None:
    files = in_tmp / "files"
    files.mkdir()
    (in_tmp / f"{load_attacks.TRUSTED}.py").write_text(load_attacks.TRUSTED_CODE)
    torch.save(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), files / "sound.pt")
    exported_attacks.write(files / "sound.pt2", dict(exported_attacks.sound()))
    for name, (make, _) in load_attacks.ATTACKS.items():
        make(files / f"{name}.pt")
    for name, (make, _) in exported_attacks.ATTACKS.items():
        make(files / f"{name}.pt2")
    (in_tmp / "canary").unlink(missing_ok=True)  # making some of them is an effect already
    reader = str(Path(__file__).with_name("attack_reads.py"))
    command = [sys.executable, "-W", "ignore", reader, "files", load_attacks.TRUSTED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(load_attacks.ATTACKS) + len(exported_attacks.ATTACKS) > 100
    faults = [
        (name, audited, converted, seconds, grown)
        for name, audited, converted, seconds, grown in found
        if converted not in (4, 6)
        or (audited not in (4, 6) and not name.startswith(READS_NO_VALUES))
        or seconds > SECONDS
        or grown > MEGABYTES
    ]
    assert not faults
    assert not (in_tmp / "canary").exists()
    assert not (in_tmp / "out.st").exists()


def test_the_ceiling_is_alive(in_tmp: Path) -> None:
    """So that the test above would see a file that takes more: a sound one, of 320 MB and its copies."""
    files = in_tmp / "files"
    files.mkdir()
    torch.save(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), files / "sound.pt")
    large = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    large[0].register_buffer("large", torch.zeros(80_000_000))
    torch.save(large, files / "large.pt")
    del large
    reader = str(Path(__file__).with_name("attack_reads.py"))
    done = subprocess.run([sys.executable, reader, "files", "attack_net"], capture_output=True, text=True)
    (files / "large.pt").unlink()
    name, _, converted, _, grown = json.loads(done.stdout.splitlines()[-1])
    assert name == "large.pt"
    assert converted == 1 or grown > MEGABYTES
