"""Say what an artifact, an engine folder, a bundle or an ONNX file holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, cast

from ..engines.audit import Audit
from ..engines.base import audit_path
from ..engines.bundle_manifest import MANIFEST as BUNDLE
from ..engines.chain import CHAIN, Chain
from ..engines.publish import read_audit, read_record
from ..export.artifact import MANIFEST, Artifact
from ..export.errors import BismoothError
from ..export.folder import recover
from ..export.hashing import file_sha256
from ..export.safetensors_file import read_header
from . import console
from .engine_folder import engine_folders, is_chain
from .inspect_bundle import inspect_bundle
from .inspect_onnx import inspect_onnx
from .inspection import SHOWN, Inspection
from .meant import groups_of, other_version, quantize_stage, statistics_record
from .quantizing import STATISTICS
from .results import decode_figures, part_rows

VERDICT = "verify.json"
_VERDICT_KEYS = ("verdict", "windows", "perplexity_ratio", "kl", "top1")

Rows = Sequence[Mapping[str, Any]]


def inspect_path(path: Path) -> Inspection:
    """What an artifact, an engine, a bundle, statistics or an ONNX file holds; on the latter, the linter's findings.

    Raises:
        BismoothError: the path is none of these, or is damaged.
    """
    if (path / BUNDLE).is_file():
        return inspect_bundle(path)
    if path.is_dir():
        _check_folder(path)
        artifact = Artifact.load(path)
        return _engine_folder(artifact) if artifact.manifest.kind == "engine" else _artifact(artifact)
    if not path.is_file():
        raise BismoothError(f"{path}: does not exist. Expected an artifact folder, an engine folder or an ONNX file.")
    if path.suffix == ".gguf":
        raise BismoothError(f"{path}: is a GGUF model. Make an artifact of it: bismooth export {path} -o ART")
    if path.suffix == ".safetensors":
        return _statistics(path)
    if path.suffix == ".engine" or audit_path(path).is_file():
        return _engine_file(path)
    return inspect_onnx(path, foreign=not _is_listed(path))


def _check_folder(path: Path) -> None:
    """Say what a folder without a manifest is, where that is known."""
    recover(path)
    if (path / MANIFEST).is_file():
        return
    if engines := [*path.glob("*.engine"), *(file for file in path.glob("*.onnx") if audit_path(file).is_file())]:
        raise BismoothError(
            f"{path}: holds an engine without its {MANIFEST}. Look at the file: bismooth inspect {engines[0]}"
        )
    if inside := sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST}")):
        names = ", ".join(folder.name for folder in inside)
        raise BismoothError(f"{path}: no artifact itself, but holds {names}. Look at one: bismooth inspect {inside[0]}")
    if (path / "config.json").is_file():
        raise BismoothError(
            f"{path}: not a bismooth artifact, but a Hugging Face model. "
            f"Make an artifact of it: bismooth export {path} -o ART"
        )


def _statistics(path: Path) -> Inspection:
    """A file of ``calibrate``; weights are not for inspection."""
    from ..calibrators.statistics import ROW_NUMBERS, Statistics

    if ROW_NUMBERS not in read_header(path):
        raise BismoothError(
            f"{path}: holds weights, not statistics. Expected a file of 'bismooth calibrate'. "
            "Look at the artifact that it belongs to: bismooth inspect ART"
        )
    statistics = Statistics.load(path)
    document = {"path": str(path), "kind": "statistics", "values": len(statistics.names)}
    document |= {
        **statistics_record(statistics),
        "histograms": statistics.has_histograms,
        "grams": statistics.has_grams,
    }
    return Inspection(document, document)


def _engine_file(path: Path) -> Inspection:
    """An engine by its audit; a graph for ONNX Runtime is also linted for that."""
    record = read_record(path)
    if record.runtime == "onnxruntime":
        return inspect_onnx(path, targets=("onnxruntime",))
    document = {"path": str(path), "kind": "engine", "model": record.source.get("architecture")}
    return _engine(document, path)


def _is_listed(path: Path) -> bool:
    """Whether an artifact's manifest beside the file lists it as one of its graphs."""
    if not (path.parent / MANIFEST).is_file():
        return False
    return path.name in Artifact.load(path.parent).manifest.graphs.values()


def _artifact(artifact: Artifact) -> Inspection:
    manifest = artifact.manifest
    weights = sum(record.size for name, record in manifest.files.items() if name.endswith(".safetensors"))
    document: dict[str, Any] = {
        "path": str(artifact.path),
        "kind": manifest.kind,
        "model": manifest.architecture,
        "source": manifest.source,
        "graphs": manifest.graphs,
        "weights_bytes": weights,
        "dims": manifest.dims,
        "blocks": None
        if manifest.blocks is None
        else {"prefix": manifest.blocks.prefix, "kinds": manifest.blocks.kinds},
        "structure": _structure(artifact),
        "statistics": _calibrated_on(artifact),
        "stages": [stage["stage"] for stage in manifest.stages],
        "engines": [folder.name for folder in engine_folders(artifact)],
        "verify": _verdict(artifact.path / VERDICT),
        "tools": manifest.tools,
    }
    shown = document | {
        "source": f"{manifest.source.get('path')} ({manifest.source.get('format')})",
        "graphs": ", ".join(manifest.graphs),
        "dims": ", ".join(f"{name} {size}" for name, size in manifest.dims.items()) or "none",
        "blocks": _blocks(artifact),
        "structure": document["structure"] or "not known",
        "statistics": document["statistics"] or "none",
        "verify": document["verify"] or "not run",
    }
    del shown["tools"]
    if not (stage := quantize_stage(artifact)):
        return Inspection(document, shown)
    hashes = {"content_sha256": manifest.content_sha256, "files_sha256": manifest.hashes}
    try:
        return Inspection(document | hashes | _quantized(stage), shown | _quantized_brief(stage))
    except KeyError as error:
        raise other_version(artifact, [str(error.args[0])]) from error


def _structure(artifact: Artifact) -> dict[str, Any] | None:
    """Blocks and memory of a float artifact, where the packages are there that tell it."""
    if artifact.manifest.kind != "float" or not all(map(find_spec, ("onnx", "onnx_graphsurgeon", "onnxruntime"))):
        return None
    from .structure import find_structure

    with console.progress() as progress:
        progress("read the graph", 0, 1)
        structure = find_structure(artifact.graph("float32"))
        progress("read the graph", 1, 1)
    return structure


def _calibrated_on(artifact: Artifact) -> dict[str, Any] | None:
    """The text that a float artifact was calibrated on, and what else its statistics have."""
    if artifact.manifest.kind != "float" or not (path := artifact.path / STATISTICS).is_file():
        return None
    from ..calibrators.statistics import Statistics

    statistics = Statistics.load(path)
    text = statistics.provenance
    more = {"histograms": statistics.has_histograms, "grams": statistics.has_grams}
    return {"windows": text.windows, "length": text.length, **more}


def _blocks(artifact: Artifact) -> str:
    blocks = artifact.manifest.blocks
    if blocks is None:
        return "none"
    kinds = len(set(blocks.kinds))
    return f"{len(blocks.kinds)} in {blocks.prefix}, of {kinds} kind{'s' if kinds > 1 else ''}"


def _quantized(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "recipe": stage["recipe"],
        "recipe_fingerprint": stage["fingerprint"],
        "linears": stage["quantized"],
        "float_linears": stage["float"],
        "sites": stage["sites"],
        "rejected": stage["rejected"],
        "fold_errors": stage["fold_errors"],
        "passes": stage["passes"],
    }


def _quantized_brief(stage: Mapping[str, Any]) -> dict[str, Any]:
    linears, sites = cast(Rows, stage["quantized"]), cast(Rows, stage["sites"])
    by_error = sorted(linears, key=lambda linear: -linear["weight_error"])
    walls = [
        {"linear": row["name"], "channels": ", ".join(map(str, chain.from_iterable(row["walls"])))}
        for row in linears
        if row.get("walls")
    ]
    return {
        "recipe": stage["recipe"]["name"],
        "quantized_linears": len(linears),
        "float_linears": stage["float"],
        **groups_of(linears, stage.get("broken")),
        "largest_fold_error": max(stage["fold_errors"].values(), default=0.0),
        "sites_by_kind": _by_kind(sites),
        "worst_sites": [_site_row(site) for site in sorted(sites, key=_site_error)[:SHOWN]],
        "worst_weights": [
            {"linear": row["name"], "error_walls_included": row["weight_error"]} for row in by_error[:SHOWN]
        ],
        **({"walls": walls} if walls else {}),
        "not_smoothed": [
            {"count": count, "reason": reason}
            for reason, count in Counter(item["reason"] for item in stage["rejected"]).most_common(SHOWN)
        ],
    }


def _site_row(site: Mapping[str, Any]) -> dict[str, Any]:
    return {key: site.get(key) for key in ("site", "alpha", "error", "unsmoothed")}


def _site_error(site: Mapping[str, Any]) -> float:
    return -float(site.get("error") or 0.0)


def _by_kind(sites: Rows) -> list[dict[str, Any]]:
    """Per kind of site: how many there are, how many are smoothed, and the mean α and error."""
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(site["kind"] for site in sites):
        group = [site for site in sites if site["kind"] == kind]
        smoothed = sum(bool(site["channels"]) for site in group)
        means = {key: _mean(group, key) for key in ("alpha", "error", "unsmoothed")}
        rows.append({"kind": kind, "found": len(group), "smoothed": smoothed, **means})
    return rows


def _mean(rows: Rows, key: str) -> float | None:
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def _verdict(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        document = cast(dict[str, Any], json.loads(path.read_text("utf-8")))
        return {key: document[key] for key in _VERDICT_KEYS if key in document} | {"failures": document["failures"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BismoothError(f"{path}: not a verdict: {error}. Run 'bismooth verify' again.") from error


def _engine_folder(artifact: Artifact) -> Inspection:
    if is_chain(artifact):
        return _chain(artifact)
    audits = sorted(artifact.path.glob("*.audit.json"))
    if not audits:
        raise BismoothError(f"{artifact.path}: the engine has no audit beside it. Build the engine again.")
    document = {"path": str(artifact.path), "kind": "engine", "model": artifact.manifest.architecture}
    name = audits[0].name.removesuffix(".audit.json")
    found = _engine(document, artifact.path / f"{name}.engine", artifact.manifest.tools)
    file = next(path for path in artifact.path.glob(f"{name}.*") if path.suffix in (".engine", ".onnx"))
    return replace(found, failures=_damage(artifact, {file.name: found.document["engine"]["sha256"]}))


def _chain(artifact: Artifact) -> Inspection:
    """A chain: what is said of an engine, of all parts together, and a row per part."""
    file = artifact.path / CHAIN
    chain = Chain.load(file)
    document = {"path": str(artifact.path), "kind": "engine", "model": artifact.manifest.architecture}
    found = _engine(document, file, artifact.manifest.tools)
    hashes = {part.file: part.sha256 for part in chain.parts}
    return Inspection(
        {**found.document, "chain": chain.to_json()["parts"]},
        {**found.shown, "parts": part_rows(chain, read_audit(audit_path(file)))},
        _damage(artifact, {file.name: found.document["engine"]["sha256"], **hashes}),
    )


def _damage(artifact: Artifact, more: Mapping[str, str]) -> tuple[str, ...]:
    """A sentence for each file whose content is not the one on record. All that are on record are read."""
    hashes = {**artifact.manifest.hashes, **more}
    changed: list[str] = []
    with console.progress() as progress:
        for number, (name, expected) in enumerate(hashes.items(), 1):
            if (got := file_sha256(artifact.path / name)) != expected:
                path = artifact.path / name
                changed.append(f"{path}: expected SHA-256 {expected}, got {got}. Build the engine again.")
            progress("hash files", number, len(hashes))
    return tuple(changed)


def _engine(document: Mapping[str, Any], file: Path, tools: Mapping[str, str] | None = None) -> Inspection:
    """``file`` only names the audit beside it."""
    record, audit = read_record(file).to_json(), read_audit(audit_path(file))
    return Inspection(
        {**document, "engine": record, "audit": audit.to_json(), **({} if tools is None else {"tools": tools})},
        {**document, **_engine_brief(record, audit)},
    )


def _engine_brief(record: Mapping[str, Any], audit: Audit) -> dict[str, Any]:
    caches = record.get("caches", {"aliases": {}})
    shapes = {name: sizes for name, sizes in record["shapes"].items() if name not in caches["aliases"]}
    return {
        "runtime": f"{record['runtime']} {record['version']}",
        "recipe": record["source"].get("recipe", "none"),
        "capabilities": record["capabilities"],
        "engine_bytes": record["bytes"],
        "shapes": {name: _range(sizes) for name, sizes in shapes.items()} or "any",
        **({"capacity": caches["capacity"]} if "capacity" in caches else {}),
        "int8_linears": f"{sum(linear.int8 for linear in audit.linears)} of {len(audit.linears)}",
        "int8_mac_share": audit.int8_share(with_head=False),
        "int8_mac_with_head_share": audit.int8_share(with_head=True),
        "int8_gemms": audit.int8_gemms,
        "fused_attention": audit.fused_attention,
        "kernels": audit.kernels,
        **decode_figures(audit),
        "fallbacks": [str(linear) for linear in audit.fallbacks[:SHOWN]],
    }


def _range(shapes: Sequence[Sequence[int]]) -> str:
    """Minimum, optimum and maximum shape."""
    return " … ".join("×".join(map(str, shape)) for shape in shapes)
