"""Package engines of an artifact into a bundle: a folder that runs with the extra ``runtime`` alone."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.bundle import SMALL_BYTES, Bundle
from ..engines.bundle_manifest import write_manifest
from ..export.artifact import MANIFEST, Artifact, place_file
from ..export.errors import BismoothError
from ..export.folder import new_folder
from ..export.hashing import file_sha256
from ..export.source import SIDE_FILES, side_files
from . import console
from .card import CARD, model_card
from .exporting import copies_weights
from .licence import Licence, find_licence
from .packaged import VERDICT, describe, read_verdict
from .shipped import ShippedEngine, engine_folders, load_engine

_STAND_IN = "null"


@dataclass(frozen=True)
class PackageResult:
    """A bundle.

    Attributes:
        manifest: content of ``bundle.json``.
        sha256: that the manifest has of itself; to be kept elsewhere by who wants to recognize the bundle.
        warnings: what its maker should know, a sentence each.
    """

    bundle: Path
    manifest: Mapping[str, Any]
    sha256: str
    warnings: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        files = self.manifest["files"]
        verdict = self.manifest["verdict"]
        return {
            "bundle": str(self.bundle),
            "name": self.manifest["name"],
            "engines": list(self.manifest["engines"]),
            "licence": self.manifest["licence"]["id"] or ", ".join(self.manifest["licence"]["files"]) or "unknown",
            "verdict": "not verified" if verdict is None else verdict["verdict"],
            "files": len(files),
            "bundle_bytes": sum(record["size"] for record in files.values()),
            "manifest_sha256": self.sha256,
            "warnings": list(self.warnings),
            "wall_seconds": self.seconds,
        }

    def brief(self) -> dict[str, Any]:
        """Without the warnings, which a command shows apart."""
        return {key: value for key, value in self.to_json().items() if key != "warnings"}


def package(
    artifact: str | Path,
    output: str | Path,
    *,
    engines: Sequence[str] = (),
    licence: str | None = None,
    force: bool = False,
) -> PackageResult:
    """Put engines of an artifact, tokenizer, configuration, verdict, licence and a model card into a new folder.

    Large files are hard links where that is possible, unless the artifact was made with copies of the weights.

    Args:
        artifact: the artifact, or the output folder of ``compile``.
        output: the bundle.
        engines: names of folders in ``engines/``; by default all that are whole and were made of the artifact.
        licence: identifier of the source's licence, where nothing beside the source states the right one.
        force: replace a bundle at ``output``.

    Raises:
        BismoothError: there is no such engine, one that was asked for is damaged or was made of something else, or
            ``verify.json`` is of something else.
    """
    start = time.perf_counter()
    loaded, output = _find_artifact(Path(artifact)), Path(output)
    chosen, warnings = _find_engines(loaded, engines)
    verdict = read_verdict(loaded)
    found = find_licence(loaded, licence)
    warnings += _doubts(found, verdict)
    what = "a bundle of 'bismooth package' with nothing else in it"
    with new_folder(output, what, force=force, replaceable=Bundle.is_alone) as folder:
        files = _fill(folder, _plan(loaded, chosen, found), chosen, copy=copies_weights(loaded))
        _trim(folder, chosen, files)
        _share(folder, files)
        manifest = describe(loaded, chosen, found, verdict, files)
        (folder / CARD).write_text(model_card(manifest), "utf-8")
        manifest["files"] = files | {CARD: _record(folder / CARD)}
        digest = write_manifest(folder, manifest)
    return PackageResult(output, manifest, digest, tuple(warnings), time.perf_counter() - start)


def _find_artifact(path: Path) -> Artifact:
    """The artifact at ``path``, or in the output folder of ``compile`` there."""
    inner = path / "quantized"
    if not (path / MANIFEST).exists() and (inner / MANIFEST).is_file():
        if not (path / "compile.json").is_file():
            raise BismoothError(
                f"{path}: compile has not finished here: there is no compile.json. Run the same command again, or "
                f"package what there is: bismooth package {inner} -o BUNDLE"
            )
        path = inner
    return Artifact.load(path, "float", "quantized")


def _find_engines(artifact: Artifact, names: Sequence[str]) -> tuple[list[ShippedEngine], list[str]]:
    """The engines to package, and a sentence for each that is there and left out."""
    folders = {folder.name: folder for folder in engine_folders(artifact)}
    if not folders:
        raise BismoothError(
            f"{artifact.path}: the {artifact.manifest.kind} artifact has no engines. Expected some in engines/. "
            f"Run 'bismooth build {artifact.path} --engine onnxruntime' first."
        )
    for name in names:
        if name not in folders:
            raise BismoothError(f"--engine {name}: {artifact.path} has no such engine. It has: {', '.join(folders)}.")
    chosen: list[ShippedEngine] = []
    left_out: list[str] = []
    for name in dict.fromkeys(names or folders):
        try:
            chosen.append(_load(folders[name], artifact))
        except BismoothError as error:
            if names:
                raise
            left_out.append(f"left out: {error}")
    if not chosen:
        raise BismoothError(f"{artifact.path}: none of its engines can be packaged; {'; '.join(left_out)}")
    return chosen, left_out


def _load(folder: Path, artifact: Artifact) -> ShippedEngine:
    engine = load_engine(folder, artifact)
    if engine.record.runtime == _STAND_IN:
        raise BismoothError(f"{folder}: engines of {_STAND_IN} are stand-ins for tests, which nothing runs.")
    if engine.is_chain:
        raise BismoothError(
            f"{folder}: is a chain of engines, which bundles do not hold. Expected engines in one piece. Copy the "
            "folder itself, or build the engine without --split-blocks."
        )
    return engine


def _doubts(licence: Licence, verdict: Mapping[str, Any] | None) -> list[str]:
    doubts: list[str] = []
    if licence.id is None:
        what = "and its text is packaged" if licence.files else "and no text of a licence lies beside it"
        doubts.append(
            f"the licence of the source is not known: no model card names it, {what}. State it with --licence ID."
        )
    if verdict is None:
        doubts.append("nothing was verified. Run 'bismooth verify' first, so that the card can say how close this is.")
    elif verdict["failures"]:
        doubts.append(f"the verdict of verify is: {verdict['verdict']}. The card says so.")
    return doubts


def _plan(artifact: Artifact, engines: Sequence[ShippedEngine], licence: Licence) -> dict[str, Path]:
    """Path in the bundle → what to put there; README and manifest come later."""
    beside = [path for path in _beside(artifact) if path.name != CARD]
    plan = {path.name: path for path in (*beside, *licence.files)}
    if (artifact.path / VERDICT).is_file():
        plan[VERDICT] = artifact.path / VERDICT
    for engine in engines:
        # what text needs is in the bundle once
        names = [name for name in engine.manifest.files if name not in plan or name in _weights(engine)]
        for name in names:
            plan[_place(engine, name)] = engine.folder / name
    return plan


def _beside(artifact: Artifact) -> list[Path]:
    """Tokenizer, configuration, licence: what belongs to the model beside graphs and weights."""
    from ..export.external_data import weight_files

    weights = {path for graph in artifact.manifest.graphs for path in weight_files(artifact.graph(graph)).values()}
    listed = {artifact.path / name for name in artifact.manifest.files}
    return [path for path in side_files(artifact.path, weights, SIDE_FILES) if path in listed]


def _weights(engine: ShippedEngine) -> set[str]:
    """Files that the graph of an engine for ONNX Runtime refers to, one of which may be called like a tokenizer's."""
    from ..export.external_data import weight_files

    return {*weight_files(engine.file)} if engine.file.suffix == ".onnx" else set()


def _place(engine: ShippedEngine, name: str) -> str:
    return f"engines/{engine.folder.name}/{name}"


def _fill(
    folder: Path, plan: Mapping[str, Path], engines: Sequence[ShippedEngine], *, copy: bool
) -> dict[str, dict[str, Any]]:
    """Put the files of ``plan`` into ``folder``; size and SHA-256 by name.

    Raises:
        BismoothError: a weight file is not the one that the engine was built with.
    """
    expected = {_place(engine, name): digest for engine in engines for name, digest in engine.manifest.hashes.items()}
    records: dict[str, dict[str, Any]] = {}
    with console.progress() as progress:
        for done, (name, source) in enumerate(plan.items()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            place_file(source, target, copy=copy or source.stat().st_size <= SMALL_BYTES)
            records[name] = record = _record(target)
            if record["sha256"] != (digest := expected.get(name, record["sha256"])):
                raise BismoothError(
                    f"{source}: was changed since the engine was built: expected SHA-256 {digest}, got "
                    f"{record['sha256']}. Build the engine again."
                )
            progress("package", done + 1, len(plan))
    return records


def _trim(folder: Path, engines: Sequence[ShippedEngine], files: dict[str, dict[str, Any]]) -> None:
    """Leave out weights that no graph reads, and bring ``files`` up to date."""
    from .trim import trim_weights

    for engine in engines:
        place = folder / _place(engine, "")
        if engine.file.suffix == ".onnx" and trim_weights(place / engine.file.name):
            found = {path.relative_to(folder).as_posix() for path in place.rglob("*") if path.is_file()}
            for name in [name for name in files if name.startswith(_place(engine, "")) and name not in found]:
                del files[name]
            files |= {name: _record(folder / name) for name in found}


def _record(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def _share(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Store large files with the same bytes once: the second is a link of the first, where the system permits it."""
    first: dict[str, Path] = {}
    for name, record in files.items():
        target, stored = folder / name, first.setdefault(record["sha256"], folder / name)
        if record["size"] > SMALL_BYTES and not target.samefile(stored):
            link = target.with_name(f"{target.name}.link")
            with suppress(OSError):
                os.link(stored, link)
                link.replace(target)
