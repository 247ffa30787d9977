"""Write a tensor in columns, as rows of its transpose come in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .placed_tensors import TensorWriter

MOST = 1 << 27
"""Bytes of the tensor that are held: runs of a column block lie apart in the file, and short ones cost a call each."""

_TILE = 512
"""Rows that are turned together: each of their columns lies on another page of memory, and finding it takes time."""

_APART = 64
"""Bytes between rows of a tile: rows a power of two apart would all fall into the same few places of a cache."""


class ColumnWriter:
    """Writes a tensor [.., N] from rows of its transpose [N, K], where K is all axes but the last.

    Holds as many columns as fit into :data:`MOST` bytes, all of them if it can.
    """

    def __init__(self, writer: TensorWriter, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        k, n = math.prod(shape[:-1]), shape[-1]
        self._writer, self._name = writer, name
        self._tile = np.empty((min(_TILE, n), k + _APART // dtype.itemsize), dtype)[:, :k]
        self._columns = np.empty((k, min(n, max(_TILE, MOST // (k * dtype.itemsize)))), dtype)
        self._in_tile = self._held = self._written = 0

    def add(self, rows: NDArray[Any]) -> None:
        """The next rows, [.., K]."""
        start = 0
        while start < len(rows):
            count = min(len(rows) - start, len(self._tile) - self._in_tile, self._room())
            self._tile[self._in_tile : self._in_tile + count] = rows[start : start + count]
            self._in_tile += count
            start += count
            if self._in_tile == len(self._tile) or not self._room():
                self._turn()

    def close(self) -> None:
        """Write what is still held."""
        self._turn()
        self._flush()

    def _room(self) -> int:
        return self._columns.shape[1] - self._held - self._in_tile

    def _turn(self) -> None:
        self._columns[:, self._held : self._held + self._in_tile] = self._tile[: self._in_tile].T
        self._held += self._in_tile
        self._in_tile = 0
        if self._held == self._columns.shape[1]:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._writer.write_columns(self._name, self._written, self._columns[:, : self._held])
            self._written += self._held
            self._held = 0
