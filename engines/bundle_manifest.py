"""The manifest of a bundle, ``bundle.json``: what is in the folder, and the SHA-256 of every file.

``bundle.schema.json`` is its grammar. The manifest also holds a hash of itself, so that damage to it shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ..export.errors import BismoothError
from ..export.replacing import replacing

MANIFEST = "bundle.json"
FORMAT, FORMAT_VERSION = "bismooth-bundle", 1
REMEDY = "Get the bundle again from where it came, or package the artifact again."
_SCHEMA = Path(__file__).with_name("bundle.schema.json")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the bundle ``folder``.

    Raises:
        BismoothError: there is none, it was changed, or it is no manifest that this version reads.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BismoothError(f"{folder}: not a bundle: there is no {MANIFEST}. Expected a folder of 'bismooth package'.")
    try:
        document = _parse(path.read_bytes())
        _check(document)
    except (ValueError, RecursionError) as error:
        raise BismoothError(f"{path}: the manifest cannot be read: {error}. {REMEDY}") from error
    return document


def write_manifest(folder: Path, document: Mapping[str, Any]) -> str:
    """Write ``document``, all but its format, version and hash, as the manifest of ``folder``; returns that hash."""
    content = {"format": FORMAT, "version": FORMAT_VERSION, **document}
    digest = _digest(content)
    sealed = {**content, "sha256": digest}
    _check(sealed)
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(sealed, indent=2) + "\n", "utf-8")
    return digest


def _parse(data: bytes) -> dict[str, Any]:
    document = json.loads(data, object_pairs_hook=_distinct)
    if not isinstance(document, dict) or cast(dict[str, Any], document).get("format") != FORMAT:
        raise ValueError(f"it has no format {FORMAT!r}")
    return cast(dict[str, Any], document)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict[str, Any]()
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has {key!r} twice")
        found[key] = value
    return found


def _check(document: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless ``document`` is a whole manifest that names files of its folder alone."""
    import jsonschema  # 80 ms

    if (version := document.get("version")) != FORMAT_VERSION:
        raise ValueError(f"it has format version {version!r}, this bismooth reads version {FORMAT_VERSION}")
    expected = _digest({key: value for key, value in document.items() if key != "sha256"})
    if (said := document.get("sha256")) != expected:
        raise ValueError(f"it was changed: it says that its SHA-256 is {said}, and it is {expected}")
    library: Any = jsonschema  # its types are partial
    validator = library.Draft202012Validator(json.loads(_SCHEMA.read_text("utf-8")))
    if error := library.exceptions.best_match(validator.iter_errors(document)):
        raise ValueError(f"{error.json_path}: {error.message}")
    files: dict[str, Any] = document["files"]
    for name in files:
        _check_name(name)
    for name, engine in document["engines"].items():
        if missing := sorted({engine["file"], *engine["files"]} - {*files}):
            raise ValueError(f"engine {name} has the file {missing[0]}, which is not among the files of the bundle")
    if missing := sorted({*document["licence"]["files"]} - {*files}):
        raise ValueError(f"the licence {missing[0]} is not among the files of the bundle")


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"it names a file outside of the folder: {name}")
    if path.as_posix() != name or not path.parts or name == MANIFEST or any(mark in name for mark in "\\\0"):
        raise ValueError(f"it names a file in an unusual way: {name!r}")


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the values, whatever the spaces between them."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
