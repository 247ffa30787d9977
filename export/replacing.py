"""Put a finished file in place in one step; the one way in which this package writes files and folders that stay.

What is new is made beside its target under a hidden temporary name, flushed to disk, and renamed when it is complete:
whatever kills the process, the target is the old one, the new one, or absent, never half of one. While it is being
made, its process holds a lock on it; a temporary name without a lock is a leftover, which the next writer of the same
target removes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from glob import escape
from pathlib import Path

from .errors import BismoothError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A new empty file beside ``path`` that takes its place when the block ends without an error.

    A hard link at ``path`` is replaced; what it is a link of is not written to. A symbolic link stays, and what it
    points to is replaced. A pipe or a character device (``/dev/null``) is itself what the block gets to write to.
    Folders that lack are made.

    Raises:
        BismoothError: the file cannot be written, is a folder, a block device, a socket, or where the standard streams
            of this process go (``/dev/stdout`` in a file), or the disk is full; ``path`` is then as it was.
    """
    target, is_stream = _find(path)
    making = nullcontext(path) if is_stream else temporary(target, lambda name: name.touch(exist_ok=False))
    with making as file:
        try:
            yield file
            if not is_stream:
                flush(file)
                file.replace(target)
        except OSError as error:
            if error.errno in _FULL or error.filename in (None, str(file), file):
                raise cannot_write(path, error) from error
            raise  # another file, which the block reads


def put_in_place(source: Path, path: Path) -> None:
    """Let the finished file ``source``, on the same file system, take the place of ``path`` as :func:`replacing` does.

    Where the file system has links, it stays where it was as well: if the process is killed now, nothing is lost.

    Raises:
        BismoothError: as :func:`replacing`.
    """
    with replacing(path) as temporary:
        if temporary.is_file():
            temporary.unlink()
            link_or_move(source, temporary)
        else:
            with source.open("rb") as finished, temporary.open("wb") as stream:
                shutil.copyfileobj(finished, stream)


def link_or_move(source: Path, target: Path) -> None:
    """Give the file ``source`` the new name ``target`` too, or instead where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        source.replace(target)


def check_replaceable(path: Path, what: str, is_one: Callable[[Path], bool]) -> None:
    """Raise :class:`BismoothError` if there is a file that is not ``what`` is about to be written."""
    if path.is_file() and not is_one(path):
        raise BismoothError(
            f"{path}: exists and is not {what}, so it is not replaced. Choose another place with --output."
        )


def _find(path: Path) -> tuple[Path, bool]:
    """What ``path`` names, symbolic links followed; and whether it is a pipe or a character device."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return (path.resolve() if path.is_symlink() else path), False
    except OSError as error:
        raise cannot_write(path, error) from error
    if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
        return path, True
    reason = ""
    if not stat.S_ISREG(status.st_mode):
        reason = "Is a directory" if stat.S_ISDIR(status.st_mode) else "Neither a file nor a pipe"
    elif any(_is_open_as(descriptor, status) for descriptor in (1, 2)):
        reason = "The messages of this command go to that file"  # which are lost with it
    if reason:
        raise cannot_write(path, OSError(errno.EINVAL, reason))
    return (path.resolve() if path.is_symlink() else path), False


def _is_open_as(descriptor: int, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), status)
    except OSError:  # it is closed
        return False


@contextmanager
def scratch_folder(target: Path) -> Generator[Path]:
    """A temporary folder beside ``target``, deleted at the end: for files that are to be moved there.

    Raises:
        BismoothError: there is no writing there, or the disk is full.
    """
    with temporary(target, Path.mkdir) as folder:
        try:
            yield folder
        except OSError as error:
            if error.errno in _FULL:
                raise cannot_write(target, error) from error
            raise


@contextmanager
def temporary(target: Path, make: Callable[[Path], None]) -> Generator[Path]:
    """A locked hidden file or folder beside ``target``, removed at the end unless it was renamed.

    Args:
        target: what it is for; its folder is made.
        make: makes it, and fails if something has that name.

    Raises:
        BismoothError: it cannot be made.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        leftovers(target, remove=True)
        path, lock = _make_locked(target, make)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


def leftovers(target: Path, *, remove: bool = False) -> list[Path]:
    """What killed processes have left of :func:`temporary` beside ``target``.

    Args:
        target: what it was for.
        remove: delete it.
    """
    found: list[Path] = []
    for path in sorted(target.parent.glob(f".{escape(target.name)}.tmp-{'[0-9a-f]' * 8}")):
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            if try_lock(descriptor):
                found.append(path)
                if remove:
                    _remove(path)
            os.close(descriptor)
    return found


def flush(path: Path) -> None:
    """Write through to disk before a rename: a power failure must not keep the name and lose the bytes.

    Of a folder, the names in it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether a disk or a quota is exhausted."""
    return error.errno in _FULL


def cannot_write(target: Path, error: OSError) -> BismoothError:
    """What to tell users; temporary folders around ``target`` have the names that they are to get."""
    path = re.sub(r"\.([^/]+)\.tmp-[0-9a-f]{8}(?=/|$)", r"\1", str(target))
    if is_full(error):
        return BismoothError(f"{path}: the disk is full. Free some space and run the command again.")
    return BismoothError(f"{path}: cannot be written ({error.strerror or error}). Choose a place that can be written.")


def _make_locked(target: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A new file or folder, and an open descriptor that holds the lock on it."""
    while True:
        path = target.parent / f".{target.name}.tmp-{secrets.token_hex(4)}"
        make(path)
        with suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY)
            if try_lock(lock) and path.exists():
                return path, lock
            os.close(lock)
        # another process took it for a leftover before it was locked


def try_lock(descriptor: int) -> bool:
    """Take the lock on an open file until it is closed; False if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: two processes at once then have to use two targets
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
