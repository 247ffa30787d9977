"""What ``compile`` finds at its output: per stage, whether it is what the stage would make, or what differs.

Each function returns None, or the first difference in words, and raises :class:`BismoothError` if what is there is
damaged. Nothing is judged by age: a result is taken only if everything that decides it is recorded and the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ..engines.base import BuildResult, Profile, audit_path
from ..engines.linears import summarize
from ..engines.publish import read_audit
from ..engines.tensorrt_runtime import RUNTIMES, load_module
from ..export.artifact import Artifact, Manifest
from ..export.difference import difference
from ..export.hashing import file_sha256
from ..export.versions import tool_versions
from ..passes.recipe import Recipe
from .meant import quantize_stage, statistics_record
from .results import BuildStageResult
from .shipped import ShippedEngine

_ENGINE_PACKAGES = frozenset({"tensorrt", "tensorrt-rtx-cu12"})
"""Their versions decide about engines alone."""


def float_differs(folder: Path, source: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    """``source`` as the manifest identifies it, ``options`` as the entry of the stage."""
    foreign = source.get("foreign_code")
    if foreign and options["trust_remote_code"]:
        return f"it is made with the code of {foreign[0]}, which lies outside the source and may have changed"
    manifest = Artifact.load(folder, "float").manifest
    files, wanted = (cast(Mapping[str, Any], record.get("files", {})) for record in (manifest.source, source))
    if manifest.source.get("path") == source["path"]:
        for name in {**files, **wanted}:
            if files.get(name) != wanted.get(name):
                return f"the source's file {name} is not the one that it was made of"
    return (
        difference("source", manifest.source, {**manifest.source, **source})
        or difference("export", _export_stage(manifest), options)
        or _tools_differ(manifest, _ENGINE_PACKAGES)
    )


def statistics_differ(folder: Path, wanted: Mapping[str, Any], *, histograms: bool) -> str | None:
    """``wanted`` as :func:`.meant.statistics_record` gives it."""
    from ..calibrators.statistics import Statistics

    found = Statistics.load(folder)
    if histograms and not found.has_histograms:
        return "it has no histograms, which the recipe needs"
    return difference("calibrate", statistics_record(found), wanted)


def quantized_differs(
    folder: Path, made_of: Manifest, recipe: Recipe, statistics: Mapping[str, Any] | None
) -> str | None:
    """``made_of`` of the float artifact; ``statistics`` as :func:`.meant.statistics_record` gives it."""
    artifact = Artifact.load(folder, "quantized")
    manifest, stage = artifact.manifest, quantize_stage(artifact)
    said = recipe.to_dict() | {"name": recipe.name}
    return (
        difference("source", manifest.source, made_of.source)
        or difference("export", _export_stage(manifest), _export_stage(made_of))
        or difference("recipe", stage["recipe"]["name"], recipe.name)
        or difference("recipe", stage["recipe"], said | {"description": stage["recipe"].get("description")})
        or difference("statistics", stage.get("statistics"), statistics)
        or _tools_differ(manifest, _ENGINE_PACKAGES)
        or _damage(folder, manifest.hashes)
    )


def engine_differs(
    shipped: ShippedEngine,
    built: BuildStageResult,
    engine: str,
    graph: Path,
    capabilities: tuple[int, ...],
    profile: Profile,
    *,
    allow_float: bool,
) -> str | None:
    """``shipped`` is what is there, ``built`` as :func:`finished_engine` gives it; the rest is what would be built."""
    if shipped.is_chain:
        return f"it is a chain of engines. To build it alone again, delete {shipped.folder}"
    runtime = RUNTIMES.get(engine)
    if runtime is not None and not runtime.ahead_of_time:
        return (
            f"{engine} builds for the GPU that it finds, and no record says which one this engine was built for. "
            f"To build it alone again, delete {shipped.folder}"
        )
    record, inputs = shipped.record, summarize(graph).inputs
    shapes = {name: profile.shapes(name, inputs[name]) for name in record.shapes if name in inputs}
    recorded = {name: record.shapes[name] for name in shapes}
    fallbacks = built.result.audit.fallbacks
    if fallbacks and not allow_float:
        return f"{len(fallbacks)} linears run in float, and --allow-float is not given"
    return (
        difference("runtime", record.runtime, engine)
        or difference("capabilities", record.capabilities, capabilities)
        or difference("shapes", recorded, shapes)
        or (runtime and difference(f"version.{engine}", record.version, load_module(runtime).__version__))
        or _tools_differ(shipped.manifest, frozenset())
        or _damage(shipped.folder, shipped.manifest.hashes)
    )


def finished_engine(shipped: ShippedEngine) -> BuildStageResult:
    """What the build of an engine that is there once returned."""
    audit_file = audit_path(shipped.file)
    return BuildStageResult(
        shipped.folder, BuildResult(shipped.file, audit_file, shipped.record, read_audit(audit_file), 0.0, None)
    )


def _damage(folder: Path, hashes: Mapping[str, str]) -> str | None:
    """The first file whose content is not the one on record. All of them are read, a second per gigabyte."""
    for name, expected in hashes.items():
        if (got := file_sha256(folder / name)) != expected:
            return (
                f"{name} was changed: expected SHA-256 {expected}, got {got}. "
                f"To make this folder alone again, delete {folder}"
            )
    return None


def _export_stage(manifest: Manifest) -> Mapping[str, Any]:
    return manifest.stages[0] if manifest.stages else {}


def _tools_differ(manifest: Manifest, but: frozenset[str]) -> str | None:
    found, now = (
        {name: version for name, version in versions.items() if name not in but}
        for versions in (manifest.tools, tool_versions())
    )
    return difference("version", found, now)
