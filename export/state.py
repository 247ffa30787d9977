"""What an unfinished run towards a target has achieved: the same command goes on from there.

It lies in the folder ``.NAME.partial`` beside the target, so that finished files are linked or renamed into place:

``state.json``
    The stage, its fingerprint (:func:`.fingerprint.run_fingerprint`), and when the run began.
``journal.jsonl``
    A line per unit of work that is done: ``{"key": …, "value": …}``. The process that works on it holds a lock on it.
others
    Data files of the stage. What a line stands for was written through to disk before the line was.

NOTE: a folder without ``state.json`` holds nothing that counts. So that file is made last, and removed first.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias, cast

from .difference import difference
from .errors import BismoothError, UnfinishedRunError
from .replacing import cannot_write, flush, is_full, leftovers, replacing, try_lock
from .state_registry import register, unregister

STATE = "state.json"
JOURNAL = "journal.jsonl"
_PROGRESS = "progress"
Progress: TypeAlias = tuple[str, int, int]


class State:
    """An open state; see :func:`open_state`. Its methods may be called from any thread.

    Attributes:
        folder: where the stage keeps data files.
        resumed: number of units that an earlier run has left.
    """

    def __init__(self, folder: Path, journal: int) -> None:
        self.folder = folder
        self._journal = journal
        self._lock = Lock()
        self._units, self._notes = _read_journal(folder)
        self.resumed = len(self._units)

    @property
    def done(self) -> int:
        """Number of units that are done."""
        return len(self._units)

    def get(self, key: str) -> Any:
        """The value of a unit that is done, as JSON gives it back (lists for tuples); None if it is not done."""
        return self._units.get(key)

    def __contains__(self, key: str) -> bool:
        """Whether a unit is done."""
        return key in self._units

    def record(self, key: str, value: Any, progress: Progress | None = None) -> None:
        """A unit is done, and its data are on disk (``os.fsync``). When this returns, the line is on disk as well.

        Args:
            key: names the unit.
            value: what came out, as plain data.
            progress: how far the run is, for people: see :attr:`progress`.
        """
        self.record_all({key: value}, progress)

    def record_all(self, units: Mapping[str, Any], progress: Progress | None = None) -> None:
        """:meth:`record` several units at once: it takes as long as one."""
        notes = {} if progress is None else {_PROGRESS: progress}
        self._append([*({"key": k, "value": v} for k, v in units.items()), *_lines(notes)])
        self._units.update(units)
        self._notes.update(notes)

    @property
    def progress(self) -> Progress | None:
        """The step that the run is in, how many of its units are done, and how many there are; None if not said."""
        found = self._notes.get(_PROGRESS)
        return None if found is None else tuple(found)

    def noted(self, key: str) -> Any:
        """What :meth:`note` said last of ``key``, or None."""
        return self._notes.get(key)

    def note(self, key: str, value: Any) -> None:
        """Keep plain data that are no unit of work, in place of what was noted of ``key`` before."""
        self._append(_lines({key: value}))
        self._notes[key] = value

    def _append(self, entries: list[dict[str, Any]]) -> None:
        data = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        with self._lock:
            end = os.fstat(self._journal).st_size
            try:
                while data:
                    data = data[os.write(self._journal, data) :]
                os.fsync(self._journal)
            except OSError:
                os.ftruncate(self._journal, end)  # nothing may follow half a line
                raise


def _lines(notes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"note": key, "value": value} for key, value in notes.items()]


def state_folder(target: Path) -> Path:
    """Where the state of a run towards ``target`` lies."""
    return target.parent / f".{target.name}.partial"


def target_of(folder: Path) -> Path:
    """Inverse of :func:`state_folder`."""
    return folder.parent / folder.name.removeprefix(".").removesuffix(".partial")


@contextmanager
def open_state(target: Path, stage: str, fingerprint: Mapping[str, Any], *, restart: bool = False) -> Generator[State]:
    """The state of an unfinished run towards ``target``: what an earlier run has left, or an empty one.

    It is removed when the block ends without an error. If an error, Ctrl-C or a kill ends it and any unit is done, it
    stays, and a note on the exception says so, unless that is an :class:`UnfinishedRunError`.

    Args:
        target: the file or folder that the run makes; where it is a symbolic link, what that points to.
        stage: what is run.
        fingerprint: plain data, all that decides the result. Everything else about the units must follow from it.
        restart: discard what an earlier run has left.

    Raises:
        BismoothError: what is there was made of other things than ``fingerprint`` says, or by another stage; it is
            damaged; a running process works on it; there is no writing there; the disk is full.
    """
    target = target.resolve()
    folder = state_folder(target)
    try:
        journal = _lock_new(folder)
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()  # if it is new
        raise cannot_write(target, error) from error
    try:
        _prepare(folder, journal, json.loads(json.dumps({"stage": stage, **fingerprint})), restart=restart)
        register(folder)
        state = State(folder, journal)
        with _kept(state, target):
            yield state
        _remove(folder)
    finally:
        os.close(journal)


@contextmanager
def _kept(state: State, target: Path) -> Generator[None]:
    """Say, on an exception, that what is done is kept; nothing is kept of a run that has done nothing."""
    try:
        yield
    except BaseException as error:
        shown = cannot_write(target, error) if isinstance(error, OSError) and is_full(error) else error
        if not state.done:
            _remove(state.folder)
        elif not isinstance(error, UnfinishedRunError):
            kept = f"What was done is kept in {state.folder} (units of work: {state.done})"
            shown.add_note(f"{kept}: the same command goes on from there.")
        if shown is error:
            raise
        raise shown from error


def read_state(folder: Path) -> dict[str, Any]:
    """What ``state.json`` says: when the run ``began`` (seconds since 1970), and its ``fingerprint`` with ``stage``.

    Raises:
        BismoothError: it is missing or damaged.
    """
    try:
        document = cast(dict[str, Any], json.loads((folder / STATE).read_text("utf-8")))
        if type(document["fingerprint"]["stage"]) is not str or type(document["began"]) is not float:
            raise TypeError("it has values of other types than expected")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{STATE} cannot be read ({error})") from error
    return document


def read_units(folder: Path) -> tuple[dict[str, Any], Progress | None]:
    """The units that the journal lists, with their values, and :attr:`State.progress`.

    Raises:
        BismoothError: it is damaged.
    """
    units, notes = _read_journal(folder)
    return units, tuple(notes[_PROGRESS]) if _PROGRESS in notes else None


def is_running(folder: Path) -> bool:
    """Whether a process works on it now."""
    try:
        os.close(_lock(folder, os.O_RDWR))
    except BismoothError:
        return True
    except FileNotFoundError:
        pass
    return False


def check_left(path: Path, size: int, start: bytes = b"") -> None:
    """Raise :class:`UnfinishedRunError` unless an unfinished run's data file is there, of that size and beginning."""
    if path.is_file() and path.stat().st_size == size:
        with path.open("rb") as file:
            if file.read(len(start)) == start:
                return
    raise UnfinishedRunError(
        f"{path}: is not what an unfinished run has left there. Expected a file of {size} bytes with that run's data. "
        "Pass --restart to discard that run."
    )


def clear_state(folder: Path) -> None:
    """Delete a state, and what killed runs have left in temporary folders.

    Raises:
        BismoothError: a running process works on it.
    """
    journal = _lock_new(folder)
    leftovers(target_of(folder), remove=True)
    _remove(folder)
    os.close(journal)


def _remove(folder: Path) -> None:
    """Delete a state whose lock this process holds; what cannot be deleted counts no more."""
    with suppress(OSError):
        (folder / STATE).unlink()
    shutil.rmtree(folder, ignore_errors=True)
    unregister(folder)


def _lock_new(folder: Path) -> int:
    """An open descriptor of the journal that holds the lock on the state; both are made if they are not there."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the run that held the lock has removed it
            return _lock(folder, os.O_RDWR | os.O_APPEND | os.O_CREAT)


def _lock(folder: Path, flags: int) -> int:
    path = folder / JOURNAL
    descriptor = os.open(path, flags, 0o666)
    try:
        if not try_lock(descriptor):
            raise BismoothError(
                f"{folder}: a running process works on it. Wait until it ends, or choose another output."
            )
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FileNotFoundError(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _prepare(folder: Path, journal: int, wanted: dict[str, Any], *, restart: bool) -> None:
    """Leave what an earlier run towards the same result has done, or an empty state."""
    if (folder / STATE).exists() and not restart and _read_journal(folder)[0]:
        made_of = read_state(folder)["fingerprint"]
        if differs := difference("stage", made_of["stage"], wanted["stage"]) or difference("", made_of, wanted):
            raise BismoothError(
                f"{folder}: an unfinished run is there, which would come out differently: {differs}. Expected the same "
                "input, options and code. Choose another output, or pass --restart to discard that run."
            )
        os.ftruncate(journal, (folder / JOURNAL).read_bytes().rfind(b"\n") + 1)  # without a line that was cut off
        return
    (folder / STATE).unlink(missing_ok=True)
    os.ftruncate(journal, 0)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()
    try:
        with replacing(folder / STATE) as file:
            document = {"began": time.time(), "fingerprint": wanted}
            file.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
        flush(folder)
    except BaseException:
        _remove(folder)
        raise


def _read_journal(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Units and notes. A last line that was cut off is left out."""
    units, notes = dict[str, Any](), dict[str, Any]()
    for number, line in enumerate((folder / JOURNAL).read_bytes().split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            if "key" in entry:
                units[entry["key"]] = entry["value"]
            else:
                notes[entry["note"]] = entry["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, f"line {number} of {JOURNAL} cannot be read ({error})") from error
    return units, notes


def _damaged(folder: Path, detail: str) -> BismoothError:
    return BismoothError(
        f"{folder}: what an unfinished run has left is damaged: {detail}. Pass --restart to discard it, or delete the "
        "folder."
    )
