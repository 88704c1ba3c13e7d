"""Write the artefact, and give it its name only once it was read back and computes what was trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from padconvert.account import file_totals
from padconvert.checkpoint.folder import CONFIG
from padconvert.checkpoint.read import Checkpoint, read_checkpoint
from padconvert.checkpoint.save import provenance_of, save_model
from padconvert.checkpoint.write import WrittenFile
from padconvert.checkpoint.write_folder import files_in
from padconvert.errors import VerificationError
from padconvert.export.directory import save_directory
from padconvert.gates import hold, size_gate
from padconvert.load.artefact import load_checkpoint
from padconvert.load.opened import Opened
from padconvert.options import ConvertOptions
from padconvert.plan import Plan
from padconvert.results import Gate
from padconvert.rewrite import sharing_copy
from padconvert.stream import Stream
from padconvert.verify import probe_check, runs
from padconvert.walk.probe import ProbeSpec

SINGLE_FILE = ".safetensors"


def becomes_directory(source: Path, output: Path) -> bool:
    """A transformers directory becomes one again, unless the output is named as a single file."""
    return (source / CONFIG).is_file() and output.suffix != SINGLE_FILE


def becomes_folder(source: Path, output: Path, options: ConvertOptions) -> bool:
    """Whether the output is a folder: a transformers directory, or a checkpoint in shards."""
    return becomes_directory(source, output) or options.max_shard_size is not None


@dataclass(frozen=True, slots=True)
class Seal:
    """What goes into the file beside the model."""

    opened: Opened
    plan: Plan
    probe: ProbeSpec | None
    options: ConvertOptions
    gates: tuple[Gate, ...] = ()  # those that are decided already
    stream: Stream | None = None  # what the model does not hold itself
    said: tuple[str, ...] = ()  # lines for a directory's model card: what was measured

    def write(self, model: nn.Module, output: Path) -> WrittenFile:
        """The folded model as a file, or as a folder. Raises VerificationError, and leaves nothing, where it does not
        come back, and GateError where it is larger than it may be."""
        trained = self.plan.route == "trained"
        common: dict[str, Any] = {
            "architecture": self.opened.architecture,
            "provenance": provenance_of(
                source_sha256=self.opened.sha256,
                source_kind=self.opened.kind,
                device=torch.device(self.options.device).type,
                seed=self.options.seed,
                trained=trained,
            ),
            "policy": self.plan.policy.model_dump(mode="json"),
            "trained": trained,
            "probe": self._probe(model),
            "packed": None if self.stream is None else self.stream.packed,
            "max_shard_size": self.options.max_shard_size,
            "force": self.options.force,
            "check": lambda path: self._check_back(path, model),
        }
        if becomes_directory(self.opened.path, output):
            return save_directory(model.eval(), output, source_dir=self.opened.path, notes=self.said, **common)
        extra = self.opened.extra_tensors
        return save_model(model.eval(), output, extra_tensors=extra, source=self.opened.path, **common)

    def _probe(self, model: nn.Module) -> ProbeSpec | None:
        """The probe, where the model can be called with it."""
        if self.stream is not None:
            return self.probe if self.stream.packed.outputs else None
        return self.probe if self.probe is not None and runs(model, self.probe) else None

    def _check_back(self, path: Path, model: nn.Module) -> None:
        """Hold the bytes against the plan, load them as a user would and hold the outputs against the record."""
        size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in files_in(path))
        hold((*self.gates, *size_gate(size, self.options.max_size)))
        checkpoint = read_checkpoint(path)
        file_totals(self.plan, checkpoint, model, self.opened.sizes, self.opened.bytes)
        if self.stream is not None:
            self.stream.check_back(checkpoint, self._loaded(checkpoint, mapped=True))
            return
        check = probe_check(checkpoint, self._loaded(checkpoint))
        if not check.passed:
            raise VerificationError(
                f"The written file does not give the model back: outputs differ by {check.value}, at most "
                f"{check.limit} is allowed. Nothing was written; please report it."
            )

    def _loaded(self, checkpoint: Checkpoint, *, mapped: bool = False) -> nn.Module:
        architecture = self.opened.architecture
        if architecture["kind"] == "none":
            into = sharing_copy(self.opened.static) if mapped else copy.deepcopy(self.opened.static)
            return load_checkpoint(checkpoint, into=into.cpu(), mapped=mapped)
        # the factory is the user's own word of this very run
        factory = [str(architecture["ref"]).split(":")[0]] if architecture["kind"] == "factory" else []
        return load_checkpoint(checkpoint, trust=(*self.options.trust, *factory), mapped=mapped)
