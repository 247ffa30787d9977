"""The artifact folder: what every stage reads and writes.

A folder with ONNX graphs, weight files and tokenizer beside ``bismooth.json``, the manifest, which lists every file
with its size. It is made under a temporary name and put in place in one step, so a folder that loads is complete.

NOTE: weight files may be hard links of the user's own files. Nothing opens a file of an artifact for writing in place:
new content goes to a new file, which is then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from . import folder as _folder
from .errors import BismoothError
from .hashing import file_sha256
from .replacing import replacing

MANIFEST = "bismooth.json"
FORMAT_VERSION = 1
Kind = Literal["float", "quantized", "engine"]
_JSON_TYPES = {"source": dict, "graphs": dict, "files": dict, "dims": dict, "tools": dict, "stages": list}
_RECORD_TYPES = {
    "size": (int,),
    "linked": (bool,),
    "mtime_ns": (int, type(None)),
    "inode": (int, type(None)),
    "sha256": (str, type(None)),
}
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
        sha256: of the content, where a stage has read it all: of weight files, from ``quantize`` on.
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
            headers), ``remote_code`` (true where the model's class was its own Python code), ``foreign_code`` (what
            ``auto_map`` names outside the source), …
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

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files that have one on record, by name."""
        return {name: record.sha256 for name, record in sorted(self.files.items()) if record.sha256}

    @property
    def content_sha256(self) -> str | None:
        """SHA-256 over names and hashes of the weight files; ``None`` where no stage has read them."""
        lines = [f"{name} {digest}" for name, digest in self.hashes.items()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None

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
            for key, types in _RECORD_TYPES.items():
                if type(value := getattr(record, key)) not in types:
                    raise TypeError(f"{name} has {key} {value!r}")
        _check_types(manifest)
        for name in (*manifest.files, *manifest.graphs.values()):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"it names a file outside of the folder: {name}")
        return manifest


def _check_types(manifest: Manifest) -> None:
    """Raise ``TypeError`` where a value in the manifest is of another type than its annotation says."""
    blocks = manifest.blocks or Blocks("", ())
    checks: list[tuple[str, type, list[Any]]] = [
        ("source.files", dict, [manifest.source.get("files", {})]),
        ("architecture", str, [] if manifest.architecture is None else [manifest.architecture]),
        ("dims", int, list(manifest.dims.values())),
        ("blocks.prefix", str, [blocks.prefix]),
        ("blocks.kinds", int, list(blocks.kinds)),
        ("tools", str, list(manifest.tools.values())),
        ("stages", dict, list(manifest.stages)),
        ("stages.stage", str, [stage.get("stage") for stage in manifest.stages if type(stage) is dict]),
    ]
    for key, kind, values in checks:
        if wrong := [value for value in values if type(value) is not kind]:
            raise TypeError(f"{key} has {wrong[0]!r}")


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: its folder and manifest."""

    path: Path
    manifest: Manifest

    @property
    def files(self) -> dict[str, Path]:
        """The files that the manifest lists, by their names there."""
        return {name: self.path / name for name in self.manifest.files}

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
            BismoothError: no manifest, an unreadable one, one of another kind than ``kinds``, or what
                :meth:`check_files` raises.
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
            article = "an" if manifest.kind == "engine" else "a"
            raise BismoothError(f"{path}: expected a {' or '.join(kinds)} artifact, got {article} {manifest.kind} one.")
        artifact = Artifact(path, manifest)
        artifact.check_files()
        return artifact

    def check_files(self) -> None:
        """Compare the files with the manifest. Content is read of links alone that have another time than recorded.

        Raises:
            BismoothError: a file is missing, has another size, or is a hard link of a file that was modified.
        """
        for name, record in self.manifest.files.items():
            _check_file(self.path / name, record)


def _check_file(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise BismoothError(f"{path}: the manifest lists this file, but it is missing. Make the artifact again.")
    status = path.stat()
    if status.st_size != record.size:
        raise BismoothError(
            f"{path}: expected {record.size} bytes, got {status.st_size}. The file was changed. "
            "Make the artifact again."
        )
    is_copy = record.inode is not None and record.inode != status.st_ino
    if record.mtime_ns is None or record.mtime_ns == status.st_mtime_ns or is_copy:
        return
    if record.sha256 is None:
        seconds, nanoseconds = divmod(record.mtime_ns, 10**9)
        raise BismoothError(
            f"{path}: this file is a link to the source's weights, which were modified since. "
            "Run 'bismooth export' again. Or, if you know that nothing but their time has changed, set it back: "
            f"touch -d @{seconds}.{nanoseconds:09} {path}"
        )
    if file_sha256(path) != record.sha256:
        raise BismoothError(
            f"{path}: this file is a link to the source's weights, whose content was changed since. "
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


def scan_files(
    folder: Path, hashes: Mapping[str, str] = MappingProxyType({}), own: Collection[str] = ()
) -> dict[str, FileRecord]:
    """Records of all files below ``folder``; those with more than one hard link count as linked.

    Args:
        folder: the artifact.
        hashes: SHA-256 by name, of files whose content was read.
        own: files whose other link is about to go: that of the state of the run which makes the artifact.
    """
    records: dict[str, FileRecord] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name, status = path.relative_to(folder).as_posix(), path.stat()
            record = FileRecord(status.st_size, sha256=hashes.get(name))
            if status.st_nlink > 1 and name not in own:
                record = replace(record, linked=True, mtime_ns=status.st_mtime_ns, inode=status.st_ino)
            records[name] = record
    return records


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, last of all files."""
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest.to_json(), indent=2) + "\n", "utf-8")


@contextmanager
def new_folder(
    target: Path, kind: str | None = None, *, force: bool = False, inputs: Iterable[Path] = ()
) -> Generator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends without an error.

    Args:
        target: the folder to make.
        kind: what is made; ``force`` replaces nothing else. None: any artifact.
        force: replace what is there.
        inputs: files and folders that are read: they must not be in ``target``.

    Raises:
        BismoothError: ``target`` exists and ``force`` is false, or is no such artifact; it holds an input; the parent
            cannot be written; the disk is full.
    """
    check_apart(target, inputs)
    what = "a bismooth artifact" if kind is None else f"a bismooth artifact of kind {kind}"
    with _folder.new_folder(target, what, force=force, replaceable=lambda path: _is_artifact(path, kind)) as temporary:
        yield temporary


def check_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Raise :class:`BismoothError` if the folder ``target`` that is to be made is, or holds, one of ``inputs``."""
    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(target.resolve()):
            raise BismoothError(f"{target}: is or holds what is read, {path}. Choose another output folder.")


def _is_artifact(folder: Path, kind: str | None) -> bool:
    try:
        document: Any = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and kind in (None, cast(dict[str, Any], document).get("kind"))


def finish_folder(
    folder: Path,
    manifest: Manifest,
    hashes: Mapping[str, str] = MappingProxyType({}),
    own: Collection[str] = (),
) -> None:
    """Write the manifest, with records of all files that are in the folder now, as :func:`scan_files` makes them."""
    write_manifest(folder, replace(manifest, files=scan_files(folder, hashes, own)))
