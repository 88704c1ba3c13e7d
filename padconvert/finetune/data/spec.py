"""How data is to be read: the policy's `data:` block as the readers need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class DataPolicy(Protocol):
    """The part of a policy's `data:` block that readers look at; `padconvert.policy` has such an object."""

    @property
    def train(self) -> tuple[str, ...]: ...
    @property
    def eval(self) -> tuple[str, ...]: ...
    @property
    def layout(self) -> str: ...
    @property
    def scale(self) -> float: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def augment(self) -> tuple[str, ...]: ...
    @property
    def text_columns(self) -> tuple[str, ...]: ...
    @property
    def max_length(self) -> int: ...
    @property
    def label_column(self) -> str: ...
    @property
    def input_key(self) -> str: ...
    @property
    def label_key(self) -> str: ...
    @property
    def size(self) -> tuple[int, int] | None: ...
    @property
    def holdout(self) -> float: ...
    @property
    def task(self) -> str | None: ...


#: as `label_key` or `label_column`: there are no labels
NO_LABELS = "none"
#: the label column where nobody names one
DEFAULT_LABEL = "label"


@dataclass(frozen=True, slots=True)
class DataSpec:
    """A `DataPolicy` for callers without a policy; the defaults are the ones that `docs/data.md` lists."""

    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    layout: str = "nchw"
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ()
    max_length: int = 128
    label_column: str = DEFAULT_LABEL
    input_key: str = "x"
    label_key: str = "y"
    size: tuple[int, int] | None = None
    holdout: float = 0.1
    task: str | None = None


def input_names(spec: DataPolicy) -> list[str]:
    """The array names of `input_key`; more than one when it lists several, separated by commas."""
    return [name.strip() for name in spec.input_key.split(",") if name.strip()]
