"""What decides the result of a run, as plain data: an unfinished run is continued only if nothing of it has changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .versions import tool_versions


def run_fingerprint(files: Mapping[str, Path], **options: Any) -> dict[str, Any]:
    """What a run depends on. No weight is read: contents are hashed while the run reads them.

    Args:
        files: what is read, by names that messages may use.
        options: what else decides the result, as plain data: a recipe, a hash of the text, sizes.

    Returns:
        ``options``; ``files``, size and time of each; ``tools``, the versions; ``machine``, see
        :func:`.machine.kind_of_cpu`; and ``code``, see :func:`code_sha256`.
    """
    from .machine import kind_of_cpu

    return {
        **options,
        "files": {name: _state(path) for name, path in sorted(files.items())},
        "tools": tool_versions(),
        "machine": kind_of_cpu(),
        "code": code_sha256(),
    }


def _state(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


@cache
def code_sha256() -> str:
    """SHA-256 over this package's Python files: versions alone do not tell a changed working copy from itself."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    folders = os.walk(package, followlinks=True)  # in a working copy, the subpackages are links
    files = (Path(parent, name) for parent, _, names in folders for name in names if name.endswith(".py"))
    for path in sorted(files):
        digest.update(f"{path.relative_to(package).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
