"""Write a statistics file while the model runs: rows go to disk as they come, so memory does not grow with them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..export.safetensors_file import lay_out
from ..export.state import check_left
from .histogram import BINS
from .observe import OUTLIERS
from .statistics import FORMAT, ROW_NUMBERS, VERSION, Provenance


class StatisticsWriter:
    """An open statistics file, laid out in full: each tensor may be written at any time, rows a few at a time.

    Args:
        file: open to read and write.
        provenance: of the statistics.
        channels: of each value.
        row_numbers: int64 [R], of the sampled rows.
        histograms: whether there are any.
        grams: likewise.
        continued: whether an earlier run has laid the file out, whose data stay.

    Raises:
        BismoothError: the file is not as that run has left it.
        OSError: the disk has no space for it.
    """

    def __init__(
        self,
        file: BinaryIO,
        provenance: Provenance,
        channels: Mapping[str, int],
        row_numbers: NDArray[np.int64],
        *,
        histograms: bool,
        grams: bool = False,
        continued: bool = False,
    ) -> None:
        layout = _layout(channels, len(row_numbers), histograms=histograms, grams=grams)
        metadata = {"format": FORMAT, "version": VERSION, **_strings(provenance)}
        header, self._entries = lay_out(Path(file.name), layout, metadata)
        self._file = file
        self.grams = grams
        size = len(header) + sum(entry.length for entry in self._entries.values())
        if continued:
            check_left(Path(file.name), size, header)
            return
        file.write(header)
        file.truncate(size)
        os.posix_fallocate(file.fileno(), 0, size)
        self._put(ROW_NUMBERS, row_numbers)

    def rows(self, name: str, start: int, rows: NDArray[np.float32]) -> None:
        """Rows [r, K] of a value, to be numbers ``start`` … ``start + r - 1`` of its sample."""
        self._put(f"{name}/rows", rows, start * rows.shape[1])

    def absmax(self, name: str, absmax: NDArray[np.float32]) -> None:
        """The largest magnitude per channel [K] of a value."""
        self._put(f"{name}/absmax", absmax)

    def outliers(self, name: str, outliers: NDArray[np.float32]) -> None:
        """The rows with the largest magnitudes [16, K] of a value, largest first."""
        self._put(f"{name}/outliers", outliers)

    def histogram(self, name: str, counts: NDArray[np.int64]) -> None:
        """Counts of magnitudes, as :class:`.histogram.Histogram` has them."""
        self._put(f"{name}/histogram", counts)

    def gram(self, name: str, start: int, rows: NDArray[np.float32]) -> None:
        """Rows ``start`` … of XᵀX of a value."""
        self._put(f"{name}/gram", rows, start * rows.shape[1])

    def flush(self) -> None:
        """Let all that was written be on disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _put(self, key: str, array: NDArray[Any], skip: int = 0) -> None:
        """Write elements of a tensor, behind so many others of it."""
        self._file.seek(self._entries[key].offset + skip * array.itemsize)
        self._file.write(np.ascontiguousarray(array).tobytes())


def _layout(
    channels: Mapping[str, int], rows: int, *, histograms: bool, grams: bool
) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    yield ROW_NUMBERS, np.dtype(np.int64), (rows,)
    for name in channels if histograms else ():
        yield f"{name}/histogram", np.dtype(np.int64), (BINS,)
    for name, count in channels.items():
        yield f"{name}/absmax", np.dtype(np.float32), (count,)
    for name, count in channels.items():
        yield f"{name}/outliers", np.dtype(np.float32), (OUTLIERS, count)
    for name, count in channels.items():
        yield f"{name}/rows", np.dtype(np.float32), (rows, count)
    for name, count in channels.items() if grams else ():
        yield f"{name}/gram", np.dtype(np.float32), (count, count)


def _strings(provenance: Provenance) -> dict[str, str]:
    return {name: str(value) for name, value in asdict(provenance).items()}
