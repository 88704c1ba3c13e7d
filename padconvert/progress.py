"""How long work tells how far it is. The library stays silent; `report/` draws it on a terminal."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what a run is doing. All calls are optional to act on and must not raise."""

    def stage(self, name: str) -> None:
        """A new part of the line begins: "load", "walk", "train", …"""

    def step(self, done: int, total: int, **numbers: float) -> None:
        """`done` of `total` steps of the current stage; numbers such as `loss`."""

    def note(self, text: str) -> None:
        """One line a person wants to read."""


class Silent:
    """A `Progress` that says nothing."""

    def stage(self, name: str) -> None:
        del name

    def step(self, done: int, total: int, **numbers: float) -> None:
        del done, total, numbers

    def note(self, text: str) -> None:
        del text
