"""How much one pickle may ask for, counted while it is read: opcodes, and copies of what it spells out only once."""

from __future__ import annotations

from padconvert.errors import FileError
from padconvert.load.nodes import Plain, PlainNode, SeriesNode, TableNode, Value

# An 80-layer Llama takes half a million. Each may become an object, and each is looked at several times.
_MAX_OPCODES = 1_500_000
# No number in a model is as long; Python refuses to print longer ones.
_MAX_BITS = 4_096
# What calls may copy out of their arguments beyond what the pickle spells out: one list may be made many sets.
_SPARE_COPIES = 1 << 20


class Budget:
    """What a pickle has asked for until now. `where` is for messages."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._opcodes = 0
        self._spelled = 0
        self._copied = 0

    def opcode(self, argument: object) -> None:
        """Counts one. Raises FileError for one too many, and for a number that is longer than any model's."""
        self._opcodes += 1
        self._spelled += 1
        if self._opcodes > _MAX_OPCODES:
            raise FileError(
                f"{self._where}: its pickle never ends (over {_MAX_OPCODES} opcodes). Save the state dict alone."
            )
        if isinstance(argument, str | bytes | bytearray):
            self._spelled += len(argument)
        elif type(argument) is int and argument.bit_length() > _MAX_BITS:
            raise FileError(f"{self._where}: a number of {argument.bit_length()} bits, which no model holds.")

    def call(self, made: Value) -> None:
        """Counts what a call's result holds. Raises FileError where calls copy far more than the pickle spells out."""
        self._copied += _held(made)
        if self._copied > self._spelled + _SPARE_COPIES:
            raise FileError(f"{self._where}: its pickle copies the same values over and over. Save the model again.")


def _held(made: Value) -> int:
    match made:
        case SeriesNode(items=items):
            return len(items)
        case TableNode(pairs=pairs):
            return len(pairs)
        case PlainNode(kind=Plain.BYTEARRAY, args=[bytes(data)]):
            return len(data)
        case bytes():
            return len(made)
        case _:
            return 0
