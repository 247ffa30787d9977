"""What unfinished runs have left: shown, and cleared."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from ..export.errors import BismoothError
from ..export.replacing import leftovers
from ..export.state import JOURNAL, clear_state, is_running, read_state, read_units, state_folder, target_of
from ..export.state_registry import registered
from . import console

_AGES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


@dataclass(frozen=True)
class Unfinished:
    """An unfinished run.

    Attributes:
        target: what it makes.
        stage: what is run; None if its record is damaged.
        progress: how far it is, in words.
        size_bytes: what it takes on disk. Of temporary folders that it has left, the files with one name alone: others
            are, most likely, links of files that stay.
        age_seconds: since it last got on.
        running: whether a process works on it now.
    """

    target: str
    stage: str | None
    progress: str
    size_bytes: int
    age_seconds: float
    running: bool

    def brief(self) -> dict[str, Any]:
        """With the age in words."""
        row = asdict(self)
        name, length = next(unit for unit in _AGES if unit[1] <= max(self.age_seconds, 1))
        return row | {"age": f"{row.pop('age_seconds') // length:.0f} {name}", "running": row.pop("running")}


@dataclass(frozen=True)
class CacheResult:
    """The unfinished runs that there are, and those that were cleared."""

    unfinished: tuple[Unfinished, ...]
    cleared: tuple[Unfinished, ...]

    def to_json(self) -> Mapping[str, Any]:
        """Plain data."""
        return self._document(asdict)

    def brief(self) -> Mapping[str, Any]:
        """The same, for people."""
        document = self._document(Unfinished.brief)
        return document if self.cleared else {key: document[key] for key in ("unfinished_bytes", "unfinished")}

    def _document(self, row: Any) -> Mapping[str, Any]:
        return {
            "unfinished_bytes": sum(run.size_bytes for run in self.unfinished),
            "cleared_bytes": sum(run.size_bytes for run in self.cleared),
            "unfinished": [row(run) for run in self.unfinished],
            "cleared": [row(run) for run in self.cleared],
        }


def cache(paths: Sequence[Path] = (), *, clear: bool = False) -> CacheResult:
    """List unfinished runs, or discard them.

    Args:
        paths: their targets or folders; by default all that this user has begun on this machine.
        clear: delete what they have left; without ``paths``, of those alone that no process works on. The others are
            noted on stderr.

    Raises:
        BismoothError: there is none at a path, or a running process works on it.
    """
    folders = dict.fromkeys([_find(path) for path in paths] or registered())
    found = {folder: _look_at(folder) for folder in folders}
    cleared = [folder for folder, run in found.items() if clear and (paths or not run.running)]
    for folder in cleared:
        clear_state(folder)
    for run in found.values():
        if clear and not paths and run.running:
            console.note(f"{run.target}: a running process works on it, so it is left alone")
    return CacheResult(
        tuple(run for folder, run in found.items() if folder not in cleared),
        tuple(found[folder] for folder in cleared),
    )


def _find(path: Path) -> Path:
    path = path.resolve()
    for folder in (path, state_folder(path)):
        if folder == state_folder(target_of(folder)) and (folder / JOURNAL).is_file():
            return folder
    raise BismoothError(
        f"{path}: there is no unfinished run. Expected its output, or the folder that it has left. 'bismooth cache' "
        "lists them."
    )


def _look_at(folder: Path) -> Unfinished:
    try:
        stage, (units, step) = read_state(folder)["fingerprint"]["stage"], read_units(folder)
        progress = f"{len(units)} units" if step is None else f"{step[0]}: {step[1]} of {step[2]}"
    except (BismoothError, OSError):
        stage, progress = None, "damaged"
    target, running, files = target_of(folder), is_running(folder), _statuses(folder.rglob("*"))
    temporary = [] if running else leftovers(target)
    left = _statuses(path for root in temporary for path in (root, *root.rglob("*")))
    counted = [*files, *(status for status in left if S_ISREG(status.st_mode) and status.st_nlink == 1)]
    return Unfinished(
        target=str(target),
        stage=stage,
        progress=progress,
        size_bytes=sum(512 * status.st_blocks for status in counted),
        age_seconds=max(0.0, time.time() - max((status.st_mtime for status in files), default=0)),
        running=running,
    )


def _statuses(paths: Iterable[Path]) -> list[os.stat_result]:
    found: list[os.stat_result] = []
    for path in paths:
        with suppress(FileNotFoundError):  # a process works on it
            found.append(path.stat())
    return found
