"""Keep the kernels that TensorRT-RTX compiles where it runs, so that the next start need not compile them.

The file begins with the SHA-256 of the rest, since TensorRT-RTX checks what the kernels are for, but not that they are
whole. It is a cache: without it, or where it cannot be written, nothing but time is lost.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from ..export.replacing import replacing

_DIGEST_BYTES = hashlib.sha256().digest_size


def kernels_path(engine: Path, capability: int) -> Path:
    """The file with an engine's kernels for a GPU of this compute capability: ``model.sm89.kernels``."""
    return engine.with_name(f"{engine.stem}.sm{capability}.kernels")


def load_kernels(cache: Any, path: Path) -> None:
    """Fill the ``IRuntimeCache`` from a file; one that is missing, damaged or of another environment is ignored."""
    content = _read(path)
    digest, kernels = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(kernels).digest() == digest:
        cache.deserialize(kernels)


def save_kernels(cache: Any, path: Path) -> None:
    """Write the ``IRuntimeCache`` to a file, in one step, unless the file has it already or cannot be written."""
    kernels = cache.serialize()
    if kernels is None:
        return
    content = hashlib.sha256(kernels).digest() + bytes(kernels)
    if content != _read(path):
        with suppress(BismoothError), replacing(path) as file:
            file.write_bytes(content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
