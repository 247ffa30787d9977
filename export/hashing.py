"""SHA-256 of files and arrays, in hex."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


def file_sha256(path: Path) -> str:
    """Of a file's content, which is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def hashing(paths: Mapping[str, Path]) -> Generator[Callable[[], dict[str, str]]]:
    """:func:`file_sha256` of files by name, on a thread of its own while the block runs; a call waits for the rest."""
    with ThreadPoolExecutor(1) as pool:
        futures = {name: pool.submit(file_sha256, path) for name, path in paths.items()}
        try:
            yield lambda: {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def array_sha256(array: NDArray[Any]) -> str:
    """Of an array's type, shape, and values in little-endian bytes, row by row."""
    import numpy as np

    values = np.ascontiguousarray(array)
    values = values.astype(values.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{values.dtype.name} {' '.join(map(str, array.shape))} ".encode())
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
