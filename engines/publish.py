"""Put a finished engine and its audit in place."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from .audit import Audit
from .base import EngineRecord, audit_path


@contextmanager
def staging_folder(engine: Path) -> Generator[Path]:
    """A temporary folder beside the file ``engine``, deleted at the end; those of killed processes are deleted as well.

    Raises:
        BismoothError: the folder of ``engine`` cannot be written, or its disk is full.
    """
    folder = engine.parent / f".{engine.name}.tmp-{os.getpid()}"
    try:
        engine.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(engine)
        folder.mkdir()
        yield folder
    except OSError as error:
        raise BismoothError(
            f"{engine}: cannot be written: {error.strerror or error}. Nothing was changed. "
            "Choose a folder on a disk with enough space."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(staged: Path, engine: Path, record: EngineRecord, audit: Audit) -> Path:
    """Move the finished file ``staged`` to ``engine``, with :func:`audit_path` beside it, whose path is returned.

    The audit comes first and holds the engine's hash: a crash between the two cannot pass off an old engine as new.
    """
    target = audit_path(engine)
    temporary = staged.with_name(target.name)
    content: dict[str, Any] = {"format": "bismooth-engine", "engine": record.to_json(), "audit": audit.to_json()}
    temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    temporary.replace(target)
    staged.replace(engine)
    return target


def read_record(engine: Path) -> EngineRecord:
    """The record beside the file ``engine``, as :func:`publish` wrote it.

    Raises:
        BismoothError: it is missing or damaged.
    """
    path = audit_path(engine)
    if not path.is_file():
        raise BismoothError(f"{engine}: there is no {path.name} beside it. Expected an engine of 'bismooth build'.")
    try:
        return EngineRecord.from_json(json.loads(path.read_text("utf-8"))["engine"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BismoothError(f"{path}: not a record of an engine: {error}. Build the engine again.") from error


def _remove_leftovers(engine: Path) -> None:
    """Delete the folders of processes that are no more (on Linux, where that is easily told)."""
    for folder in engine.parent.glob(f".{glob.escape(engine.name)}.tmp-*"):
        process = Path("/proc", folder.name.rpartition("-")[2])
        if process.parent.joinpath("self").exists() and (not process.exists() or process.name == str(os.getpid())):
            shutil.rmtree(folder, ignore_errors=True)
