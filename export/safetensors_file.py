"""Reading and writing safetensors files without holding their tensors.

Layout of the format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the raw
little-endian row-major bytes, without holes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .errors import BismoothError

#: safetensors dtype name → numpy dtype
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``offset`` and ``length`` in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in file order, after checking that the header describes the file.

    Raises:
        BismoothError: the file is truncated, its header is not JSON, a dtype is unknown, a shape disagrees with its bytes, or tensors
            overlap or leave holes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _broken(path, f"its header claims {length} bytes and the file has {size}")
        raw = file.read(length)
    try:
        header = cast(dict[str, Any], json.loads(raw))
        header.pop("__metadata__", None)
        entries = [_entry(name, value, 8 + length) for name, value in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, f"its header cannot be read ({error})") from error
    entries.sort(key=lambda entry: (entry.offset, entry.length))
    end = 8 + length
    for entry in entries:
        expected = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if entry.length != expected:
            raise _broken(
                path, f"tensor {entry.name} has {entry.length} bytes, its shape {list(entry.shape)} needs {expected}"
            )
        if entry.offset != end:
            raise _broken(path, f"tensor {entry.name} starts at byte {entry.offset}, the one before it ends at {end}")
        end = entry.offset + entry.length
    if end != size:
        raise _broken(path, f"its tensors end at byte {end} and the file has {size} bytes")
    return {entry.name: entry for entry in entries}


def _entry(name: str, value: dict[str, Any], base: int) -> TensorEntry:
    dtype = str(value["dtype"])
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {dtype}, which is none of {', '.join(DTYPES)}")
    begin, end = (int(offset) for offset in value["data_offsets"])
    shape = tuple(int(size) for size in value["shape"])
    if min(shape, default=0) < 0 or not 0 <= begin <= end:
        raise ValueError(f"tensor {name} has negative sizes")
    return TensorEntry(name, dtype, shape, base + begin, end - begin)


def _broken(path: Path, what: str) -> BismoothError:
    return BismoothError(f"{path}: not a valid safetensors file: {what}. Download or write the file again.")


def read_tensor(path: Path, entry: TensorEntry) -> NDArray[Any]:
    """One tensor, read from disk: shape ``entry.shape``, numpy dtype of ``entry.dtype``."""
    data = np.fromfile(path, dtype=DTYPES[entry.dtype], count=math.prod(entry.shape), offset=entry.offset)
    if data.size != math.prod(entry.shape):
        raise BismoothError(
            f"{path}: tensor {entry.name} is cut off at byte {path.stat().st_size}. Get the whole file."
        )
    return data.reshape(entry.shape)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a numpy dtype."""
    return _NAMES[dtype]


class SafetensorsWriter:
    """Writes a safetensors file one tensor at a time; names, dtypes and shapes are declared first.

    Tensors start at multiples of 64 bytes as long as their sizes allow it (sizes are not padded: the format permits no holes), so
    declare big ones first. Used as a context manager; the file is complete only if every declared tensor was written.
    """

    def __init__(self, path: Path, declared: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]]) -> None:
        self.path = path
        self.entries: dict[str, TensorEntry] = {}
        header: dict[str, Any] = {}
        end = 0
        for name, dtype, shape in declared:
            length = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + length]}
            end += length
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(len(raw) + 8) % _ALIGNMENT)
        base = 8 + len(raw)
        for name, value in header.items():
            self.entries[name] = _entry(name, value, base)
        self._pending = set(self.entries)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write one declared tensor; any order."""
        entry = self.entries[name]
        if array.shape != entry.shape or array.dtype != DTYPES[entry.dtype]:
            raise ValueError(f"{name}: declared {entry.dtype} {entry.shape}, got {array.dtype} {array.shape}")
        self._file.seek(entry.offset)
        self._file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        self._pending.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self._pending:
            raise ValueError(
                f"{self.path}: {len(self._pending)} declared tensors were not written: {sorted(self._pending)[:3]}"
            )
