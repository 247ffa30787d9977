"""Keep the kernels that TensorRT-RTX compiles where it runs, so that the next start need not compile them.

The file begins with the SHA-256 of the rest, since TensorRT-RTX checks what the kernels are for, but not that they are
whole. It is a cache: without it, or where it cannot be written, nothing but time is lost.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from ..export.errors import BismoothError
from ..export.replacing import replacing

_DIGEST_BYTES = hashlib.sha256().digest_size
_NAME = re.compile(r"\.?(.+)\.sm\d+\.kernels(\.tmp-[0-9a-f]{8})?")
"""Of such a file, also while it is being written."""


def kernels_path(engine: Path, capability: int) -> Path:
    """The file with an engine's kernels for a GPU of this compute capability: ``model.sm89.kernels``."""
    return engine.with_name(f"{engine.stem}.sm{capability}.kernels")


def is_kernels(path: PurePath, engine: PurePath) -> bool:
    """Whether ``path`` is such a file of this engine, for whatever GPU."""
    match = _NAME.fullmatch(path.name)
    return match is not None and match[1] == engine.stem and path.parent == engine.parent


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
