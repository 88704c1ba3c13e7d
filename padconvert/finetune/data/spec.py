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
    def label_column(self) -> str | None: ...
    @property
    def input_key(self) -> str: ...
    @property
    def label_key(self) -> str: ...
    @property
    def holdout(self) -> float: ...


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
    label_column: str | None = None
    input_key: str = "x"
    label_key: str = "y"
    holdout: float = 0.1
    size: tuple[int, int] | None = None


def image_size(spec: DataPolicy) -> tuple[int, int] | None:
    """(height, width) that images are resized to, or None for as they are."""
    size = getattr(spec, "size", None)
    return (int(size[0]), int(size[1])) if size else None


def input_names(spec: DataPolicy) -> list[str]:
    """The array names of `input_key`; more than one when it lists several, separated by commas."""
    return [name.strip() for name in spec.input_key.split(",") if name.strip()]
