"""Read the weights of a graph one at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._gs import Tensor, read, read_pieces
from .linears import Linear
from .open_graph import OpenGraph
from .weights import row_chunks

BLOCK = 1 << 22
"""Elements of a weight that are read together: 16 MB in float32."""


class WeightReader:
    """The initializers of a graph, by name. Nothing that was read is kept. Can be pickled if the graph can."""

    def __init__(self, model: OpenGraph) -> None:
        self._model = model

    def weight(self, linear: Linear) -> NDArray[np.float32]:
        """W of a linear as float32 [N, K], whatever its type and layout."""
        values = self.raw(linear.weight).astype(np.float32, copy=False)
        return np.ascontiguousarray(values.T) if linear.layout == "KN" else values

    def blocks(self, linear: Linear, elements: int | None = None) -> Iterator[NDArray[np.float32]]:
        """The same, some rows of W at a time, :data:`BLOCK` or so many elements: [.., K].

        A weight that is stored as [K, N] is in memory as a whole.
        """
        elements = elements or BLOCK
        if linear.layout == "KN":
            whole = self.raw(linear.weight)
            for part in row_chunks((linear.n, linear.k), elements):
                yield np.ascontiguousarray(whole[:, part].T).astype(np.float32, copy=False)
            return
        for piece in self.pieces(linear.weight, max(1, elements // linear.k) * linear.k):
            yield piece.reshape(-1, linear.k).astype(np.float32, copy=False)

    def raw(self, name: str) -> NDArray[Any]:
        """An initializer as it is stored."""
        return read(self.tensor(name))

    def pieces(self, name: str, elements: int = BLOCK) -> Iterator[NDArray[Any]]:
        """The same, flat in row-major order, so many elements at a time."""
        return read_pieces(self.tensor(name), elements)

    def tensor(self, name: str) -> Tensor:
        """An initializer that has not been read."""
        return self._model.index.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._model.index.values
