"""What a bundle's manifest says of the artifact whose engines it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..engines.base import audit_path
from ..engines.publish import read_audit
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..export.graph_names import INPUT_IDS, has_caches
from ..passes.gates import Hop
from .hops import FORMAT, HopResult
from .licence import Licence
from .meant import engine_source, quantize_stage
from .shipped import ShippedEngine

VERDICT = "verify.json"
_FIGURES = ("reference_perplexity", "perplexity", "perplexity_ratio", "kl", "top1")

Plain = Mapping[str, Any]


def describe(
    artifact: Artifact, engines: Sequence[ShippedEngine], licence: Licence, verdict: Plain | None, files: Plain
) -> dict[str, Any]:
    """Content of ``bundle.json``, but for what :func:`..engines.bundle_manifest.write_manifest` adds.

    Args:
        files: size and SHA-256 by path in the bundle.
    """
    manifest, stage = artifact.manifest, quantize_stage(artifact)
    source = _source_name(artifact)
    stem = Path(source).name.removesuffix(".gguf").removesuffix(".onnx")
    return {
        "name": f"{stem}-{stage['recipe']['name']}" if stage else stem,
        "architecture": manifest.architecture,
        "decodes": _decodes(artifact),
        "dims": manifest.dims,
        "source": {
            "name": source,
            "format": manifest.source.get("format"),
            "fingerprint": manifest.source.get("fingerprint"),
            "content_sha256": manifest.content_sha256,
        },
        "recipe": {**stage["recipe"], "fingerprint": stage["fingerprint"]} if stage else None,
        "licence": {
            "id": licence.id,
            "stated_by": licence.stated_by,
            "files": [file.name for file in licence.files],
        },
        "verdict": verdict,
        "engines": {engine.folder.name: _engine(engine, artifact, files) for engine in engines},
        "tools": manifest.tools,
        "files": dict(files),
    }


def read_verdict(artifact: Artifact) -> dict[str, Any] | None:
    """The verdict on an artifact, in short; ``None`` if there is none.

    Raises:
        BismoothError: ``verify.json`` is damaged, or of something else.
    """
    path = artifact.path / VERDICT
    if not path.is_file():
        return None
    try:
        document = cast(dict[str, Any], json.loads(path.read_text("utf-8")))
        if document["format"] != FORMAT:
            raise ValueError(f"it has no format {FORMAT!r}")
        hops = [_hop(hop) for hop in document["hops"]]
        judged = document["source"]
        short = {key: document[key] for key in ("verdict", "windows", "length", "failures")}
        names = [Path(name).name for name in document.get("data", ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BismoothError(f"{path}: not a verdict: {error}. Run 'bismooth verify' again.") from error
    for key, expected in engine_source(artifact).items():
        if (got := judged.get(key)) != expected:
            raise BismoothError(
                f"{path}: is no verdict on this artifact. Expected {key} {expected}, got {got}. "
                "Run 'bismooth verify' again."
            )
    audited = [name for hop in hops if hop.hop is Hop.AUDIT for name in hop.metrics.get("engines", ())]
    return {
        **short,
        "data": names,
        "data_sha256": document.get("data_sha256"),
        **{key: document.get(key) for key in _FIGURES},
        "hops": [hop.to_row() | {"note": hop.note()} for hop in hops],
        "engines": audited,
    }


def _hop(data: Plain) -> HopResult:
    return HopResult(
        Hop(data["hop"]),
        data["compared"],
        data["metrics"],
        tuple(data["judged"]),
        tuple(data["failures"]),
        data["skipped"],
        data["windows"],
        data["seconds"],
    )


def _source_name(artifact: Artifact) -> str:
    """What the source is called: a hub id, or the name of a folder or file without the path to it."""
    path = str(artifact.manifest.source.get("path") or artifact.manifest.architecture or "model")
    return Path(path).name if Path(path).is_absolute() else path


def _decodes(artifact: Artifact) -> bool:
    """Whether the graph takes keys and values of earlier tokens."""
    from ..export.external_data import load_model

    return has_caches(value.name for value in load_model(artifact.graph("float32")).graph.input)


def _engine(engine: ShippedEngine, artifact: Artifact, files: Plain) -> dict[str, Any]:
    record, audit = engine.record, read_audit(audit_path(engine.file))
    folder = f"engines/{engine.folder.name}/"
    return {
        "runtime": record.runtime,
        "version": record.version,
        "capabilities": list(record.capabilities),
        "capacity": _capacity(engine, artifact),
        "file": f"{folder}{engine.file.name}",
        "files": [name for name in files if name.startswith(folder)],
        "audit": {
            "linears": len(audit.linears),
            "int8_linears": sum(linear.int8 for linear in audit.linears),
            "int8_mac_share": audit.int8_share(with_head=False),
            "int8_mac_with_head_share": audit.int8_share(with_head=True),
            "int8_gemms": audit.int8_gemms,
            "fused_attention": audit.fused_attention,
            "kernels": audit.kernels,
            "fallbacks": len(audit.fallbacks),
        },
    }


def _capacity(engine: ShippedEngine, artifact: Artifact) -> int | None:
    """The most positions of a row: of the engine's caches, else of its longest input, else of the model."""
    if engine.record.caches is not None:
        return engine.record.caches.capacity
    if shapes := engine.record.shapes.get(INPUT_IDS):
        return shapes[2][-1]
    return artifact.manifest.dims.get("max_position_embeddings")
