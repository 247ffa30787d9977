"""Reading and writing safetensors files without holding their tensors.

Layout of the format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then
the raw little-endian row-major bytes, without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .errors import BismoothError
from .replacing import replacing

#: safetensors dtype name → numpy dtype
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``offset`` and ``length`` in bytes, the offset from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in file order, after checking that the header describes the file.

    Raises:
        BismoothError: the file is truncated, its header is not JSON or names a tensor twice, a dtype is unknown, a
            shape disagrees with its bytes, or tensors overlap or leave holes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _broken(path, f"its header claims {length} bytes and the file has {size}")
        raw = file.read(length)
    try:
        header = cast(dict[str, Any], json.loads(raw, object_pairs_hook=_object))
        header.pop("__metadata__", None)
        entries = [_entry(name, value, 8 + length) for name, value in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(path, f"its header cannot be read ({error})") from error
    _check_layout(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands there twice")
    return result


def _entry(name: str, value: dict[str, Any], base: int) -> TensorEntry:
    dtype = value["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {dtype}, which is none of {', '.join(DTYPES)}")
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or begin > end:
        raise ValueError(f"tensor {name} has sizes that are no counts: {list(shape)}, {begin} to {end}")
    return TensorEntry(name, dtype, shape, base + begin, end - begin)


def _check_layout(path: Path, entries: list[TensorEntry], end: int, size: int) -> None:
    """Sort the entries by place, and check that they fill the file from byte ``end`` to byte ``size``."""
    entries.sort(key=lambda entry: (entry.offset, entry.length))
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


def _broken(path: Path, what: str) -> BismoothError:
    return BismoothError(f"{path}: not a valid safetensors file: {what}. Download or write the file again.")


def read_tensor(path: Path, entry: TensorEntry) -> NDArray[Any]:
    """One tensor, read from disk: shape ``entry.shape``, numpy dtype of ``entry.dtype``.

    Raises:
        BismoothError: the file ends before the tensor does.
    """
    data = np.fromfile(path, dtype=DTYPES[entry.dtype], count=math.prod(entry.shape), offset=entry.offset)
    if data.size != math.prod(entry.shape):
        raise BismoothError(
            f"{path}: tensor {entry.name} is cut off at byte {path.stat().st_size}. Get the whole file."
        )
    return data.reshape(entry.shape)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a numpy dtype; raises ``ValueError`` if the format does not have it."""
    if dtype not in _NAMES:
        raise ValueError(f"safetensors files have no dtype {dtype}")
    return _NAMES[dtype]


def lay_out(
    path: Path,
    declared: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The bytes that a file of these tensors starts with, and where each tensor is, one right behind the other.

    Raises:
        ValueError: a dtype that the format lacks, or a name declared twice; ``path`` is for messages.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in declared:
        if name in header:
            raise ValueError(f"{path}: tensor {name} is declared twice")
        length = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [end, end + length]}
        end += length
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % _ALIGNMENT)
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value, 8 + len(raw)) for name, value in header.items()}
    return len(raw).to_bytes(8, "little") + raw, entries


class SafetensorsWriter:
    """Writes a safetensors file one tensor at a time; names, dtypes and shapes are declared first.

    The first tensor starts at a multiple of 64 bytes, and so does every later one whose predecessors' sizes are
    multiples of 64 (the format permits no padding between tensors). Used as a context manager: the file is written
    under a temporary name and appears, complete, when the block ends without an error.

    Raises:
        ValueError: a dtype that the format lacks, a name declared twice, a tensor that is not the one that was
            declared, or (at the end) a declared tensor that was not written.
    """

    def __init__(
        self,
        path: Path,
        declared: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._header, self.entries = lay_out(path, declared, metadata)
        self._pending = set(self.entries)
        self._exit = ExitStack()

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write one declared tensor; any order."""
        entry = self.entries[name]
        if array.shape != entry.shape or array.dtype != DTYPES[entry.dtype]:
            raise ValueError(f"{name}: declared {entry.dtype} {entry.shape}, got {array.dtype} {array.shape}")
        self.write_pieces(name, [array])

    def write_pieces(self, name: str, pieces: Iterable[NDArray[Any]]) -> None:
        """Write one declared tensor from arrays that hold its elements, one after the other in row-major order."""
        entry = self.entries[name]
        self._file.seek(entry.offset)
        length = 0
        for piece in pieces:
            if piece.dtype != DTYPES[entry.dtype]:
                raise ValueError(f"{name}: declared {entry.dtype}, got a piece of {piece.dtype}")
            length += self._file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        if length != entry.length:
            raise ValueError(f"{name}: declared {entry.length} bytes, got pieces of {length}")
        self._pending.discard(name)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path))
            self._file = stack.enter_context(temporary.open("wb"))
            self._file.write(self._header)
            stack.push(self._require_all)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    def _require_all(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is None and self._pending:
            names = ", ".join(sorted(self._pending)[:3])
            raise ValueError(f"{self.path}: {len(self._pending)} declared tensors were not written: {names}")
