"""Write a statistics file while the model runs: rows go to disk as they come, so memory does not grow with them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..export.safetensors_file import dtype_name
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
        self._file = file
        self.grams = grams
        self._channels = dict(channels)
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": VERSION, **_strings(provenance)}}
        end = 0
        for name, dtype, shape in layout:
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [end, end + size]}
            self._offsets[name] = end
            end += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        raw = len(raw).to_bytes(8, "little") + raw
        self._base = len(raw)
        if continued:
            check_left(Path(file.name), self._base + end, raw)
            return
        file.write(raw)
        file.truncate(self._base + end)
        os.posix_fallocate(file.fileno(), 0, self._base + end)
        self._put(ROW_NUMBERS, row_numbers)

    def rows(self, name: str, start: int, rows: NDArray[np.float32]) -> None:
        """Rows [r, K] of a value, to be numbers ``start`` … ``start + r - 1`` of its sample."""
        self._put(f"{name}/rows", rows, 4 * start * self._channels[name])

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
        self._put(f"{name}/gram", rows, 4 * start * self._channels[name])

    def flush(self) -> None:
        """Let all that was written be on disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _put(self, key: str, array: NDArray[Any], skip: int = 0) -> None:
        self._file.seek(self._base + self._offsets[key] + skip)
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
