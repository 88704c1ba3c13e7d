"""What one `convert` run was asked to do: the command line's words, checked for form but not yet acted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from padconvert.errors import UsageError
from padconvert.gates import check_bounds, check_strict
from padconvert.policy import Option, Resolved, load_policy, names_function, set_overrides

#: the option of the command line, as a field of `ConvertOptions`, and the policy key that it sets
POLICY_KEYS = {
    "dynamic_ratio": "defaults.dynamic_ratio",
    "experts": "defaults.num_experts",
    "granularity": "defaults.granularity",
    "data": "data.train",
    "eval_data": "data.eval",
    "text_columns": "data.text_columns",
    "label_column": "data.label_column",
    "task": "data.task",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
}

#: where an option is not called as its field: it is said once for each item
_FLAGS = {"text_columns": "--text-column"}

#: seeds are multiplied and added to on their way to torch's generators, which take 64 bits
MAX_SEED = 2**32 - 1


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """All that a `convert` run can be told. None or empty means: not said, the policy or the default decides.

    `sets` are policy settings as written, `train.steps=200`; the fields named in `POLICY_KEYS` are short forms of
    such settings. The policy checks all of these values.
    """

    output: Path | None = None
    force: bool = False
    # the policy
    policy: Path | None = None
    preset: str | None = None
    sets: tuple[str, ...] = ()
    dynamic_ratio: float | None = None
    experts: int | None = None
    granularity: str | None = None
    working_file: Path | None = None  # padconvert.yaml of the working directory, when there is one
    # how the source is read
    arch: str | None = None
    arch_args: Mapping[str, object] = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None  # without the batch dimension
    trust: tuple[str, ...] = ()
    state_key: str | None = None  # the entry of a checkpoint that holds the network
    # data and training
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    task: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    compare: bool = False
    # the run
    seed: int = 0
    device: str = "cpu"
    dry_run: bool = False
    plan: Path | None = None
    plan_out: Path | None = None
    work_dir: Path | None = None
    max_shard_size: int | None = None  # bytes; a larger artefact is written in several files
    # bounds; sizes are bytes, the accuracy is a fraction
    max_accuracy_drop: float | None = None
    max_size: int | None = None
    max_memory: int | None = None
    require_layers: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"--seed {self.seed}: take a whole number from 0 to {MAX_SEED}.")
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise UsageError(f"--max-shard-size {self.max_shard_size}: take a size of at least one byte")
        check_bounds(self.max_accuracy_drop, self.max_size, self.max_memory, self.require_layers)

    def overrides(self) -> dict[str, object]:
        """What these options say about the policy, as `load_policy` takes it. A short form wins over `sets`.

        Raises UsageError for a setting that is not KEY=VALUE.
        """
        said = set_overrides(self.sets)
        for name, key in POLICY_KEYS.items():
            value = getattr(self, name)
            if value is not None and value != ():
                plain = list(value) if isinstance(value, tuple) else value
                said[key] = Option(plain, _FLAGS.get(name, "--" + name.replace("_", "-")))
        return said

    def resolve_policy(self) -> Resolved:
        """The whole policy of this run and where each value was said. Raises PolicyError or UsageError, the latter
        for `strict` too where anything names code."""
        resolved = load_policy(self.policy, self.preset, self.overrides(), self.working_file)
        if self.strict:
            check_strict(self._unsafe(resolved))
        return resolved

    def _unsafe(self, resolved: Resolved) -> list[str]:
        """The words of this call, or of its policy, that run or trust code."""
        named = [f"--arch {self.arch}"] if self.arch else []
        named += [f"--trust {package}" for package in self.trust]
        for key, refs in (("train", resolved.policy.data.train), ("eval", resolved.policy.data.eval)):
            origin = resolved.origins.get(f"data.{key}", f"data.{key}").removeprefix("option ")
            code = [ref for ref in refs if names_function(ref) and not Path(ref).exists()]
            named += [origin if ref in origin else f"{origin} {ref}" for ref in code]
        return named
