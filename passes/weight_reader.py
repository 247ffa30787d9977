"""Read the weights of a graph one at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._gs import Tensor, read_columns_of, read_pieces
from .linears import Linear
from .open_graph import OpenGraph
from .room import Room
from .weights import row_chunks

BLOCK = 1 << 22
"""Elements of a weight that are read together: 16 MB in float32."""

WIDE = 1 << 26
"""Elements of a weight that are read together where its columns are wanted, so that each read is not too short."""


class WeightReader:
    """The initializers of a graph, by name. Nothing that was read is kept. Can be pickled if the graph can."""

    def __init__(self, model: OpenGraph) -> None:
        self._model = model

    def blocks(self, linear: Linear, elements: int | None = None) -> Iterator[NDArray[np.float32]]:
        """W of a linear [N, K] as float32, whatever its type and layout, :data:`BLOCK` or so many elements at a time.

        Whole rows: [.., K]. A block may be changed; the next one overwrites it. Of a weight that is stored as [K, N],
        :data:`WIDE` elements are in memory.
        """
        step, room = max(1, (elements or BLOCK) // linear.k), Room()
        if linear.layout == "NK":
            for piece in self.pieces(linear.weight, step * linear.k):
                yield _copied(piece.reshape(-1, linear.k), room)
            return
        for wide in row_chunks((linear.n, linear.k), max(1, WIDE // (step * linear.k)) * step * linear.k):
            columns = read_columns_of(self.tensor(linear.weight), wide)
            for start in range(0, columns.shape[1], step):
                yield _copied(columns[:, start : start + step].T, room)

    def pieces(self, name: str, elements: int = BLOCK) -> Iterator[NDArray[Any]]:
        """An initializer as it is stored, flat in row-major order, so many elements at a time: see ``read_pieces``."""
        return read_pieces(self.tensor(name), elements)

    def tensor(self, name: str) -> Tensor:
        """An initializer that has not been read."""
        return self._model.index.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._model.index.values


def _copied(values: NDArray[Any], room: Room) -> NDArray[np.float32]:
    block = room.floats("block", values.shape)
    np.copyto(block, values)
    return block
