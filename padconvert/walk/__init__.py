"""Module (+ one watched forward where inputs are known) → `LayerInfo`s: verdict, reason code, aliases, role, MACs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from padconvert.walk.info import LayerInfo, Walk
from padconvert.walk.spec import SAMPLES

if TYPE_CHECKING:
    from torch import nn

    from padconvert.walk.spec import ProbeSpec

__all__ = ["LayerInfo", "Walk", "walk", "walk_trying"]


def walk(module: nn.Module, probe: ProbeSpec | None = None, samples: int = SAMPLES) -> Walk:
    """All convolution and linear layers of `module` in module order; `module` is left as it was.

    With a `probe` one forward on `samples` samples is watched in eval mode, which adds calls, order, shapes and
    multiply-adds, and finds layers that are never called or whose weight is read from outside. A forward that fails
    raises nothing: the method is then "tree", and a note has the first line of its error.
    """
    from padconvert.walk.tree import walk_tree  # torch: not wanted by `--help`

    return walk_tree(module, probe, samples)


def walk_trying(module: nn.Module, input_shape: tuple[int, ...] | None = None, samples: int = SAMPLES) -> Walk:
    """`walk` on the first inputs that `module` takes and gives floating-point outputs for: of this shape, batch first,
    as numbers or token ids, or guessed. The trial is the watched forward, and the walk's `probe` says what it took;
    None where it took nothing."""
    from padconvert.walk.tree import walk_by_trying  # torch: not wanted by `--help`

    return walk_by_trying(module, input_shape, samples)
