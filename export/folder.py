"""Put a finished folder in place in one step.

A folder is made beside its target under a hidden temporary name, and renamed when it is complete: whatever kills the
process, the target is the old folder, the new one, or absent, never half of one. While it is being made, its process
holds a lock on it; a temporary folder without a lock is a leftover, which the next writer of the same target removes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from .errors import BismoothError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def new_folder(target: Path, *, force: bool = False, replaceable: Callable[[Path], bool]) -> Generator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends without an error.

    Args:
        target: the folder to make; where it is a symbolic link, the folder that it points to.
        force: replace ``target`` if it exists and is not empty.
        replaceable: whether ``force`` may replace this existing folder.

    Raises:
        BismoothError: ``target`` exists and may not be replaced, the parent cannot be written, or the disk is full.
    """
    target = target.resolve()
    recover(target)
    _check_free(target, force, replaceable)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary, lock = _make_temporary(target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield temporary
        _flush(temporary)
        _check_free(target, force, replaceable)
        _put_in_place(temporary, target)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _cannot_write(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _cannot_write(target: Path, error: OSError) -> BismoothError:
    if error.errno in _FULL:
        return BismoothError(
            f"{target.parent}: the disk is full. Free some space and run the command again; nothing was changed."
        )
    return BismoothError(
        f"{target.parent}: cannot write there ({error.strerror}). Choose a folder that can be written."
    )


def recover(target: Path) -> None:
    """Undo a replacement of ``target`` that was cut off between its two renames."""
    previous = _previous(target)
    if previous.is_dir() and not target.exists():
        with suppress(OSError):
            previous.rename(target)


def _check_free(target: Path, force: bool, replaceable: Callable[[Path], bool]) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise BismoothError(f"{target}: already exists. Choose another output folder, or pass --force to replace it.")
    if not target.is_dir() or not replaceable(target):
        raise BismoothError(
            f"{target}: exists and is not a bismooth artifact, so --force does not replace it. "
            "Choose another output folder."
        )


def _make_temporary(target: Path) -> tuple[Path, int]:
    """A new folder, and an open descriptor that holds the lock on it."""
    while True:
        path = target.parent / f".{target.name}.tmp-{secrets.token_hex(4)}"
        path.mkdir()
        with suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY)
            if _try_lock(lock) and path.is_dir():
                return path, lock
            os.close(lock)
        # another process took it for a leftover before it was locked


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: two processes at once then have to use two targets
        pass
    return True


def _remove_leftovers(target: Path) -> None:
    """Delete the temporary folders that no process holds, and the previous version after a complete replacement."""
    for path in target.parent.glob(f".{escape(target.name)}.tmp-{'[0-9a-f]' * 8}"):
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            if _try_lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)
    if target.exists():
        shutil.rmtree(_previous(target), ignore_errors=True)


def _flush(folder: Path) -> None:
    """Write through to disk before the rename: a power failure must not keep the name and lose the bytes."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        previous = _previous(target)
        target.rename(previous)  # a crash after this line is undone by recover
        try:
            temporary.rename(target)
        except OSError:
            previous.rename(target)
            raise
        shutil.rmtree(previous, ignore_errors=True)


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux ``renameat2`` with ``RENAME_EXCHANGE``); false where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0
