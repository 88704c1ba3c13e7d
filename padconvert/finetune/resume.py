"""The work directory: a run's state on disk, so that a killed run goes on to the same bytes.

`run.json` holds what the run was started with; a run with anything changed is refused and told what changed.
Each trained variant has one `NAME.safetensors`, replaced as a whole at step boundaries.
"""

from __future__ import annotations

import json
import os
import time
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from padconvert.errors import FileError, UsageError
from padconvert.finetune.loop import Run
from padconvert.finetune.optimizer import OptimizerPolicy, make_optimizer
from padconvert.rewrite import pad_layers

#: seconds between two saves; what they hold does not depend on it
SAVE_EVERY = 20.0

#: named as what changed only where nothing else did
DECISIONS = "the plan's decisions"


class WorkDir:
    """A folder that belongs to one run. Raises UsageError if it belongs to another one, naming what changed."""

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], decisions: str = "") -> None:
        """`fingerprint` holds what a person can name, `decisions` is a checksum of all that follows from it."""
        self.path = path
        fingerprint = {**fingerprint, DECISIONS: decisions}
        record = path / "run.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            weakref.finalize(self, os.close, _lock(path))
            if record.exists():
                _check_same(path, _terms(record.read_bytes()), json.loads(json.dumps(fingerprint)))
            else:
                _replace(record, json.dumps(fingerprint, indent=1, sort_keys=True).encode())
        except OSError as error:
            raise FileError(f"--work-dir {path}: cannot be used ({error.strerror}). Name another folder.") from error
        except (ValueError, RecursionError) as error:
            raise FileError(
                f"{record}: is damaged ({error}). Empty the folder to start the run again, or name another one."
            ) from error

    def keeper(self, name: str, train: OptimizerPolicy) -> FileKeeper:
        """The keeper of one trained variant ("output", "static", "fully_dynamic")."""
        return FileKeeper(self.path / f"{name}.safetensors", train)


def _lock(path: Path) -> int:
    """A descriptor locked as long as it is open, so that no second process writes the same states."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such lock on this system
        pass
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise UsageError(
            f"--work-dir {path}: another run is using it. Wait for its end, or name another folder."
        ) from None
    return descriptor


def _terms(content: bytes) -> dict[str, Any]:
    terms = json.loads(content)
    if not isinstance(terms, dict):
        raise ValueError("not a JSON object")
    return terms


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        changed = [key for key in changed if key != DECISIONS] or changed
        what = "; ".join(f"{key}: {_short(before.get(key))} before, {_short(now.get(key))} now" for key in changed)
        raise UsageError(
            f"--work-dir {path} belongs to another run ({what}). "
            "Repeat that run's terms to resume it, or name an empty folder."
        )


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class FileKeeper:
    """Saves a run every `SAVE_EVERY` seconds and after its last step, always at a step boundary."""

    def __init__(self, path: Path, train: OptimizerPolicy) -> None:
        self.path = path
        self.train = train
        self._saved = time.monotonic()

    def step_done(self, run: Run) -> None:
        if run.step == run.phases.steps or time.monotonic() - self._saved >= SAVE_EVERY:
            self.save(run)
            self._saved = time.monotonic()

    def save(self, run: Run) -> None:
        """Write the state to a sibling, then put it in place."""
        layers = {
            name: [len(layer.units("weight").dynamic), len(layer.units("bias").dynamic) if layer.has_bias else 0]
            for name, layer in pad_layers(run.model).items()
        }
        tensors = _tensors(run)
        record = json.dumps({"step": run.step, "history": run.history, "layers": layers})
        temporary = self.path.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata={"run": record, "crc32": _crc32(record, tensors)})
            with temporary.open("rb+") as file:  # the new name must not reach the disk before the bytes
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise FileError(
                f"{self.path}: the run's state cannot be saved ({str(error).splitlines()[0]}). "
                "Free some space, or name another --work-dir."
            ) from error

    def restore_(self, run: Run) -> None:
        """Bring `run` to the saved step, if one was saved. Raises FileError where the file is damaged."""
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata["crc32"] != _crc32(metadata["run"], stored):
                raise ValueError("its checksum does not fit")
            _restore(run, json.loads(metadata["run"]), stored, self.train)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileError(
                f"{self.path}: the saved state cannot be read ({str(error).splitlines()[0]}). "
                "Delete the file to start this run again."
            ) from error


def _tensors(run: Run) -> dict[str, Tensor]:
    """All parameters, buffers (the temporary ones too) and optimizer states, each under a name of its own."""
    parameters = dict(run.model.named_parameters())
    tensors = {f"model/{name}": value for name, value in (parameters | dict(run.model.named_buffers())).items()}
    for name, parameter in parameters.items():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _crc32(record: str, tensors: Mapping[str, Tensor]) -> str:
    """One checksum over the record and all tensors in the order of their names; safetensors has none of its own."""
    total = zlib.crc32(record.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        content: Any = tensor.view(-1).view(torch.uint8).numpy()
        said = f"{name} {tensor.dtype} {list(tensor.shape)}"
        total = zlib.crc32(content, zlib.crc32(said.encode("utf-8", "surrogatepass"), total))
    return f"{total:08x}"


@torch.no_grad()
def _restore(run: Run, record: dict[str, Any], stored: dict[str, Tensor], train: OptimizerPolicy) -> None:
    for name, layer in pad_layers(run.model).items():
        layer.resize_(*record["layers"][name])
    for name, value in (dict(run.model.named_parameters()) | dict(run.model.named_buffers())).items():
        value.copy_(stored[f"model/{name}"])
    run.optimizer = make_optimizer(run.model, train)
    for name, parameter in run.model.named_parameters():
        prefix = f"optimizer/{name}/"
        state = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        if state:
            run.optimizer.state[parameter] = {key: _laid_as(parameter, value) for key, value in state.items()}
    run.step = int(record["step"])
    run.history = list(record["history"])


def _laid_as(parameter: Tensor, value: Tensor) -> Tensor:
    """Where the parameter is, in the order of memory in which it is held: a fused optimizer asks for both."""
    if value.shape != parameter.shape:  # the number of steps
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
