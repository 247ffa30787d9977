"""Read the weights of a graph one at a time, and hash what is read."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._gs import Graph, read
from .graph import Index
from .linears import Linear


class WeightReader:
    """The initializers of a graph, by name. Nothing that was read is kept but its hash."""

    def __init__(self, graph: Graph) -> None:
        self._values = Index.of(graph).values
        self._hashes: dict[str, str] = {}

    def weight(self, linear: Linear) -> NDArray[np.float32]:
        """W of a linear as float32 [N, K], whatever its type and layout."""
        values = self.raw(linear.weight).astype(np.float32, copy=False)
        return np.ascontiguousarray(values.T) if linear.layout == "KN" else values

    def raw(self, name: str) -> NDArray[Any]:
        """An initializer as it is stored."""
        values = read(self._values[name])
        if name not in self._hashes:
            data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            self._hashes[name] = hashlib.sha256(data.data).hexdigest()
        return values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def digest(self) -> str:
        """SHA-256 over the hashes of all tensors read so far, by name."""
        lines = [f"{name} {digest}" for name, digest in sorted(self._hashes.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
