"""Read parts of a matrix in a file: block by block, while the system reads what comes next, or rows or columns."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import BismoothError

WINDOW = 32 << 20
"""Bytes that the system is asked to read ahead, at least: what a fast disk delivers while a block is worked on."""

Bytes = NDArray[np.uint8]


def read_blocks(path: Path, offset: int, size: int, step: int) -> Iterator[Bytes]:
    """``size`` bytes of a file from byte ``offset`` on, ``step`` at a time; each overwrites the one before.

    Raises:
        BismoothError: the file ends before that.
    """
    asked, room = 0, np.empty(min(step, size), np.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        for start in range(0, size, step):
            while asked < min(size, start + step + WINDOW):
                _will_need(file, offset + asked, min(WINDOW, size - asked))
                asked += WINDOW
            block = room[: size - start]
            _fill(file, block, path)
            yield block


def read_rows(path: Path, offset: int, width: int, rows: NDArray[np.intp]) -> Bytes:
    """Some rows, of ``width`` bytes each, of a matrix that starts at byte ``offset`` of a file: [rows, width].

    Raises:
        BismoothError: the file ends before the last of them does.
    """
    block = np.empty((len(rows), width), np.uint8)
    with path.open("rb", buffering=0) as file:
        for number, row in zip(rows.tolist(), block, strict=True):
            file.seek(offset + number * width)
            _fill(file, row, path)
    return block


def read_columns(path: Path, offset: int, shape: tuple[int, int], columns: slice) -> Bytes:
    """Some columns of a row-major matrix of bytes that starts at byte ``offset`` of a file: [rows, columns].

    Raises:
        BismoothError: the file ends before the matrix does.
    """
    rows, width = shape
    block = np.empty((rows, columns.stop - columns.start), np.uint8)
    with path.open("rb", buffering=0) as file:
        for number, row in enumerate(block):
            file.seek(offset + number * width + columns.start)
            _fill(file, row, path)
    return block


def _fill(file: FileIO, block: Bytes, path: Path) -> None:
    rest = block.data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise BismoothError(f"{path}: is cut off at byte {file.tell()}. Get the whole file.")
        rest = rest[count:]


def _will_need(file: FileIO, offset: int, size: int) -> None:
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
