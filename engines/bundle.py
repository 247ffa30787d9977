"""A bundle: a folder with engines of one model and all that running them takes, which can be copied anywhere.

Loading it takes the base dependencies alone. Every file is held against the manifest. The hashes show damage and
changes, not forgery: who can write the folder can write a manifest that fits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..export.errors import BismoothError
from ..export.folder import recover
from ..export.hashing import file_sha256, hashing
from .bundle_manifest import MANIFEST, REMEDY, read_manifest
from .kernel_cache import is_kernels
from .tensorrt_runtime import TENSORRT_RTX

Check = Literal["size", "full"]
"""How much is read when a bundle is loaded: of files above :data:`SMALL_BYTES` their sizes alone, or everything."""

SMALL_BYTES = 1 << 24
"""Files up to this size are always hashed: graphs, tokenizer, audits; in no time, and all that is parsed."""

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class BundledEngine:
    """An engine in a bundle.

    Attributes:
        name: of its folder in ``engines/``.
        runtime: ``onnxruntime``, ``tensorrt-rtx`` or ``tensorrt``.
        version: of the runtime that built it; TensorRT runs it with no other.
        capabilities: compute capabilities that it was built for; empty for one that any machine runs.
        capacity: the most positions of a row, if that is known.
        file: what the runtime loads, a path in the bundle.
        files: all that it reads then.
    """

    name: str
    runtime: str
    version: str
    capabilities: tuple[int, ...]
    capacity: int | None
    file: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        path: the folder. Tokenizer, configuration and chat template lie in it under the names that they had.
        manifest: content of ``bundle.json``.
    """

    path: Path
    manifest: Mapping[str, Any]

    @staticmethod
    def load(path: str | Path, check: Check = "full") -> Bundle:
        """Read the manifest and hold the files against it.

        With ``check="size"`` call :meth:`hashing` while an engine is loaded: its large files are then read once.

        Raises:
            BismoothError: no bundle, or one with a file that is missing, was changed, is not on record, or lies
                elsewhere; the message names the file.
        """
        path = Path(path)
        recover(path)
        bundle = Bundle(path, read_manifest(path))
        for problem in bundle.problems(check):
            raise BismoothError(problem)
        return bundle

    @classmethod
    def is_alone(cls, path: Path) -> bool:
        """Whether a folder is a bundle, whole or not, and holds no file that is not the bundle's."""
        try:
            return not cls(path, read_manifest(path))._unknown()
        except BismoothError:
            return False

    @property
    def name(self) -> str:
        """Of the model, and of the recipe by which it was quantized."""
        return self.manifest["name"]

    @property
    def engines(self) -> tuple[BundledEngine, ...]:
        return tuple(
            BundledEngine(
                name,
                entry["runtime"],
                entry["version"],
                tuple(entry["capabilities"]),
                entry["capacity"],
                entry["file"],
                tuple(entry["files"]),
            )
            for name, entry in self.manifest["engines"].items()
        )

    @property
    def tokenizer(self) -> Path | None:
        """``tokenizer.json``; ``None`` if the model has none."""
        return self.path / TOKENIZER if TOKENIZER in self.manifest["files"] else None

    def engine(self, name: str) -> BundledEngine:
        """The engine of that name; raises :class:`BismoothError` naming those there are."""
        for engine in self.engines:
            if engine.name == name:
                return engine
        known = ", ".join(engine.name for engine in self.engines)
        raise BismoothError(f"{self.path}: the bundle has no engine {name!r}. Expected one of: {known}.")

    def problems(self, check: Check = "full", progress: Callable[[str], None] = lambda _: None) -> Iterator[str]:
        """A sentence for each file that is not as the manifest says; the cheap checks come first.

        Args:
            progress: is called with the name of each file before it is read.
        """
        sound: list[str] = []
        for name in self.manifest["files"]:
            if problem := self._misplaced(name):
                yield problem
            else:
                sound.append(name)
        for name in self._unknown():
            yield f"{self.path / name}: is not on record in {MANIFEST}. Expected no such file. Remove it. {REMEDY}"
        for name in sorted(sound, key=self._size):
            if check == "full" or self._size(name) <= SMALL_BYTES:
                progress(name)
                if problem := self._changed(name, file_sha256(self.path / name)):
                    yield problem

    def _unknown(self) -> list[str]:
        """Files that the manifest does not list and that running an engine does not make."""
        names = sorted(_entries(self.path) - {MANIFEST, *self.manifest["files"]})
        return [name for name in names if not self._was_made_here(name)]

    @contextmanager
    def hashing(self, engine: BundledEngine) -> Generator[Callable[[], None]]:
        """Hash large files on a thread while the block loads ``engine``; a call waits, and checks them.

        Files of other engines are left out. Nothing that the engine computes is to be trusted before that call.

        Raises:
            BismoothError: from the call: a file was changed.
        """
        others = {name for other in self.engines for name in other.files} - {*engine.files}
        names = [name for name in self.manifest["files"] if name not in others and self._size(name) > SMALL_BYTES]
        large = {name: self.path / name for name in names}
        with hashing(large) as digests:

            def check() -> None:
                _refuse(self._changed(name, digest) for name, digest in digests().items())

            yield check

    def _was_made_here(self, name: str) -> bool:
        """Whether running an engine of TensorRT-RTX has put a file beside it, which has a hash of its own."""
        engines = [PurePosixPath(engine.file) for engine in self.engines if engine.runtime == TENSORRT_RTX.name]
        is_of_engine = any(is_kernels(PurePosixPath(name), engine) for engine in engines)
        return is_of_engine and not (self.path / name).is_symlink()

    def _size(self, name: str) -> int:
        return self.manifest["files"][name]["size"]

    def _misplaced(self, name: str) -> str | None:
        path, expected = self.path / name, self._size(name)
        try:
            place = path.resolve()
            if not place.is_relative_to(self.path.resolve()):
                return f"{path}: leads out of the bundle, to {place}. Expected a file in it. {REMEDY}"
            if not place.is_file():
                return f"{path}: is missing. Expected a file of {expected} bytes. {REMEDY}"
            got = place.stat().st_size
        except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
            return f"{path}: cannot be read ({error}). Expected a file of {expected} bytes. {REMEDY}"
        return None if got == expected else f"{path}: was changed: expected {expected} bytes, got {got}. {REMEDY}"

    def _changed(self, name: str, digest: str) -> str | None:
        if digest == (expected := self.manifest["files"][name]["sha256"]):
            return None
        return f"{self.path / name}: was changed: expected SHA-256 {expected}, got {digest}. {REMEDY}"


def _refuse(problems: Iterable[str | None]) -> None:
    for problem in problems:
        if problem:
            raise BismoothError(problem)


def _entries(folder: Path) -> set[str]:
    """Everything below ``folder`` but real folders, by its path in it."""
    found: set[str] = set()
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found.update(Path(parent, name).relative_to(folder).as_posix() for name in (*files, *links))
    return found
