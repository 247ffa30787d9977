"""What the manifest of a quantized artifact says of its quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..export.artifact import Artifact


def quantize_stage(artifact: Artifact) -> Mapping[str, Any]:
    """The manifest's entry of the stage; empty for a float artifact."""
    return next((stage for stage in artifact.manifest.stages if stage["stage"] == "quantize"), dict[str, Any]())


def meant_int8(artifact: Artifact) -> frozenset[str]:
    """ONNX nodes of the linears whose weight and activation are quantized: those are to run as INT8 products."""
    return frozenset(linear["node"] for linear in quantize_stage(artifact).get("quantized", ()) if linear["int8"])


def engine_source(artifact: Artifact) -> dict[str, Any]:
    """What an engine of the artifact is made of, as it is recorded with the engine."""
    stage = quantize_stage(artifact)
    source: dict[str, Any] = {"fingerprint": artifact.manifest.source.get("fingerprint")}
    if stage:
        source |= {"recipe": stage["recipe"]["name"], "recipe_fingerprint": stage["fingerprint"]}
        source["content_sha256"] = artifact.manifest.content_sha256
    return source
