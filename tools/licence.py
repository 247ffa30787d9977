"""The licence of a model, as the files beside it state it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from ..export.artifact import Artifact
from ..export.errors import BismoothError

FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
_CARD = "README.md"
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*(?: (?:AND|OR|WITH) [A-Za-z0-9][A-Za-z0-9.+-]*)*")
"""An identifier or an expression of SPDX, without parentheses."""

_HEADER = re.compile(r"---\s*\n(.*?\n)---\s*(?:\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Licence:
    """A licence.

    Attributes:
        id: identifier, such as ``apache-2.0``; ``None`` if nothing states one.
        stated_by: what states it.
        files: its text.
    """

    id: str | None
    stated_by: str | None
    files: tuple[Path, ...]


def find_licence(artifact: Artifact, stated: str | None = None) -> Licence:
    """The licence of the artifact's model: ``stated``, else what its model card or its GGUF file says.

    Looked for in the artifact, and beside the source if that is still there.

    Raises:
        BismoothError: ``stated`` is no identifier, or the source is a GGUF file that is damaged.
    """
    if stated is not None and not _IDENTIFIER.fullmatch(stated):
        raise BismoothError(f"--licence {stated!r}: Expected an identifier such as apache-2.0 or 'MIT OR Apache-2.0'.")
    source = _source(artifact)
    folders = [artifact.path]
    if source is not None:
        folders.append(source if source.is_dir() else source.parent)
    files = next((found for folder in folders if (found := _licence_files(folder))), ())
    if stated is not None:
        return Licence(stated, "--licence", files)
    for folder in folders:
        if (folder / _CARD).is_file() and (name := licence_of_card(folder / _CARD)):
            return Licence(name, _CARD, files)
    if source is not None and source.suffix == ".gguf":
        from ..export.gguf_file import gguf_licence

        if name := gguf_licence(source):
            return Licence(name, source.name, files)
    return Licence(None, None, files)


def licence_of_card(path: Path) -> str | None:
    """What the YAML header of a model card gives as ``license``; of ``other``, its ``license_name``."""
    header = _HEADER.match(path.read_text("utf-8", errors="replace"))
    try:
        document: Any = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return None
    if not isinstance(document, dict):
        return None
    card = cast(Mapping[str, Any], document)
    stated, name = card.get("license"), card.get("license_name")
    if stated == "other" and isinstance(name, str):
        return name
    listed = cast(list[Any], stated) if isinstance(stated, list) else [stated]
    return ", ".join(item for item in listed if isinstance(item, str)) or None


def _licence_files(folder: Path) -> tuple[Path, ...]:
    return tuple(path for pattern in FILES for path in sorted(folder.glob(pattern)) if path.is_file())


def _source(artifact: Artifact) -> Path | None:
    """Where the artifact's source lies, if all of its files still do, in the sizes that they had."""
    recorded = artifact.manifest.source
    path = Path(str(recorded.get("path", "")))
    if not path.is_absolute() or not path.exists():
        return None
    folder = path if path.is_dir() else path.parent
    files: Mapping[str, Mapping[str, int]] = recorded.get("files", {})
    same = all(_size(folder / name) == state.get("size") for name, state in files.items())
    return path if files and same else None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
