"""What lies in the folders that ``bismooth build`` writes. Imports nothing that engines can run without."""

from __future__ import annotations

from pathlib import Path

from ..engines.chain import CHAIN
from ..export.artifact import MANIFEST, Artifact
from ..export.errors import BismoothError


def engine_file(engine: str) -> str:
    """Name of the file that an engine folder is about."""
    return "model.onnx" if engine == "onnxruntime" else "model.engine"


def is_chain(folder: Artifact) -> bool:
    """Whether an engine folder holds a chain, instead of an engine in one piece."""
    return any("chain" in stage for stage in folder.manifest.stages if stage["stage"] == "build")


def has_chain(artifact: Artifact) -> bool:
    """Whether one of the artifact's finished engine folders holds a chain."""
    return any((folder / CHAIN).is_file() for folder in engine_folders(artifact))


def file_of(folder: Artifact) -> Path:
    """The file that an engine folder is about.

    Raises:
        BismoothError: its manifest does not say which engine it holds.
    """
    return folder.path / (CHAIN if is_chain(folder) else engine_file(engine_of(folder)))


def engine_of(folder: Artifact) -> str:
    """Which engine an engine folder holds.

    Raises:
        BismoothError: its manifest does not say.
    """
    engine = next((stage.get("engine") for stage in folder.manifest.stages if stage["stage"] == "build"), None)
    if not isinstance(engine, str):
        raise BismoothError(
            f"{folder.path}: its manifest does not say which engine this is. Expected an engine of 'bismooth build'. "
            "Build the engine again."
        )
    return engine


def engine_folders(artifact: Artifact) -> list[Path]:
    """Finished engine folders in ``engines/``; those of builds under way or killed are hidden."""
    folders = sorted(artifact.path.glob("engines/*"))
    return [folder for folder in folders if not folder.name.startswith(".") and (folder / MANIFEST).is_file()]
