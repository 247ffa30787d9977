"""The artifact folder: what every stage reads and writes.

A folder with ONNX graphs, weight files and tokenizer beside ``bismooth.json``, the manifest, which lists every file with its size.
A folder is made under a temporary name and put in place in one step, so a folder that loads is complete.

NOTE: weight files may be hard links of the user's own files. Nothing here opens a file of an artifact for writing in place.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from .errors import BismoothError

MANIFEST = "bismooth.json"
FORMAT_VERSION = 1
Kind = Literal["float", "quantized", "engine"]


@dataclass(frozen=True)
class FileRecord:
    """A file of the artifact. ``mtime_ns`` is kept for hard links only: an edit of the source would show there."""

    size: int
    linked: bool = False
    mtime_ns: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Blocks:
    """The repeated region of the model: module prefix (``model.layers``) and the kind of each block, as numbers from 0."""

    prefix: str
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """Content of ``bismooth.json``.

    Attributes:
        kind: what the folder holds.
        source: where the model came from: ``path``, ``format``, ``fingerprint`` (SHA-256 over the weight files' headers), …
        graphs: role → ONNX file. Roles: ``float32``, ``float16``, ``bfloat16`` (compute types), ``reference``, ``folded``.
        files: every file of the folder but the manifest.
        architecture: class name of the model, or ``None`` for an imported ONNX file.
        dims: sizes by name (``hidden_size``, ``vocab_size``, …).
        blocks: the repeated region, if there is one.
        tools: versions of what made the artifact.
        stages: one entry per stage that made it, oldest first: name, options, results.
    """

    kind: Kind
    source: dict[str, Any]
    graphs: dict[str, str]
    files: dict[str, FileRecord] = field(default_factory=dict[str, FileRecord])
    architecture: str | None = None
    dims: dict[str, int] = field(default_factory=dict[str, int])
    blocks: Blocks | None = None
    tools: dict[str, str] = field(default_factory=dict[str, str])
    stages: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"format": "bismooth", "version": FORMAT_VERSION, **asdict(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Manifest:
        """Inverse of :meth:`to_json`; raises ``KeyError``, ``TypeError`` or ``ValueError`` on anything else."""
        if data.get("format") != "bismooth":
            raise ValueError("it has no format 'bismooth'")
        if data["version"] != FORMAT_VERSION:
            raise ValueError(f"it has format version {data['version']}, this bismooth reads version {FORMAT_VERSION}")
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        fields["files"] = {name: FileRecord(**record) for name, record in fields["files"].items()}
        if (blocks := fields["blocks"]) is not None:
            fields["blocks"] = Blocks(blocks["prefix"], tuple(blocks["kinds"]))
        fields["stages"] = tuple(fields["stages"])
        return Manifest(**fields)


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: its folder and manifest."""

    path: Path
    manifest: Manifest

    def graph(self, role: str) -> Path:
        """The ONNX file with that role; raises :class:`BismoothError` naming the roles there are."""
        if role not in self.manifest.graphs:
            known = ", ".join(self.manifest.graphs)
            raise BismoothError(f"{self.path}: the artifact has no {role} graph. It has: {known}.")
        return self.path / self.manifest.graphs[role]

    @staticmethod
    def load(path: Path, *kinds: Kind) -> Artifact:
        """Read the manifest and check that the folder is what it says.

        Raises:
            BismoothError: no manifest, an unreadable one, one of another kind than ``kinds``, or a file that is missing, has another
                size, or (hard links) was modified since.
        """
        manifest_path = path / MANIFEST
        _recover(path)
        if not manifest_path.is_file():
            raise BismoothError(
                f"{path}: not a bismooth artifact: there is no {MANIFEST}. Expected a folder written by 'bismooth export' or 'bismooth quantize'."
            )
        try:
            manifest = Manifest.from_json(cast(dict[str, Any], json.loads(manifest_path.read_text("utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BismoothError(
                f"{manifest_path}: the manifest cannot be read: {error}. Make the artifact again."
            ) from error
        if kinds and manifest.kind not in kinds:
            raise BismoothError(f"{path}: expected a {' or '.join(kinds)} artifact, got a {manifest.kind} one.")
        for name, record in manifest.files.items():
            _check_file(path / name, record)
        return Artifact(path, manifest)


def _check_file(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise BismoothError(f"{path}: the manifest lists this file, but it is missing. Make the artifact again.")
    status = path.stat()
    if status.st_size != record.size:
        raise BismoothError(
            f"{path}: expected {record.size} bytes, got {status.st_size}. The file was changed; make the artifact again."
        )
    if record.mtime_ns is not None and status.st_mtime_ns != record.mtime_ns:
        raise BismoothError(
            f"{path}: this file is a link to the source's weights, which were modified since. Run 'bismooth export' again."
        )


def place_file(source: Path, target: Path) -> bool:
    """Make ``source``'s bytes available as ``target``: a hard link where possible, else a copy. Returns whether it is a link."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(real, target)
        return False
    return True


def scan_files(folder: Path, known: dict[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Records of all files below ``folder``; those with more than one hard link count as linked."""
    records: dict[str, FileRecord] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name, status = path.relative_to(folder).as_posix(), path.stat()
            linked = status.st_nlink > 1
            record = FileRecord(status.st_size, linked, status.st_mtime_ns if linked else None)
            if known and name in known and known[name].size == record.size:
                record = replace(record, sha256=known[name].sha256)
            records[name] = record
    return records


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, last of all files, under a temporary name first."""
    text = json.dumps(manifest.to_json(), indent=2) + "\n"
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_text(text, "utf-8")
    temporary.replace(folder / MANIFEST)


@contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends without an error.

    Raises:
        BismoothError: ``target`` exists and ``force`` is false, or is no artifact; the parent cannot be written; the disk is full.
    """
    target = target.absolute()
    _recover(target)
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        if not force:
            raise BismoothError(
                f"{target}: already exists. Choose another output folder, or pass --force to replace it."
            )
        if not (target / MANIFEST).is_file():
            raise BismoothError(
                f"{target}: exists and is not a bismooth artifact, so --force does not replace it. Choose another output folder."
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
        temporary.mkdir()
    except OSError as error:
        raise BismoothError(
            f"{target.parent}: cannot write there ({error.strerror}). Choose a folder that can be written."
        ) from error
    try:
        yield temporary
        _put_in_place(temporary, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BismoothError(
                f"{target.parent}: the disk is full. Free some space and run the command again; nothing was changed."
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        # Two renames: a crash between them is undone by _recover.
        previous = target.parent / f".{target.name}.previous"
        target.rename(previous)
        temporary.rename(target)
        shutil.rmtree(previous, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux ``renameat2`` with ``RENAME_EXCHANGE``); false where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0


def _recover(target: Path) -> None:
    """Undo a replacement that was cut off between its two renames."""
    previous = target.parent / f".{target.name}.previous"
    if previous.is_dir() and not target.exists():
        with suppress(OSError):
            previous.rename(target)


def _remove_leftovers(target: Path) -> None:
    """Delete temporary folders of processes that are no more."""
    for path in target.parent.glob(f".{target.name}.tmp-*"):
        pid = path.name.rpartition("-")[2]
        if not (pid.isdigit() and _alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
