"""The stages: each reads an artifact, does one step of the way to an engine, and writes an artifact."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.artifact import Artifact, finish_folder, new_folder, place_file
from ..export.errors import BismoothError
from ..export.hashing import array_sha256, file_sha256, hashing
from ..export.replacing import check_replaceable, replacing
from ..export.versions import tool_versions
from ..passes.gates import Gates, Hop
from ..passes.recipe import WALLS, Recipe
from . import console
from .exporting import copies_weights, export, export_module
from .hops import is_report
from .meant import engine_source, meant_int8, quantize_stage, statistics_record
from .results import BuildStageResult, CalibrateResult, QuantizeStageResult
from .verify import VerifyResult, check_gates, find_hops, verify_artifact

if TYPE_CHECKING:
    from ..calibrators.statistics import Statistics
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

STATISTICS = "statistics.safetensors"


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
    memory: int | None = None,
    restart: bool = False,
    output: str | Path | None = None,
) -> CalibrateResult:
    """Run text through the float graph and write statistics of the inputs of all linears.

    Raises:
        BismoothError: the artifact or the text cannot be used, or ``output`` is a file of another kind.
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
    with console.progress() as progress:
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
            memory=memory,
            restart=restart,
            progress=progress,
        )
    return CalibrateResult(target, len(values), windows, length, text.sha256, time.perf_counter() - start)


def quantize(
    artifact: str | Path,
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    data_free: bool = False,
    statistics: str | Path | None = None,
    alpha: float | None = None,
    max_share: float | None = None,
    force: bool = False,
) -> QuantizeStageResult:
    """Smooth and quantize a float artifact by a recipe.

    Raises:
        BismoothError: recipe and model do not fit, statistics are missing or of another model, a weight is broken.
    """
    from ..calibrators.calibration import StatisticsCalibration
    from ..passes.quantize import WEIGHTS, quantize_graph

    start = time.perf_counter()
    artifact, output, statistics = Path(artifact), Path(output), Path(statistics) if statistics else None
    loaded = Artifact.load(artifact, "float")
    chosen = load_recipe(recipe, alpha, max_share, data_free=data_free)
    _check_statistics(statistics, chosen, data_free=data_free)
    found = None if data_free else _find_statistics(loaded, statistics, chosen)
    calibration, used = (None, None) if found is None else (StatisticsCalibration(found), statistics_record(found))
    inputs = [path for path in (artifact, statistics) if path is not None]
    with console.progress() as progress, new_folder(output, "quantized", force=force, inputs=inputs) as folder:
        with hashing(_carry(loaded, folder)) as hashes:
            source, role = loaded.graph("float32"), chosen.compute_dtype.value
            narrow = loaded.graph(role) if role != "float32" and role in loaded.manifest.graphs else None
            result = quantize_graph(source, folder, chosen, calibration, progress, narrow_source=narrow)
            digests = hashes() | {WEIGHTS: file_sha256(folder / WEIGHTS)}
        loaded.check_files()  # nobody has modified the weights meanwhile
        stage: dict[str, Any] = {
            "stage": "quantize",
            "recipe": chosen.to_dict() | {"name": chosen.name},
            "fingerprint": chosen.fingerprint,
            "statistics": used,
            "quantized": [asdict(linear) for linear in result.linears],
            "float": list(result.float_linears),
            "broken": result.broken and list(result.broken),
            "sites": [asdict(choice) for choice in result.choices],
            "rejected": [asdict(item) for item in result.rejected],
            "fold_errors": result.fold_errors,
            "fold_errors_compute": {name: asdict(error) for name, error in result.fold_errors_compute.items()},
            "passes": [asdict(record) for record in result.passes],
        }
        manifest = replace(
            loaded.manifest,
            kind="quantized",
            graphs=result.graphs,
            tools=tool_versions(),
            stages=(*loaded.manifest.stages, stage),
        )
        finish_folder(folder, manifest, digests)
        size = (folder / WEIGHTS).stat().st_size
    return QuantizeStageResult(output, chosen.name, result, size, time.perf_counter() - start)


def load_recipe(
    source: str | Path | Recipe,
    alpha: float | None = None,
    max_share: float | None = None,
    *,
    data_free: bool = False,
) -> Recipe:
    """The recipe, with its α fixed to ``alpha`` and its ``max_share`` set.

    Raises:
        BismoothError: there is no such recipe, it is not valid, or ``alpha`` or ``max_share`` changes nothing.
    """
    recipe = Recipe.load(source)
    if max_share is not None:
        if not 0 <= max_share <= 1:
            raise BismoothError(f"--max-share {max_share:g}: Expected a share from 0 to 1.")
        if not recipe.selects_walls:
            raise BismoothError(
                f"--max-share {max_share:g}: has no effect: the recipe {recipe.name} has no rule for {WALLS}. Leave it "
                "out, or take a recipe that has one (w8a8-mixed)."
            )
        recipe = replace(recipe, max_share=max_share)
    if alpha is None:
        return recipe
    if data_free or not recipe.smooths:
        reason = f"the recipe {recipe.name} does not smooth. Leave it out, or take a recipe that smooths."
        if recipe.smooths:
            reason = "without data, the weights alone decide. Leave it out, or smooth with statistics."
        raise BismoothError(f"--alpha {alpha:g}: has no effect: {reason}")
    return recipe.with_alpha(alpha)


def _check_statistics(statistics: Path | None, recipe: Recipe, *, data_free: bool) -> None:
    if statistics is not None and (data_free or not recipe.needs_statistics):
        reason = "--data none" if data_free else f"the recipe {recipe.name}"
        raise BismoothError(f"--statistics {statistics}: has no effect with {reason}. Leave one of them out.")


def _find_statistics(artifact: Artifact, statistics: Path | None, recipe: Recipe) -> Statistics | None:
    from ..calibrators.run import hash_model
    from ..calibrators.statistics import Statistics

    path = statistics or artifact.path / STATISTICS
    if not path.is_file():
        if statistics is None and not recipe.needs_statistics:
            return None
        raise BismoothError(
            f"{path}: there are no statistics. Expected those of 'bismooth calibrate {artifact.path} --data FILE'. "
            "Run it first, or pass --data none to smooth by the weights alone."
        )
    loaded = Statistics.load(path)
    loaded.check_graph(hash_model(artifact.graph("float32")))
    return loaded


def _carry(artifact: Artifact, folder: Path) -> dict[str, Path]:
    """Bring the files that later stages need: weights as links, what lies beside them as copies; the former, by name.

    Graphs, statistics and weight files that no graph refers to stay behind.
    """
    from ..export.external_data import weight_files

    weights = weight_files(artifact.graph("float32"))
    beside = [name for name in artifact.manifest.files if Path(name).suffix not in (".onnx", ".safetensors")]
    for name in dict.fromkeys([*weights, *beside]):
        path, target = artifact.path / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in weights:
            place_file(path, target, copy=copies_weights(artifact))
        else:
            shutil.copyfile(path, target)
    return {name: folder / name for name in weights}


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
        plain=load_graph(loaded.graph("reference")) if "reference" in loaded.manifest.graphs else None,
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
) -> VerifyResult:
    """Judge every hop of an artifact on text, and write the report to ``output`` (``verify.json`` in the artifact).

    A run of some ``hops`` alone is no verdict on the artifact: its report goes to ``verify-partial.json``.
    A gate in ``thresholds`` that nothing is held against, since its hop is skipped or has no such figure, is missed.

    Raises:
        BismoothError: the artifact or the text cannot be used, a hop is none of this artifact's, a gate is of a hop
            that is not run, or ``output`` is a file of another kind.
    """
    from ..calibrators.data import load_tokenizer, load_windows

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
    with console.progress() as progress:
        result = verify_artifact(loaded, ids, gates, hops, progress)
    result = replace(
        result.demanding([name for name, limit in limits.items() if limit is not None]),
        data={"data": list(map(str, data)), "data_sha256": array_sha256(ids)},
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
