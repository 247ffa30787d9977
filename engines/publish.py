"""Put a finished engine and its audit in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from ..export.replacing import flush, replacing
from .audit import Audit
from .base import EngineRecord, audit_path


def publish(staged: Path, engine: Path, record: EngineRecord, audit: Audit) -> Path:
    """Move the finished file ``staged`` to ``engine``, with :func:`audit_path` beside it, whose path is returned.

    The audit comes first and holds the engine's hash: a crash between the two cannot pass off an old engine as new.

    Raises:
        BismoothError: the folder of ``engine`` cannot be written.
    """
    target = audit_path(engine)
    content: dict[str, Any] = {"format": "bismooth-engine", "engine": record.to_json(), "audit": audit.to_json()}
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    flush(staged)
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


def read_audit(path: Path) -> Audit:
    """The audit beside an engine.

    Raises:
        BismoothError: the file cannot be read.
    """
    try:
        return Audit.from_json(json.loads(path.read_text("utf-8"))["audit"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BismoothError(f"{path}: not an audit file: {error}. Build the engine again.") from error
