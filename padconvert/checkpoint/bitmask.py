"""Checks of what says where the dynamic units are. Packing itself is `layers.packed.pack_bits`.

The manifest says how many units are dynamic. A bitmask or an index that says otherwise would read past the end of
a tensor or leave entries unset, so none leaves the reader unchecked.
"""

from __future__ import annotations

import math

from torch import Tensor

from padconvert.checkpoint.header import quote
from padconvert.checkpoint.layout import join
from padconvert.checkpoint.manifest import Manifest
from padconvert.checkpoint.tensor_bytes import view_bytes
from padconvert.errors import FileError
from padconvert.words import Granularity


def count_bits(packed: Tensor) -> int:
    """How many bits of a uint8 tensor are set."""
    # no tensors of its own size, and no thread of torch's, which would wait for a busy core in each of many operations
    return int.from_bytes(view_bytes(packed), "little").bit_count()


def check_bitmask(packed: Tensor, length: int, n_dynamic: int) -> None:
    """Raises FileError unless exactly `n_dynamic` of the first `length` bits are set and none after them."""
    if length % 8 and int(packed[-1]) >> (length % 8):
        raise FileError(f"bits are set past its end at bit {length}.")
    if (found := count_bits(packed)) != n_dynamic:
        raise FileError(f"{found} bits are set, the manifest says {n_dynamic}.")


def check_index(index: Tensor, rows: int) -> None:
    """Raises FileError unless `index` rises strictly and stays within 0 to `rows` - 1."""
    if not bool((index[1:] > index[:-1]).all()):
        raise FileError("its rows are not in strictly rising order.")
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= rows):
        raise FileError(f"it names a row outside 0 to {rows - 1}.")


class PlacementChecks:
    """Which tensors of a file are bitmasks or indices, and whether their values are what the manifest says."""

    def __init__(self, manifest: Manifest) -> None:
        self._bits: dict[str, tuple[int, int]] = {}
        self._rows: dict[str, int] = {}
        for entry in manifest.layers:
            facts = entry.facts
            if facts.granularity is not Granularity.ELEMENT:
                self._rows[join(entry.name, "dynamic_index")] = facts.weight_shape[0]
                continue
            numel = math.prod(facts.weight_shape)
            self._bits[join(entry.name, "dynamic_bitmask")] = (numel, facts.n_dynamic)
            self._bits[join(entry.name, "bias_dynamic_bitmask")] = (facts.weight_shape[0], facts.n_bias_dynamic)

    def __contains__(self, name: str) -> bool:
        return name in self._bits or name in self._rows

    def check(self, name: str, tensor: Tensor) -> None:
        """Raises FileError if `tensor` is a bitmask or an index and does not fit the manifest."""
        try:
            if name in self._bits:
                check_bitmask(tensor, *self._bits[name])
            elif name in self._rows:
                check_index(tensor, self._rows[name])
        except FileError as error:
            raise FileError(f"tensor {quote(name)}: {error}") from None
