"""Put a finished folder in place in one step, as :mod:`.replacing` does with files."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import BismoothError
from .replacing import cannot_write, flush, is_full, temporary


@contextmanager
def new_folder(target: Path, what: str, *, force: bool = False, replaceable: Callable[[Path], bool]) -> Generator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends without an error.

    Args:
        target: the folder to make; where it is a symbolic link, the folder that it points to.
        what: what ``force`` replaces, for the message.
        force: replace ``target`` if it exists and is not empty.
        replaceable: whether ``force`` may replace this existing folder.

    Raises:
        BismoothError: ``target`` exists and may not be replaced, the parent cannot be written, or the disk is full.
    """
    target = target.resolve()
    recover(target)
    _check_free(target, what, force, replaceable)
    with temporary(target, Path.mkdir) as folder:
        try:
            if target.exists():
                shutil.rmtree(_previous(target), ignore_errors=True)
            yield folder
            _flush(folder)
            _check_free(target, what, force, replaceable)
            _put_in_place(folder, target)
        except OSError as error:
            if is_full(error):
                raise cannot_write(target, error) from error
            raise


def recover(target: Path) -> None:
    """Undo a replacement of ``target`` that was cut off between its two renames."""
    previous = _previous(target)
    if previous.is_dir() and not target.exists():
        with suppress(OSError):
            previous.rename(target)


def _check_free(target: Path, what: str, force: bool, replaceable: Callable[[Path], bool]) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise BismoothError(f"{target}: already exists. Choose another output folder, or pass --force to replace it.")
    if not target.is_dir() or not replaceable(target):
        raise BismoothError(
            f"{target}: exists and is not {what}, so --force does not replace it. Choose another output folder."
        )


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:
            flush(path)


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
