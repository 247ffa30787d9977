"""A safetensors file that several threads or processes fill in at once."""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .durable import settle
from .safetensors_file import DTYPES, TensorEntry, lay_out
from .state import check_left


@dataclass(frozen=True)
class PlacedTensors:
    """A file of full size. Every tensor has its place in it, and its bytes are zeros until it is written.

    Attributes:
        path: The file.
        entries: Where each tensor is.
    """

    path: Path
    entries: Mapping[str, TensorEntry]

    @staticmethod
    def create(path: Path, declared: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]]) -> PlacedTensors:
        """Write the header of a file of these tensors (name, type, shape), and give it its size.

        Raises:
            ValueError: a dtype that the format lacks, or a name declared twice.
        """
        header, entries = lay_out(path, declared)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(_size(header, entries))
        return PlacedTensors(path, entries)

    @staticmethod
    def open(path: Path, declared: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]]) -> PlacedTensors:
        """The file that :meth:`create` has made of these tensors, with what was written to it since.

        Raises:
            BismoothError: it is not there, or is another one.
            ValueError: as :meth:`create`.
        """
        header, entries = lay_out(path, declared)
        check_left(path, _size(header, entries), header)
        return PlacedTensors(path, entries)

    @contextmanager
    def writing(self, names: Collection[str]) -> Generator[TensorWriter]:
        """Write these tensors, all of them.

        Raises:
            ValueError: at the end, if bytes of one are missing.
        """
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            writer = TensorWriter(descriptor, {name: self.entries[name] for name in names})
            yield writer
            writer.require_all()
            settle(descriptor)
        finally:
            os.close(descriptor)


def _size(header: bytes, entries: Mapping[str, TensorEntry]) -> int:
    return len(header) + sum(entry.length for entry in entries.values())


class TensorWriter:
    """Writes some tensors of a file at their places, in any order."""

    def __init__(self, descriptor: int, entries: Mapping[str, TensorEntry]) -> None:
        self._descriptor = descriptor
        self._entries = entries
        self._written = dict.fromkeys(entries, 0)

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write a whole tensor.

        Raises:
            ValueError: it has another type or shape than declared.
        """
        entry = self._entries[name]
        if array.shape != entry.shape or array.dtype != DTYPES[entry.dtype]:
            raise ValueError(f"{name}: declared {entry.dtype} {entry.shape}, got {array.dtype} {array.shape}")
        self.write_pieces(name, [array])

    def write_pieces(self, name: str, pieces: Iterable[NDArray[Any]]) -> None:
        """Write a tensor from arrays that hold its elements, one after the other in row-major order.

        Raises:
            ValueError: one has another type than declared, or there are too many.
        """
        entry, start = self._entries[name], 0
        for piece in pieces:
            self._put(entry, start, piece)
            start += piece.nbytes

    def write_columns(self, name: str, first: int, columns: NDArray[Any]) -> None:
        """Write columns of a tensor [.., N], from number ``first`` on: [K, n] where K is all axes but the last.

        Raises:
            ValueError: they have another type than declared, or do not fit.
        """
        entry = self._entries[name]
        width, size = entry.shape[-1], columns.itemsize
        if len(columns) * width * size != entry.length or first + columns.shape[1] > width:
            got = f"{columns.dtype} {columns.shape} from column {first} on"
            raise ValueError(f"{name}: declared {entry.dtype} {entry.shape}, got {got}")
        if columns.shape[1] == width:
            self._put(entry, 0, columns)
            return
        self._require_type(entry, columns)
        for number, row in enumerate(columns.view(np.uint8)):
            self._put_bytes(entry, (number * width + first) * size, row.data)

    def _put(self, entry: TensorEntry, start: int, array: NDArray[Any]) -> None:
        self._require_type(entry, array)
        if start + array.nbytes > entry.length:
            raise ValueError(f"{entry.name}: declared {entry.length} bytes, got {start + array.nbytes}")
        self._put_bytes(entry, start, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def _put_bytes(self, entry: TensorEntry, start: int, rest: memoryview) -> None:
        place = entry.offset + start
        self._written[entry.name] += len(rest)
        while rest:
            count = os.pwrite(self._descriptor, rest, place)
            rest, place = rest[count:], place + count

    def _require_type(self, entry: TensorEntry, array: NDArray[Any]) -> None:
        if array.dtype != DTYPES[entry.dtype]:
            raise ValueError(f"{entry.name}: declared {entry.dtype}, got a piece of {array.dtype}")

    def require_all(self) -> None:
        """Raise ``ValueError`` if bytes are missing."""
        for name, count in self._written.items():
            if count != self._entries[name].length:
                raise ValueError(f"{name}: declared {self._entries[name].length} bytes, got {count}")
