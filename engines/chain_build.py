"""Build the parts of a chain one after the other, by any builder, into one folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from ..export.graph_names import has_caches
from ..export.hashing import file_sha256
from ..export.replacing import scratch_folder
from .audit import Audit, Figures
from .base import BuildRequest, BuildResult, Caches, EngineBuilder, EngineRecord, Phase, PhaseCallback, Shapes
from .build_memory import BuildPlan
from .chain import CHAIN, BuiltPart, Chain
from .chain_cut import Part
from .footprint import tensor_bytes
from .publish import publish


def build_chain(
    builder: EngineBuilder, request: BuildRequest, plan: BuildPlan, on_phase: PhaseCallback | None = None
) -> BuildResult:
    """Build and audit the parts of ``plan``, each as ``request`` says, into the folder of ``request.engine``.

    They are called by its suffix: ``part-00.engine``. The chain is itself recorded and audited as one engine, whose
    file is ``chain.json``: its audit joins those of the parts.

    Raises:
        BismoothError: as :meth:`.base.EngineBuilder.build` does, with the part that cannot be built; or a linear that
            was meant to be INT8 is in no part, or in two.
        GateError: in a part, a linear that was meant to be INT8 is not, and ``request.allow_float`` is false.
    """
    parts, folder = plan.parts, request.engine.parent
    _check_meant(request, parts)
    cached = has_caches(value.name for part in parts for value in part.model.graph.input)
    request = replace(request, logits=request.logits or ("last" if cached else "all"))
    results: list[BuildResult] = []
    placed: set[str] = set()
    for number, part in enumerate(parts, 1):
        wanted = _request(request, part, placed)
        placed |= _weight_files(part)
        results.append(_build(builder, wanted, f"part {number} of {len(parts)}", on_phase))
    built = [
        _describe(part, result, estimate) for part, result, estimate in zip(parts, results, plan.estimates, strict=True)
    ]
    return _publish(folder / CHAIN, Chain(tuple(built)), results, sorted(placed))


def _check_meant(request: BuildRequest, parts: Sequence[Part]) -> None:
    counts = Counter(node.name for part in parts for node in part.model.graph.node)
    for node in sorted(request.meant_int8):
        if counts[node] != 1:
            raise BismoothError(
                f"{request.onnx}: the linear '{node}', which is meant to be INT8, is in {counts[node]} parts of the "
                "chain. Expected one. Build it without --split-blocks."
            )


def _request(request: BuildRequest, part: Part, placed: Iterable[str]) -> BuildRequest:
    nodes = {node.name for node in part.model.graph.node}
    return replace(
        request,
        engine=request.engine.with_stem(part.name),
        meant_int8=request.meant_int8 & nodes,
        log=request.log and request.log.with_stem(f"{request.log.stem}.{part.name}"),
        part=part.model.SerializeToString(),
        placed=frozenset(placed),
    )


def _weight_files(part: Part) -> set[str]:
    return {
        entry.value
        for tensor in part.model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _build(builder: EngineBuilder, request: BuildRequest, label: str, on_phase: PhaseCallback | None) -> BuildResult:
    def report(phase: Phase) -> None:
        if on_phase:
            on_phase(replace(phase, name=f"{label}: {phase.name}"))

    try:
        return builder.build(request, report)
    except BismoothError as error:
        raise type(error)(f"{label}: {error}") from error


def _describe(part: Part, result: BuildResult, estimate: int) -> BuiltPart:
    graph = part.model.graph
    record = result.record
    inputs = [value.name for value in graph.input]
    inputs += [name for name in record.shapes if name not in inputs]  # what the builder has added
    return BuiltPart(
        name=part.name,
        holds=part.holds,
        blocks=part.blocks,
        file=result.engine.name,
        sha256=record.sha256,
        reads=part.reads,
        gives=part.gives,
        inputs=tuple(inputs),
        outputs=tuple(value.name for value in graph.output),
        linears=tuple(linear.node for linear in result.audit.linears),
        weights_bytes=sum(map(tensor_bytes, graph.initializer)),
        estimated_memory_bytes=estimate,
        peak_rss_bytes=result.peak_rss,
        build_seconds=round(result.seconds, 2),
    )


def _publish(target: Path, chain: Chain, results: Sequence[BuildResult], weights: Iterable[str]) -> BuildResult:
    audit = join_audits([result.audit for result in results])
    with scratch_folder(target) as scratch:
        staged = scratch / target.name
        staged.write_text(json.dumps(chain.to_json(), indent=1) + "\n", "utf-8")
        files = [staged, *(result.engine for result in results), *(target.parent / name for name in weights)]
        record = _join_records(
            [result.record for result in results],
            inner={part.gives.name for part in chain.parts if part.gives is not None},
            size=sum(file.stat().st_size for file in files if file.is_file()),
            sha256=file_sha256(staged),
        )
        audit_file = publish(staged, target, record, audit)
    peaks = [result.peak_rss for result in results if result.peak_rss is not None]
    seconds = sum(result.seconds for result in results)
    return BuildResult(target, audit_file, record, audit, seconds, max(peaks, default=None))


def join_audits(audits: Sequence[Audit]) -> Audit:
    """The audit of engines that run one after the other: kernels and memory of activations add up."""
    profiles = zip(*(audit.others for audit in audits), strict=True)
    return Audit(
        **_joined(audits),
        linears=tuple(linear for audit in audits for linear in audit.linears),
        others=tuple(Figures(**_joined(figures)) for figures in profiles),
    )


def _joined(figures: Sequence[Figures]) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    for one in figures:
        kinds.update(one.kinds)
    sizes = [one.activation_bytes for one in figures if one.activation_bytes is not None]
    return {
        "kinds": dict(kinds),
        "gemms": sum(one.gemms for one in figures),
        "int8_gemms": sum(one.int8_gemms for one in figures),
        "fused_attention": sum(one.fused_attention for one in figures),
        "activation_bytes": sum(sizes) if len(sizes) == len(figures) else None,
    }


def _join_records(records: Sequence[EngineRecord], *, inner: set[str], size: int, sha256: str) -> EngineRecord:
    """The record of the chain, whose inputs are those of its parts but for the tensors between them, ``inner``."""

    def outer(shapes: Iterable[Shapes]) -> Mapping[str, Any]:
        return {name: triple for one in shapes for name, triple in one.items() if name not in inner}

    caches = [record.caches for record in records if record.caches is not None]
    aliases = {past: present for cache in caches for past, present in cache.aliases.items()}
    return replace(
        records[0],
        shapes=outer(record.shapes for record in records),
        bytes=size,
        sha256=sha256,
        caches=Caches(caches[0].capacity, aliases, outer(cache.decode for cache in caches)) if caches else None,
    )
