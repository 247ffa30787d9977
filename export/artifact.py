"""The artifact folder: what every stage reads and writes.

A folder with ONNX graphs, weight files and tokenizer beside ``bismooth.json``, the manifest, which lists every file
with its size. It is made under a temporary name and put in place in one step, so a folder that loads is complete.

NOTE: weight files may be hard links of the user's own files. Nothing opens a file of an artifact for writing in place:
new content goes to a new file, which is then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast, get_args

from . import folder as _folder
from .errors import BismoothError

MANIFEST = "bismooth.json"
FORMAT_VERSION = 1
Kind = Literal["float", "quantized", "engine"]
_JSON_TYPES = {"source": dict, "graphs": dict, "files": dict, "dims": dict, "tools": dict, "stages": list}
RESERVED = (".onnx", ".json", "quantized.safetensors", "statistics.safetensors")
"""How the names end that stages give to files of their own: no weight file of a source may be called so."""


@dataclass(frozen=True)
class FileRecord:
    """A file of the artifact.

    Attributes:
        size: bytes.
        linked: whether it was a hard link of a file outside when the artifact was made.
        mtime_ns: of links only: time of the last modification. An edit of the source shows here.
        inode: of links only. A copy of the artifact has other inodes, and is no longer tied to the source.
        sha256: of the content, where a stage has read it all.
    """

    size: int
    linked: bool = False
    mtime_ns: int | None = None
    inode: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Blocks:
    """The repeated region of the model: module prefix (``model.layers``) and each block's kind, as numbers from 0."""

    prefix: str
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """Content of ``bismooth.json``.

    Attributes:
        kind: what the folder holds.
        source: where the model came from: ``path``, ``format``, ``fingerprint`` (SHA-256 over the weight files'
            headers), …
        graphs: role → ONNX file. Roles: ``float32``, ``float16``, ``bfloat16`` (compute types), ``reference``,
            ``folded``.
        files: every file of the folder but the manifest, by its path in the folder.
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
        """Plain data for :func:`json.dumps`."""
        return {"format": "bismooth", "version": FORMAT_VERSION, **asdict(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Manifest:
        """Inverse of :meth:`to_json`; raises ``KeyError``, ``TypeError`` or ``ValueError`` on anything else."""
        if data.get("format") != "bismooth":
            raise ValueError("it has no format 'bismooth'")
        if data["version"] != FORMAT_VERSION:
            raise ValueError(f"it has format version {data['version']}, this bismooth reads version {FORMAT_VERSION}")
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        if wrong := [key for key, kind in _JSON_TYPES.items() if not isinstance(fields[key], kind)]:
            raise TypeError(f"{wrong[0]} is of another type than expected")
        fields["files"] = {name: FileRecord(**record) for name, record in fields["files"].items()}
        if (blocks := fields["blocks"]) is not None:
            fields["blocks"] = Blocks(blocks["prefix"], tuple(blocks["kinds"]))
        fields["stages"] = tuple(fields["stages"])
        manifest = Manifest(**fields)
        if manifest.kind not in get_args(Kind):
            raise ValueError(f"it has kind {manifest.kind!r}, expected one of {', '.join(get_args(Kind))}")
        for name, record in manifest.files.items():
            if type(record.size) is not int:
                raise TypeError(f"{name} has size {record.size!r}")
        for name in (*manifest.files, *manifest.graphs.values()):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"it names a file outside of the folder: {name}")
        return manifest


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: its folder and manifest."""

    path: Path
    manifest: Manifest

    def graph(self, role: str) -> Path:
        """The ONNX file with that role; raises :class:`BismoothError` naming the roles there are."""
        if role not in self.manifest.graphs:
            known = ", ".join(self.manifest.graphs) or "none"
            raise BismoothError(f"{self.path}: the artifact has no {role} graph. It has: {known}.")
        return self.path / self.manifest.graphs[role]

    @staticmethod
    def load(path: Path, *kinds: Kind) -> Artifact:
        """Read the manifest and check that the folder is what it says.

        Raises:
            BismoothError: no manifest, an unreadable one, one of another kind than ``kinds``, or a file that is
                missing, has another size, or (hard links) was modified since.
        """
        _folder.recover(path)
        manifest_path = path / MANIFEST
        if not manifest_path.is_file():
            raise BismoothError(
                f"{path}: not a bismooth artifact: there is no {MANIFEST}. "
                "Expected a folder written by 'bismooth export' or 'bismooth quantize'."
            )
        try:
            manifest = Manifest.from_json(cast(dict[str, Any], json.loads(manifest_path.read_text("utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
            f"{path}: expected {record.size} bytes, got {status.st_size}. The file was changed. "
            "Make the artifact again."
        )
    same_file = record.inode is None or record.inode == status.st_ino
    if record.mtime_ns is not None and same_file and status.st_mtime_ns != record.mtime_ns:
        raise BismoothError(
            f"{path}: this file is a link to the source's weights, which were modified since. "
            "Run 'bismooth export' again."
        )


def place_file(source: Path, target: Path, *, copy: bool = False) -> bool:
    """Make the bytes of ``source`` (symbolic links resolved) available as the new file ``target``.

    A hard link where the system permits it and ``copy`` is false, else a copy. Returns whether it is a link.
    """
    real = source.resolve()
    if target.exists():  # copying into an existing link would write to what it is a link of
        raise FileExistsError(f"{target} already exists")
    if not copy:
        try:
            os.link(real, target)
            return True
        except OSError:  # another file system, no permission, too many links: systems differ in the errors they give
            pass
    shutil.copyfile(real, target)
    return False


def scan_files(folder: Path, known: dict[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Records of all files below ``folder``; those with more than one hard link count as linked."""
    records: dict[str, FileRecord] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name, status = path.relative_to(folder).as_posix(), path.stat()
            record = FileRecord(status.st_size)
            if status.st_nlink > 1:
                record = FileRecord(status.st_size, True, status.st_mtime_ns, status.st_ino)
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
def new_folder(target: Path, *, force: bool = False) -> Generator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends without an error.

    Raises:
        BismoothError: ``target`` exists and ``force`` is false, or is no artifact; the parent cannot be written; the
            disk is full.
    """
    with _folder.new_folder(target, force=force, replaceable=lambda path: (path / MANIFEST).is_file()) as temporary:
        yield temporary


def finish_folder(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with records of all files that are in the folder now."""
    write_manifest(folder, replace(manifest, files=scan_files(folder, manifest.files)))
