"""The stages: each reads an artifact, does one step of the way to an engine, and writes an artifact."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..export.artifact import Artifact, Manifest, new_folder, place_file, scan_files, write_manifest
from ..export.errors import BismoothError
from ..export.hashing import file_sha256, hashing
from ..export.model import export_model
from ..export.replacing import replacing
from ..export.versions import tool_versions
from ..passes.gates import Gates, Hop
from ..passes.recipe import Recipe
from ..passes.spec import ComputeType
from . import console
from .meant import engine_source, meant_int8, quantize_stage
from .results import BuildStageResult, CalibrateResult, CompileResult, ExportResult, QuantizeStageResult
from .verify import VerifyResult, verify_artifact

if TYPE_CHECKING:
    import torch

    from ..calibrators.calibration import StatisticsCalibration

STATISTICS = "statistics.safetensors"
Sizes = tuple[int, int, int]


def export(
    source: str | Path,
    output: Path,
    *,
    dtype: ComputeType = ComputeType.FLOAT16,
    opset: int = 23,
    trust_remote_code: bool = False,
    force: bool = False,
) -> ExportResult:
    """Turn a model into a float artifact: ``model.onnx`` in float32, and a graph in ``dtype`` beside it.

    Raises:
        BismoothError: the source or the output folder cannot be used.
    """
    with console.progress() as progress:
        return _exported(
            lambda folder: export_model(source, folder, trust_remote_code=trust_remote_code, progress=progress),
            output,
            dtype,
            opset,
            force,
        )


def export_module(
    module: torch.nn.Module,
    output: Path,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dtype: ComputeType = ComputeType.FLOAT16,
    opset: int = 23,
    force: bool = False,
) -> ExportResult:
    """Turn any torch module, with example inputs, into a float artifact; the module is not changed.

    Args:
        module: as it is in evaluation mode.
        output: the folder to write.
        args: example inputs.
        kwargs: example inputs by name.
        dynamic_shapes: which sizes may vary, as for ``torch.onnx.export``: ``({0: "batch"},)``.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs.
        dtype: see :func:`export`.
        opset: see :func:`export`.
        force: replace an artifact at ``output``.

    Raises:
        BismoothError: the module cannot be traced, or the output folder cannot be used.
    """
    from ..export.module import export_module as write

    return _exported(
        lambda folder: write(
            module,
            folder,
            args,
            kwargs,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
        ),
        output,
        dtype,
        opset,
        force,
    )


def _exported(
    write: Callable[[Path], Manifest], output: Path, dtype: ComputeType, opset: int, force: bool
) -> ExportResult:
    """The artifact whose float32 graph and weights ``write`` puts into a folder."""
    from ..passes.graph import load
    from ..passes.linears import find_linears

    start = time.perf_counter()
    with new_folder(output, force=force) as folder:
        manifest = write(folder)
        graph = load(folder / manifest.graphs["float32"])
        linears = len(find_linears(graph))
        graphs = _lower_export(graph, folder, manifest, dtype, opset)
        stage = {"stage": "export", "dtype": str(dtype), "opset": opset}
        manifest = replace(manifest, graphs=graphs, stages=(stage,))
        _finish(folder, manifest)
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return ExportResult(
        output, manifest.architecture, tuple(graphs.values()), linears, weights, time.perf_counter() - start
    )


def _lower_export(graph: Any, folder: Path, manifest: Manifest, dtype: ComputeType, opset: int) -> dict[str, str]:
    """Lower to opset 20 if asked, and add the graph in a 16-bit type."""
    from ..passes.decompose import Decompose
    from ..passes.graph import save
    from ..passes.precision import SetPrecision

    if opset not in (20, 23):
        raise BismoothError(f"--opset {opset}: Expected 23, or 20 for TensorRT 10.")
    graphs = dict(manifest.graphs)
    if opset == 20:
        Decompose().apply(graph)
        save(graph, folder / graphs["float32"])
    if dtype is not ComputeType.FLOAT32:
        SetPrecision(dtype.value).apply(graph)
        graphs[dtype.value] = f"model.{dtype.value}.onnx"
        save(graph, folder / graphs[dtype.value])
    return graphs


def calibrate(
    artifact: Path,
    data: Sequence[str],
    *,
    windows: int = 8,
    length: int = 512,
    rows: int = 256,
    seed: int = 0,
    batch_size: int = 1,
    histograms: bool = False,
    output: Path | None = None,
) -> CalibrateResult:
    """Run text through the float graph and write statistics of the inputs of all linears.

    Raises:
        BismoothError: the artifact or the text cannot be used.
    """
    from ..calibrators.data import load_tokenizer, load_windows
    from ..calibrators.run import calibrate as run
    from ..passes.graph import load
    from ..passes.linears import find_linears

    start = time.perf_counter()
    loaded = Artifact.load(artifact, "float")
    text = load_windows(data, load_tokenizer(artifact), windows=windows, length=length, seed=seed)
    values = list(dict.fromkeys(linear.x for linear in find_linears(load(loaded.graph("float32")))))
    target = output or artifact / STATISTICS
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
    )
    return CalibrateResult(target, len(values), windows, length, text.sha256, time.perf_counter() - start)


def quantize(
    artifact: Path,
    recipe: str | Path | Recipe,
    output: Path,
    *,
    data_free: bool = False,
    statistics: Path | None = None,
    alpha: float | None = None,
    force: bool = False,
) -> QuantizeStageResult:
    """Smooth and quantize a float artifact by a recipe.

    Raises:
        BismoothError: recipe and model do not fit, statistics are missing or of another model, a weight is broken.
    """
    from ..passes.quantize import WEIGHTS, quantize_graph

    start = time.perf_counter()
    loaded = Artifact.load(artifact, "float")
    chosen = _with_alpha(Recipe.load(recipe), alpha, data_free)
    if output.absolute() == artifact.absolute():
        raise BismoothError(f"{output}: is the artifact that is read. Choose another output folder.")
    calibration = None if data_free else _calibration(loaded, statistics, chosen)
    with console.progress() as progress, new_folder(output, force=force) as folder:
        with hashing(_carry(loaded, folder)) as hashes:
            result = quantize_graph(loaded.graph("float32"), folder, chosen, calibration, progress)
            digests = hashes() | {WEIGHTS: file_sha256(folder / WEIGHTS)}
        loaded.check_files()  # nobody has modified the weights meanwhile
        stage: dict[str, Any] = {
            "stage": "quantize",
            "recipe": chosen.to_dict() | {"name": chosen.name},
            "fingerprint": chosen.fingerprint,
            "statistics": None if calibration is None else asdict(calibration.provenance),
            "quantized": [asdict(linear) for linear in result.linears],
            "float": list(result.float_linears),
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
        _finish(folder, manifest, digests)
        size = (folder / WEIGHTS).stat().st_size
    return QuantizeStageResult(output, chosen.name, result, size, time.perf_counter() - start)


def _with_alpha(recipe: Recipe, alpha: float | None, data_free: bool) -> Recipe:
    if alpha is None:
        return recipe
    if data_free or not recipe.smooths:
        reason = "without data, the weights alone decide" if data_free else f"the recipe {recipe.name} does not smooth"
        raise BismoothError(f"--alpha {alpha:g}: has no effect: {reason}. Leave it out, or smooth with statistics.")
    return recipe.with_alpha(alpha)


def _calibration(artifact: Artifact, statistics: Path | None, recipe: Recipe) -> StatisticsCalibration | None:
    from ..calibrators.calibration import StatisticsCalibration
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
    return StatisticsCalibration(loaded)


def _carry(artifact: Artifact, folder: Path) -> dict[str, Path]:
    """Bring the files that later stages need: weights as links, tokenizer and configuration as copies; the former."""
    placed: dict[str, Path] = {}
    for name in artifact.manifest.files:
        path = artifact.path / name
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".onnx" or name == STATISTICS:
            continue
        if path.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copyfile(path, target)
        else:
            place_file(path, target)
            placed[name] = target
    return placed


def build(
    artifact: Path,
    engine: str,
    *,
    capabilities: Sequence[int] = (),
    output: Path | None = None,
    batch: Sizes | None = None,
    sequence: Sizes | None = None,
    allow_float: bool = False,
    force: bool = False,
) -> BuildStageResult:
    """Build an engine of an artifact into a folder of its own, with its audit.

    Raises:
        BismoothError: the engine cannot be built.
        GateError: linears that were meant to be INT8 fell back to float.
    """
    from ..engines.base import BuildRequest, Profile, Span
    from .engines import deployment_graph, engine_file, find_builder, lint_for

    loaded = Artifact.load(artifact, "float", "quantized")
    builder = find_builder(engine)
    graph = deployment_graph(loaded, engine)
    if engine == "tensorrt-rtx" and not capabilities:
        raise BismoothError(
            "tensorrt-rtx: builds ahead of time for named compute capabilities. "
            "Expected --capability 86 89 …, got none."
        )
    lint_for(graph, engine, capabilities)
    name = "-".join([engine, *(f"sm{capability}" for capability in capabilities)])
    target = output or artifact / "engines" / name
    profile = Profile(
        batch=Span(*batch) if batch else Profile().batch, sequence=Span(*sequence) if sequence else Profile().sequence
    )
    with console.progress() as progress, new_folder(target, force=force) as folder:
        request = BuildRequest(
            onnx=graph,
            engine=folder / engine_file(engine),
            capabilities=tuple(capabilities),
            profile=profile,
            meant_int8=meant_int8(loaded),
            allow_float=allow_float,
            source=engine_source(loaded) | {"architecture": loaded.manifest.architecture},
        )
        result = builder.build(request, lambda phase: progress(f"{name}: {phase.name}", phase.done, phase.total))
        stage = {"stage": "build", "engine": engine, "record": result.record.to_json()}
        manifest = replace(loaded.manifest, kind="engine", graphs={}, files={}, tools=tool_versions())
        _finish(folder, replace(manifest, stages=(*loaded.manifest.stages, stage)), loaded.manifest.hashes)
    moved = replace(result, engine=target / engine_file(engine), audit_file=target / result.audit_file.name)
    return BuildStageResult(target, moved)


def verify(
    artifact: Path,
    data: Sequence[str],
    *,
    windows: int = 16,
    length: int = 512,
    hops: Sequence[Hop] = (),
    thresholds: Mapping[str, float | None] | None = None,
    output: Path | None = None,
    skip_windows: int = 0,
) -> VerifyResult:
    """Judge every hop of an artifact on text, and write the report to ``output`` (``verify.json`` in the artifact).

    A run of some ``hops`` alone is no verdict on the artifact: its report goes to ``verify-partial.json``.

    Raises:
        BismoothError: the artifact or the text cannot be used.
    """
    from ..calibrators.data import load_tokenizer, load_windows

    loaded = Artifact.load(artifact, "float", "quantized")
    gates = _gates(loaded).replaced(dict(thresholds or {}))
    text = load_windows(data, load_tokenizer(artifact), windows=windows + skip_windows, length=length)
    with console.progress() as progress:
        result = verify_artifact(loaded, text.ids[skip_windows:], gates, tuple(hops) or tuple(Hop), progress)
    result = replace(result, data={"data": list(map(str, data)), "data_sha256": text.sha256})
    _write_json(output or artifact / ("verify-partial.json" if hops else "verify.json"), result.to_json())
    return result


def _gates(artifact: Artifact) -> Gates:
    if not (stage := quantize_stage(artifact)):
        return Recipe.load("fp16").gates
    plain = {key: value for key, value in stage["recipe"].items() if key != "name"}
    return Recipe.from_dict(plain, name=stage["recipe"]["name"]).gates


def inspect(path: Path) -> Any:
    """What an artifact, an engine folder or an ONNX file holds, and the linter's findings.

    Raises:
        BismoothError: the path is none of these.
    """
    from .inspect import inspect_path

    return inspect_path(path)


def compile(
    source: str | Path,
    recipe: str | Path | Recipe,
    engines: Sequence[str],
    data: Sequence[str],
    output: Path,
    *,
    verify_data: Sequence[str] = (),
    calibrate_windows: int = 8,
    verify_windows: int = 16,
    length: int = 512,
    rows: int = 256,
    seed: int = 0,
    alpha: float | None = None,
    opset: int = 23,
    capabilities: Sequence[int] = (),
    batch: Sizes | None = None,
    sequence: Sizes | None = None,
    thresholds: Mapping[str, float | None] | None = None,
    allow_float: bool = False,
    trust_remote_code: bool = False,
    force: bool = False,
) -> CompileResult:
    """Run all stages: ``output/float`` and ``output/quantized``, with the engines and ``verify.json`` in the latter.

    Without ``verify_data``, the windows of ``data`` that follow those of the calibration are used. Without any data the
    weights alone decide, and nothing is verified.

    Raises:
        BismoothError: bad input to any stage.
        GateError: linears that were meant to be INT8 fell back to float.
    """
    start = time.perf_counter()
    chosen = _with_alpha(Recipe.load(recipe), alpha, data_free=not data)
    plans = _engine_plans(engines, capabilities)
    _check_inputs(chosen, engines, [*data, *verify_data], data_free=not data)
    if force:
        with suppress(OSError):  # then nothing can be written there: the export says so
            (output / "compile.json").unlink()
    exported = export(
        source,
        output / "float",
        dtype=chosen.compute_dtype,
        opset=opset,
        trust_remote_code=trust_remote_code,
        force=force,
    )
    if verify_data or data:
        skipped = 0 if verify_data else calibrate_windows
        _check_text(exported.artifact, verify_data or data, skipped + verify_windows, length)
    if data:
        calibrate(
            exported.artifact,
            data,
            windows=calibrate_windows,
            length=length,
            rows=rows,
            seed=seed,
            histograms=chosen.needs_histograms,
        )
    quantized = quantize(exported.artifact, chosen, output / "quantized", data_free=not data, alpha=alpha, force=force)
    built = [
        build(quantized.artifact, engine, capabilities=group, batch=batch, sequence=sequence, allow_float=allow_float)
        for engine, group in plans
    ]
    verified = None
    if verify_data or data:
        verified = verify(
            quantized.artifact,
            verify_data or data,
            windows=verify_windows,
            length=length,
            thresholds=thresholds,
            skip_windows=0 if verify_data else calibrate_windows,
        )
    result = CompileResult(exported, quantized, tuple(built), verified, time.perf_counter() - start, peak_rss())
    _write_json(output / "compile.json", result.to_json())
    return result


def _check_inputs(recipe: Recipe, engines: Sequence[str], sources: Sequence[str], *, data_free: bool) -> None:
    """Find out now what a later stage would refuse, before the first stage has run.

    Raises:
        BismoothError: an engine or a text that cannot be used, or a recipe that needs text where there is none.
    """
    from ..calibrators.data import RANDOM
    from ..calibrators.sources import check_source
    from .engines import require_engine

    for engine in engines:
        require_engine(engine)
    for source in sources:
        if source != RANDOM:
            check_source(source)
    if data_free and recipe.has_static_scales:
        raise BismoothError(
            f"recipe {recipe.name}: has static activation scales, which come from text. Expected --data FILE, "
            "got none. Or take a recipe with per-token activations."
        )


def _check_text(artifact: Path, sources: Sequence[str], windows: int, length: int) -> None:
    """Raise :class:`BismoothError` now if there is too little text for verification."""
    from ..calibrators.data import load_tokenizer, load_windows

    load_windows(sources, load_tokenizer(artifact), windows=windows, length=length)


def _engine_plans(engines: Sequence[str], capabilities: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """One build per engine; SM75 cannot share one with other capabilities."""
    plans: list[tuple[str, tuple[int, ...]]] = []
    for engine in engines:
        if engine != "tensorrt-rtx":
            plans.append((engine, ()))
            continue
        wanted = tuple(capabilities) or (75, 80, 86, 89, 120)
        groups = (tuple(c for c in wanted if c == 75), tuple(c for c in wanted if c != 75))
        plans += [(engine, group) for group in groups if group]
    return plans


def peak_rss() -> int:
    """Peak resident memory in bytes of this process and of its largest child."""
    usages = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usages) * 1024


def _finish(folder: Path, manifest: Manifest, hashes: Mapping[str, str] = MappingProxyType({})) -> None:
    write_manifest(folder, replace(manifest, files=scan_files(folder, hashes)))


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(console.json_text(document), "utf-8")
