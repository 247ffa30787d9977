"""The stages: each reads an artifact, does one step of the way to an engine, and writes an artifact."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.artifact import Artifact, finish_folder, new_folder
from ..export.errors import BismoothError
from ..export.fingerprint import run_fingerprint
from ..export.hashing import array_sha256
from ..export.replacing import check_replaceable, replacing
from ..export.state import open_state
from ..export.versions import tool_versions
from ..passes.gates import Gates, Hop
from ..passes.recipe import Recipe
from . import console
from .executors import open_spread
from .exporting import copies_weights, export, export_module
from .hops import is_report
from .meant import engine_source, meant_int8, quantize_stage
from .quantizing import STATISTICS, load_recipe, quantize
from .results import BuildStageResult, CalibrateResult
from .verify import VerifyResult, check_gates, find_hops, verify_artifact

if TYPE_CHECKING:
    from ..engines.base import Logits, Phase
    from .engines import Sizes

__all__ = [
    "STATISTICS",
    "build",
    "calibrate",
    "export",
    "export_module",
    "inspect",
    "load_recipe",
    "quantize",
    "verify",
]


def calibrate(
    artifact: str | Path,
    data: Sequence[str],
    *,
    windows: int = 8,
    length: int = 512,
    rows: int = 256,
    seed: int = 0,
    batch_size: int | None = None,
    histograms: bool = False,
    grams: bool = False,
    memory: int | None = None,
    executor: str = "local",
    restart: bool = False,
    output: str | Path | None = None,
) -> CalibrateResult:
    """Run text through the float graph and write statistics of the inputs of all linears.

    Batches of windows run on the machines of ``executor``, see :func:`.executors.open_executor`.

    Raises:
        BismoothError: the artifact or the text cannot be used, ``output`` is a file of another kind, or the executor
            cannot be used.
    """
    from ..calibrators.data import load_tokenizer, load_windows
    from ..calibrators.run import calibrate as run
    from ..calibrators.statistics import is_statistics
    from ..passes.graph import load
    from ..passes.linears import find_linears

    start = time.perf_counter()
    artifact = Path(artifact)
    target = Path(output or artifact / STATISTICS)
    if output is not None:
        check_replaceable(target, "a statistics file", is_statistics)
    loaded = Artifact.load(artifact, "float")
    check_length(loaded, length)
    text = load_windows(data, load_tokenizer(artifact), windows=windows, length=length, seed=seed)
    values = {linear.x: linear.k for linear in find_linears(load(loaded.graph("float32")))}
    with console.progress() as progress, open_spread(executor, loaded.files.values(), memory) as share:
        run(
            artifact,
            values,
            text.ids,
            target,
            graph=loaded.manifest.graphs["float32"],
            batch_size=batch_size,
            rows=rows,
            seed=seed,
            histograms=histograms,
            grams=grams,
            memory=share.memory,
            restart=restart,
            resumed=console.note_resumed,
            spread=share.spread,
            progress=progress,
        )
    return CalibrateResult(target, len(values), windows, length, text.sha256, time.perf_counter() - start)


def build(
    artifact: str | Path,
    engine: str,
    *,
    capabilities: Sequence[int] = (),
    output: str | Path | None = None,
    batch: Sizes | None = None,
    sequence: Sizes | None = None,
    dims: Mapping[str, Sizes] | None = None,
    capacity: int | None = None,
    logits: Logits | None = None,
    split_blocks: int | None = None,
    memory: int | None = None,
    allow_float: bool = False,
    force: bool = False,
) -> BuildStageResult:
    """Build an engine of an artifact, or a chain of engines of its parts, into a folder of its own, with its audit.

    Args:
        artifact: float or quantized.
        engine: its name.
        capabilities: compute capabilities (86 for SM86) to build for, of engines that are built ahead of time.
        output: the engine's folder, ``engines/NAME`` in the artifact by default, or ``engines/NAME-chainN``.
        batch: see ``dims``, for the dimension ``batch``.
        sequence: see ``dims``, for the dimension ``sequence``.
        dims: minimum, optimum and maximum of the graph's dynamic dimensions, by their names.
        capacity: positions that the caches of a row hold, of a graph that has caches.
        logits: ``all`` positions or the ``last`` of each row, in an engine for a CPU; ``None``: the last, with caches.
        split_blocks: build an engine each of the embedding, of so many ranges of blocks, and of the head.
        memory: bytes that this process and the builder may take; most of what the machine has left by default.
        allow_float: accept linears that were meant to be INT8 and run in float.
        force: replace an engine at ``output``.

    Raises:
        BismoothError: the engine cannot be built, an argument has no effect on it, or there is not enough memory.
        GateError: linears that were meant to be INT8 fell back to float.
    """
    from ..engines.base import BuildRequest, Profile
    from ..engines.build_memory import NEEDS, plan_build
    from ..engines.chain import CHAIN, Chain
    from ..engines.chain_build import build_chain
    from ..engines.companions import place_companions
    from ..engines.memory import format_bytes
    from ..engines.subgraph import load_graph
    from .engine_folder import engine_file
    from .engines import (
        check_options,
        deployment_graph,
        engine_name,
        find_builder,
        find_profile,
        gather_sizes,
        has_profile,
        lint_for,
    )

    artifact = Path(artifact)
    builder = find_builder(engine)
    sizes = gather_sizes(batch, sequence, dims)
    capabilities = tuple(dict.fromkeys(capabilities))
    check_options(engine, capabilities, sizes, capacity, logits)
    loaded = Artifact.load(artifact, "float", "quantized")
    graph = deployment_graph(loaded, engine)
    profile = find_profile(graph, sizes, positions(loaded), capacity) if has_profile(engine) else Profile()
    lint_for(graph, engine, capabilities)
    plan = plan_build(
        NEEDS[engine],
        load_graph(graph),
        str(graph),
        plain=load_graph(loaded.graph("reference" if "reference" in loaded.manifest.graphs else "float32")),
        split=split_blocks,
        memory=memory,
    )
    name = engine_name(engine, capabilities, split_blocks)
    target = Path(output or artifact / "engines" / name)
    console.note(f"{name}: the build takes about {format_bytes(plan.estimated)} of memory")
    with console.progress() as progress, new_folder(target, "engine", force=force, inputs=[artifact]) as folder:
        request = BuildRequest(
            onnx=graph,
            engine=folder / engine_file(engine),
            capabilities=capabilities,
            profile=profile,
            meant_int8=meant_int8(loaded),
            allow_float=allow_float,
            source=engine_source(loaded) | {"architecture": loaded.manifest.architecture},
            copy_weights=copies_weights(loaded),
            logits=logits,
        )
        report = partial(_report, progress, name)
        result = build_chain(builder, request, plan, report) if plan.parts else builder.build(request, report)
        place_companions(graph, folder)
        stage = {
            "stage": "build",
            "engine": engine,
            "record": result.record.to_json(),
            "build_seconds": round(result.seconds, 2),
            "estimated_memory_bytes": plan.estimated,
            "peak_rss_bytes": result.peak_rss,
            **({"chain": CHAIN} if plan.parts else {}),
        }
        manifest = replace(loaded.manifest, kind="engine", graphs={}, files={}, tools=tool_versions())
        finish_folder(folder, replace(manifest, stages=(*loaded.manifest.stages, stage)), loaded.manifest.hashes)
    moved = replace(result, engine=target / result.engine.name, audit_file=target / result.audit_file.name)
    return BuildStageResult(target, moved, plan.estimated, Chain.load(moved.engine) if plan.parts else None)


def _report(progress: console.Report, name: str, phase: Phase) -> None:
    progress(f"{name}: {phase.name}", phase.done, phase.total)


def verify(
    artifact: str | Path,
    data: Sequence[str],
    *,
    windows: int = 16,
    length: int = 512,
    hops: Sequence[Hop] = (),
    thresholds: Mapping[str, float | None] | None = None,
    output: str | Path | None = None,
    skip_windows: int = 0,
    memory: int | None = None,
    restart: bool = False,
) -> VerifyResult:
    """Judge every hop of an artifact on text, and write the report to ``output`` (``verify.json`` in the artifact).

    A run of some ``hops`` alone is no verdict on the artifact: its report goes to ``verify-partial.json``.
    A gate in ``thresholds`` that nothing is held against, since its hop is skipped or has no such figure, is missed.

    Raises:
        BismoothError: the artifact or the text cannot be used, a hop is none of this artifact's, a gate is of a hop
            that is not run, or ``output`` is a file of another kind.
    """
    from ..calibrators.data import load_tokenizer, load_windows
    from ..export.cores import default_threads

    artifact = Path(artifact)
    target = Path(output or artifact / ("verify-partial.json" if hops else "verify.json"))
    if output is not None:
        check_replaceable(target, "a report of 'bismooth verify'", is_report)
    loaded = Artifact.load(artifact, "float", "quantized")
    limits = dict(thresholds or {})
    gates = _gates(loaded).replaced(limits)
    check_gates(limits, find_hops(loaded, hops))
    check_length(loaded, length)
    text = load_windows(data, load_tokenizer(artifact), windows=windows + skip_windows, length=length)
    ids = text.ids[skip_windows:]
    digest = array_sha256(ids)
    fingerprint = run_fingerprint(
        loaded.files,
        source=loaded.manifest.source,
        windows=windows,
        skip_windows=skip_windows,
        length=length,
        data_sha256=digest,
        hops=sorted(hops),
        gates=gates.to_dict(),
        threads=default_threads(),
    )
    with open_state(target, "verify", fingerprint, restart=restart) as state, console.progress() as progress:
        console.note_resumed(state.resumed, state.progress)
        result = verify_artifact(loaded, ids, gates, hops, progress, memory=memory, state=state)
        result = replace(
            result.demanding([name for name, limit in limits.items() if limit is not None]),
            data={"data": list(map(str, data)), "data_sha256": digest},
        )
        with replacing(target) as temporary:
            temporary.write_text(console.json_text(result.to_json()), "utf-8")
    return result


def _gates(artifact: Artifact) -> Gates:
    if not (stage := quantize_stage(artifact)):
        return Recipe.load("fp16").gates
    plain = {key: value for key, value in stage["recipe"].items() if key != "name"}
    return Recipe.from_dict(plain, name=stage["recipe"]["name"]).gates


def inspect(path: str | Path) -> Any:
    """What an artifact, an engine folder or an ONNX file holds, and the linter's findings.

    Raises:
        BismoothError: the path is none of these.
    """
    from .inspect import inspect_path

    return inspect_path(Path(path))


def positions(artifact: Artifact) -> int | None:
    """The longest sequence that the model takes, where its configuration says so."""
    return artifact.manifest.dims.get("max_position_embeddings")


def check_length(artifact: Artifact, length: int) -> None:
    """Raise :class:`BismoothError` if windows of ``length`` tokens are longer than the model takes."""
    most = positions(artifact)
    if most is not None and length > most:
        raise BismoothError(
            f"--length {length}: the model has {most} positions (max_position_embeddings). Choose {most} or less."
        )
