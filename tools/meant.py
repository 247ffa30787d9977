"""What the manifests of quantized artifacts and of engines say of their making."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..export.artifact import Artifact
from ..export.errors import BismoothError

if TYPE_CHECKING:
    from ..calibrators.statistics import Statistics

_KEYS = ("recipe", "fingerprint", "quantized")
_LINEAR_KEYS = ("name", "node", "int8")


def quantize_stage(artifact: Artifact) -> Mapping[str, Any]:
    """The manifest's entry of the stage; empty for a float artifact.

    Raises:
        BismoothError: the entry is missing, or not as this version of bismooth writes it.
    """
    stage = next((stage for stage in artifact.manifest.stages if stage.get("stage") == "quantize"), dict[str, Any]())
    if not stage:
        if artifact.manifest.kind == "quantized":
            raise other_version(artifact, ["quantize"])
        return stage
    missing = [key for key in _KEYS if key not in stage]
    if not isinstance(recipe := stage.get("recipe", {"name": ""}), dict) or "name" not in recipe:
        missing.append("recipe.name")
    missing += [key for key in _LINEAR_KEYS if any(key not in linear for linear in stage.get("quantized", ()))]
    if missing:
        raise other_version(artifact, missing)
    return stage


def other_version(artifact: Artifact, missing: Sequence[str]) -> BismoothError:
    """The error to raise where the entry of the stage lacks keys."""
    return BismoothError(
        f"{artifact.path}: was quantized by another version of bismooth: its manifest lacks {', '.join(missing)}. "
        "Run 'bismooth quantize' again."
    )


def groups_of(linears: Sequence[Mapping[str, Any]], broken: Sequence[str] | None) -> dict[str, Any]:
    """How many quantized linears have groups; if it was looked for, how many break, and those of them that have none.

    Args:
        linears: The stage's entries of them.
        broken: Names of those that one scale per output channel breaks; None if the recipe did not ask.
    """
    grouped = {linear["name"]: bool(linear.get("group") or linear.get("walls")) for linear in linears}
    counts: dict[str, Any] = {"linears_with_groups": sum(grouped.values())}
    if broken is None:
        return counts
    left = [name for name in broken if not grouped.get(name, True)]
    return {"broken_linears": len(broken), **counts, "left_broken": left}


def meant_int8(artifact: Artifact) -> frozenset[str]:
    """ONNX nodes of the linears whose weight and activation are quantized: those are to run as INT8 products."""
    linears = [linear for linear in quantize_stage(artifact).get("quantized", ()) if linear["int8"]]
    return frozenset(node for linear in linears for node in (linear["node"], *linear.get("wall_nodes", ())))


def engine_source(artifact: Artifact) -> dict[str, Any]:
    """What an engine of the artifact is made of, as it is recorded with the engine."""
    stage = quantize_stage(artifact)
    source: dict[str, Any] = {"fingerprint": artifact.manifest.source.get("fingerprint")}
    if stage:
        source |= {"recipe": stage["recipe"]["name"], "recipe_fingerprint": stage["fingerprint"]}
        source["content_sha256"] = artifact.manifest.content_sha256
    return source


def statistics_record(statistics: Statistics) -> dict[str, Any]:
    """What statistics were taken from, as it is recorded with what is made of them."""
    return {**asdict(statistics.provenance), "rows": len(statistics.row_numbers)}
