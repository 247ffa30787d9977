"""Find the engines that ``bismooth build`` has put into an artifact, and say which of them are not to be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..engines.base import EngineRecord
from ..engines.chain import CHAIN, Chain
from ..engines.publish import read_record
from ..export.artifact import Artifact, Manifest
from ..export.errors import BismoothError
from ..export.hashing import file_sha256
from .engine_folder import engine_folders, file_of
from .meant import engine_source


@dataclass(frozen=True)
class ShippedEngine:
    """An engine whose folder is whole, whose file is the one recorded, and which was made of the artifact.

    Attributes:
        file: the engine; of a chain what lists its parts, which are those recorded, too.
    """

    folder: Path
    file: Path
    record: EngineRecord
    manifest: Manifest

    @property
    def is_chain(self) -> bool:
        return self.file.name == CHAIN

    @property
    def build_seconds(self) -> float | None:
        """How long the build took; ``None`` for an engine of a version that did not record it."""
        return next(stage.get("build_seconds") for stage in self.manifest.stages if stage["stage"] == "build")


def find_engines(artifact: Artifact) -> tuple[list[ShippedEngine], list[str]]:
    """The artifact's engines, and a sentence for each that is damaged or was made of something else."""
    engines: list[ShippedEngine] = []
    problems: list[str] = []
    for folder in engine_folders(artifact):
        try:
            engines.append(load_engine(folder, artifact))
        except BismoothError as error:
            problems.append(str(error))
    return engines, problems


def load_engine(folder: Path, artifact: Artifact) -> ShippedEngine:
    """The engine in ``folder``.

    Raises:
        BismoothError: it is damaged, or was made of something else than ``artifact``.
    """
    loaded = Artifact.load(folder, "engine")
    file = file_of(loaded)
    record = read_record(file)
    _check_content(file, record.sha256)
    if file.name == CHAIN:
        for part in Chain.load(file).parts:
            _check_content(folder / part.file, part.sha256)
    for key, expected in engine_source(artifact).items():
        if (found := record.source.get(key)) != expected:
            raise BismoothError(
                f"{folder}: the engine was not made of this artifact. Expected {key} {expected}, got {found}. "
                "Build the engine again."
            )
    return ShippedEngine(folder, file, record, loaded.manifest)


def _check_content(file: Path, expected: str) -> None:
    if (got := file_sha256(file)) != expected:
        raise BismoothError(f"{file}: expected SHA-256 {expected}, got {got}. Build the engine again.")
