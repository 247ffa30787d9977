"""Where the states of unfinished runs lie: a small file each in the user's cache folder, so that all can be listed.

What cannot be written or read there is left out: a run is not worth less for that.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from .errors import BismoothError
from .replacing import replacing


def register(folder: Path) -> None:
    """Remember that there is a state in ``folder``."""
    with suppress(OSError, RuntimeError, BismoothError), replacing(_entry(folder)) as file:
        file.write_text(json.dumps({"folder": str(folder)}) + "\n", "utf-8")


def unregister(folder: Path) -> None:
    """Forget it."""
    with suppress(OSError, RuntimeError):
        _entry(folder).unlink()


def registered() -> list[Path]:
    """The folders that are there, in order. Those that were deleted are forgotten."""
    found: list[Path] = []
    with suppress(OSError, RuntimeError):
        for entry in registry().glob("*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                folder = Path(json.loads(entry.read_text("utf-8"))["folder"])
                if folder.is_dir():
                    found.append(folder)
                elif folder.parent.is_dir():  # else it may lie on a disk that is not mounted
                    entry.unlink()
    return sorted(found)


def registry() -> Path:
    """``bismooth/states`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bismooth" / "states"


def _entry(folder: Path) -> Path:
    return registry() / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
