"""Write a file under a temporary name and put it in place in one step."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..export.errors import BismoothError


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """The name of a temporary file beside ``path`` that takes its place when the block ends without an error.

    What a killed process left there is removed.

    Raises:
        BismoothError: the folder cannot be written, or the disk is full; ``path`` is then as it was.
    """
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{path.name}.tmp-*"):
            leftover.unlink(missing_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        advice = (
            "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Choose a folder that can be written"
        )
        raise BismoothError(
            f"{path}: cannot be written ({error.strerror}). {advice} and run the command again."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
