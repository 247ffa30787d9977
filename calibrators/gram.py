"""XᵀX of activations that lie in a file: in float64, a few rows of the matrix at a time.

NOTE: the matrix has K² elements, 3.3 GB in float32 for the 28672 channels of LLaMA3-70B. So no more of it is held than
``_BLOCK_BYTES``, and the activations are read anew for each block; the system keeps them in its cache. Blocks do not
depend on the memory there is, and so the results do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.piece_run import Batch, StreamFile
from ..engines.streaming import Streamed
from ..export.errors import BismoothError

_BLOCK_BYTES = 32 << 20
"""Of rows of the matrix, in float64."""

_CHUNK_BYTES = 16 << 20
"""Of rows of activations, in float64."""

_MARGIN = 64 << 20
"""For what the BLAS takes."""


@dataclass(frozen=True)
class KeptRows:
    """All rows of an observed value in a file, float32 [rows, K].

    Attributes:
        file: a "window" of it is a row.
        per_window: rows of a window of tokens.
    """

    file: StreamFile
    per_window: int

    @staticmethod
    def of(streamed: Streamed, value: str, channels: int, folder: Path) -> KeptRows:
        """Those of a value with so many channels, in a file in ``folder`` that is yet to be made.

        Raises:
            BismoothError: the graph does not say how many rows a window has.
        """
        shape = streamed.shape(value)
        if shape is None or shape[-1] != channels or prod(shape[:-1]) % streamed.windows_per_run:
            raise BismoothError(
                f"value {value}: its shape says nothing of its rows per window. Expected one made of batch, sequence "
                f"and {channels} channels, got {shape}. Leave it out, or calibrate without --grams."
            )
        file = StreamFile(streamed.file_path(f"{value}::x", folder), value, "<f4", (channels,))
        return KeptRows(file, prod(shape[:-1]) // streamed.windows_per_run)

    def write(self, batch: Batch, rows: NDArray[Any]) -> None:
        """Put the rows [n, K] of some windows in their place."""
        self.file.write(Batch(batch.start * self.per_window, batch.stop * self.per_window), rows)


def gram_rows(file: StreamFile, rows: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """XᵀX of a file of ``rows`` rows: the number of a row of the matrix, and its rows [n, K] from there on.

    Products and sums are of float64: within rows · 2⁻⁵³ · Σ|xᵢ xⱼ|; then they are rounded to float32.
    """
    (channels,) = file.shape
    height = max(1, _BLOCK_BYTES // (8 * channels))
    count = max(1, _CHUNK_BYTES // (8 * channels))
    for start in range(0, channels, height):
        block = np.zeros((min(height, channels - start), channels))
        for first in range(0, rows, count):
            x = file.read(Batch(first, min(first + count, rows))).astype(np.float64)
            block += x[:, start : start + height].T @ x
        yield start, block.astype(np.float32)


def gram_memory(channels: int) -> int:
    """Bytes that :func:`gram_rows` takes: two blocks, and some rows twice."""
    return 2 * max(_BLOCK_BYTES, 8 * channels) + 2 * max(_CHUNK_BYTES, 8 * channels) + _MARGIN
