"""A tensor that is not held but made piece by piece, each time it is read: what streams into a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from padconvert.checkpoint.tensor_bytes import place_of, spec_of, view_bytes

#: bytes handed on at a time: small enough to be still in the cache when the next one reads them
PIECE = 2**20


@dataclass(frozen=True, slots=True)
class Pieces:
    """A dense tensor of `shape` and `dtype` (torch's name, without "torch."). `make` gives its entries in row-major
    order, in tensors of any shape and of any dtype of that width, the same ones whenever it is called."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterator[Tensor]]

    def numel(self) -> int:
        return math.prod(self.shape)


Content = Tensor | Pieces
Contents = Mapping[str, Content]


def spec_of_content(name: str, content: Content) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) as a header wants them. Raises FileError for a tensor without plain values."""
    return (content.dtype, content.shape) if isinstance(content, Pieces) else spec_of(name, content)


def place_of_content(content: Content) -> tuple[object, ...] | None:
    """As `place_of`: equal for one content under two names."""
    return place_of(content) if isinstance(content, Tensor) else (id(content),)


def bytes_of(content: Content) -> Iterator[memoryview]:
    """All bytes of a tensor in a file's order, about `PIECE` at a time."""
    for tensor in content.make() if isinstance(content, Pieces) else (content,):
        data = view_bytes(tensor)
        for begin in range(0, len(data), PIECE):
            yield data[begin : begin + PIECE]
