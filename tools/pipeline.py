"""``compile``: all stages, from a model to verified engines; what an earlier run has finished is taken over."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..engines.base import Profile
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..export.folder import recover
from ..export.replacing import replacing
from ..export.source import identify, resolve_source
from ..passes.recipe import Recipe
from . import console, stages
from .engines import (
    ENGINES,
    Sizes,
    check_options,
    deployment_graph,
    engine_name,
    find_profile,
    gather_sizes,
    has_profile,
    require_engine,
)
from .exporting import export_options
from .finished import engine_differs, finished_engine, float_differs, quantized_differs, statistics_differ
from .results import BuildStageResult, CompileResult
from .shipped import load_engine

REPORT = "compile.json"
Plan = tuple[str, tuple[int, ...]]
"""An engine and the capabilities to build it for."""


def compile(
    source: str | Path,
    recipe: str | Path | Recipe,
    engines: Sequence[str],
    data: Sequence[str],
    output: str | Path,
    *,
    verify_data: Sequence[str] = (),
    calibrate_windows: int = 8,
    verify_windows: int = 16,
    length: int = 512,
    rows: int = 256,
    seed: int = 0,
    alpha: float | None = None,
    max_share: float | None = None,
    opset: int = 23,
    kv_cache: bool | None = None,
    capabilities: Sequence[int] = (),
    batch: Sizes | None = None,
    sequence: Sizes | None = None,
    dims: Mapping[str, Sizes] | None = None,
    capacity: int | None = None,
    thresholds: Mapping[str, float | None] | None = None,
    allow_float: bool = False,
    memory: int | None = None,
    executor: str = "local",
    trust_remote_code: bool = False,
    copy_weights: bool = False,
    force: bool = False,
    restart: bool = False,
) -> CompileResult:
    """Run all stages: ``output/float`` and ``output/quantized``, with the engines and ``verify.json`` in the latter.

    Without ``verify_data``, the windows of ``data`` that follow those of the calibration are used. Without any data the
    weights alone decide, and nothing is verified.

    What an earlier run with the same inputs has left at ``output`` is kept; only verification is always done. What is
    there and would come out differently is an error before anything is changed, unless ``force`` makes all anew. A
    stage that was broken off goes on where it was; ``restart`` discards what it has done. ``memory`` is what this
    process, and a builder beside it, may take in bytes.

    Raises:
        BismoothError: bad input to any stage, an argument without effect, or results of other inputs at ``output``.
        GateError: linears that were meant to be INT8 fell back to float.
    """
    start = time.perf_counter()
    output = Path(output)
    evaluation = verify_data or data
    sizes = gather_sizes(batch, sequence, dims)
    chosen = stages.load_recipe(recipe, alpha, max_share, data_free=not data)
    options = export_options(
        chosen.compute_dtype,
        opset,
        kv_cache=kv_cache,
        trust_remote_code=trust_remote_code,
        copy_weights=copy_weights,
    )
    plans = _engine_plans(engines, capabilities, sizes, capacity)
    _check_inputs(chosen, [*data, *verify_data], thresholds or {}, data_free=not data)
    identity = identify(source, resolve_source(source, trust_remote_code=trust_remote_code))
    earlier = _Earlier(output, force=force)

    folder = output / "float"
    if not earlier.keeps(folder, lambda: float_differs(folder, identity, options)):
        _drop_report(output)
        stages.export(
            source,
            folder,
            dtype=chosen.compute_dtype,
            opset=opset,
            kv_cache=kv_cache,
            trust_remote_code=trust_remote_code,
            copy_weights=copy_weights,
            force=force,
        )
    artifact = Artifact.load(folder, "float")
    profile = _profile(artifact, plans, sizes, capacity)
    skipped = 0 if verify_data else calibrate_windows
    if evaluation:
        stages.check_length(artifact, length)
        _check_text(folder, evaluation, skipped + verify_windows, length)

    # what is kept is decided before the first long stage
    wanted = _wanted_statistics(artifact, data, calibrate_windows, length, rows, seed) if data else None
    statistics = folder / stages.STATISTICS
    has_statistics = wanted is None or earlier.keeps(
        statistics, lambda: statistics_differ(statistics, wanted, histograms=chosen.needs_histograms)
    )
    target = output / "quantized"
    is_quantized = earlier.keeps(target, lambda: quantized_differs(target, artifact.manifest, chosen, wanted))
    finished = _finished_engines(earlier, target, plans, profile, allow_float=allow_float) if is_quantized else {}
    _drop_report(output)

    if not has_statistics and not is_quantized:
        stages.calibrate(
            folder,
            data,
            windows=calibrate_windows,
            length=length,
            rows=rows,
            seed=seed,
            histograms=chosen.needs_histograms,
            memory=memory,
            executor=executor,
            restart=restart,
        )
    if not is_quantized:
        stages.quantize(
            folder,
            chosen,
            target,
            data_free=not data,
            memory=memory,
            executor=executor,
            force=force,
            restart=restart,
        )
    built = [
        finished.get((engine, group))
        or stages.build(
            target,
            engine,
            capabilities=group,
            dims=sizes if has_profile(engine) else None,
            capacity=capacity if has_profile(engine) else None,
            allow_float=allow_float,
            memory=memory,
        )
        for engine, group in plans
    ]
    verified = None
    if evaluation:
        verified = stages.verify(
            target,
            evaluation,
            windows=verify_windows,
            length=length,
            thresholds=thresholds,
            skip_windows=skipped,
            memory=memory,
            restart=restart,
        )
    result = CompileResult(
        Artifact.load(target, "quantized"),
        tuple(built),
        verified,
        tuple(earlier.kept),
        time.perf_counter() - start,
        peak_rss(),
    )
    with replacing(output / REPORT) as temporary:
        temporary.write_text(console.json_text(result.to_json()), "utf-8")
    return result


class _Earlier:
    """What an earlier run has left, and what of it was ``kept``, as paths below the output folder."""

    def __init__(self, output: Path, *, force: bool) -> None:
        self._output, self._force = output, force
        self.kept: list[str] = []

    def keeps(self, path: Path, differs: Callable[[], str | None]) -> bool:
        """Whether ``path`` is there, and is to be kept.

        Raises:
            BismoothError: it is there, and is not what this run would make.
        """
        recover(path)
        if self._force or not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return False
        try:
            difference = differs()
        except BismoothError as error:
            difference = str(error)
        if difference:
            raise BismoothError(
                f"{path}: is there from an earlier run and cannot be kept: {difference.removesuffix('.')}. "
                "Choose another output folder, or pass --force to make everything anew."
            )
        self.kept.append(path.relative_to(self._output).as_posix())
        with console.progress() as report:
            report(f"keep {path}", 1, 1)
        return True


def _drop_report(output: Path) -> None:
    """A report of an earlier run must not outlive what it reports on."""
    with suppress(OSError):  # then nothing can be written there: the next stage says so
        (output / REPORT).unlink()


def _check_inputs(
    recipe: Recipe, sources: Sequence[str], thresholds: Mapping[str, float | None], *, data_free: bool
) -> None:
    """Find out now what a later stage would refuse, before the first stage has run.

    Raises:
        BismoothError: a text or a gate that cannot be used, or a recipe that needs text where there is none.
    """
    from ..calibrators.data import RANDOM
    from ..calibrators.sources import check_source

    for source in sources:
        if source != RANDOM:
            check_source(source)
    if data_free and recipe.has_static_scales:
        raise BismoothError(
            f"recipe {recipe.name}: has static activation scales, which come from text. Expected --data FILE, "
            "got none. Or take a recipe with per-token activations."
        )
    recipe.gates.replaced(thresholds)
    if thresholds and not sources:
        raise BismoothError(
            f"--gate {next(iter(thresholds))}: has no effect: without text nothing is verified. "
            "Expected --data FILE or --verify-data FILE, got neither. Leave the gate out, or add text."
        )


def _check_text(artifact: Path, sources: Sequence[str], windows: int, length: int) -> None:
    """Raise :class:`BismoothError` now if there is too little text for verification."""
    from ..calibrators.data import load_tokenizer, load_windows

    load_windows(sources, load_tokenizer(artifact), windows=windows, length=length)


def _engine_plans(
    engines: Sequence[str], capabilities: Sequence[int], sizes: Mapping[str, Sizes], capacity: int | None
) -> list[Plan]:
    """One build per engine; SM75 cannot share one with other capabilities.

    Raises:
        BismoothError: no engine, one that is unknown or not installed, or options that none of the engines heeds.
    """
    if not engines:
        raise BismoothError(f"compile: got no engine. Expected at least one of {', '.join(ENGINES)}.")
    capabilities = tuple(dict.fromkeys(capabilities))
    plans: list[Plan] = []
    for engine in dict.fromkeys(engines):
        require_engine(engine)
        if engine != "tensorrt-rtx":
            plans.append((engine, ()))
            continue
        wanted = capabilities or (75, 80, 86, 89, 120)
        groups = (tuple(c for c in wanted if c == 75), tuple(c for c in wanted if c != 75))
        plans += [(engine, group) for group in groups if group]
    if capabilities and "tensorrt-rtx" not in engines:
        raise BismoothError(
            f"--capability {' '.join(map(str, capabilities))}: has no effect without the engine tensorrt-rtx, got "
            f"{', '.join(engines)}. Leave it out, or add the engine."
        )
    heeds_sizes = any(has_profile(engine) for engine in engines)
    for engine, group in plans:
        heeded = has_profile(engine) or not heeds_sizes
        check_options(engine, group, sizes if heeded else {}, capacity if heeded else None)
    return plans


def _profile(artifact: Artifact, plans: Sequence[Plan], sizes: Mapping[str, Sizes], capacity: int | None) -> Profile:
    engine = next((engine for engine, _ in plans if has_profile(engine)), None)
    return (
        Profile()
        if engine is None
        else find_profile(deployment_graph(artifact, engine), sizes, stages.positions(artifact), capacity)
    )


def _wanted_statistics(
    artifact: Artifact, data: Sequence[str], windows: int, length: int, rows: int, seed: int
) -> dict[str, Any]:
    """The record that calibration on this text will have."""
    from ..calibrators.data import load_tokenizer, load_windows
    from ..calibrators.run import provenance_of

    text = load_windows(data, load_tokenizer(artifact.path), windows=windows, length=length, seed=seed)
    provenance = provenance_of(artifact.graph("float32"), text.ids, seed)
    return {**asdict(provenance), "rows": min(rows, text.ids.size)}


def _finished_engines(
    earlier: _Earlier, target: Path, plans: Sequence[Plan], profile: Profile, *, allow_float: bool
) -> dict[Plan, BuildStageResult]:
    """The engines that need not be built again."""
    artifact = Artifact.load(target, "quantized")
    finished: dict[Plan, BuildStageResult] = {}

    def differs(folder: Path, engine: str, group: tuple[int, ...]) -> str | None:
        shipped = load_engine(folder, artifact)
        built = finished[engine, group] = finished_engine(shipped)  # kept, or else the run ends here
        graph = deployment_graph(artifact, engine)
        return engine_differs(shipped, built, engine, graph, group, profile, allow_float=allow_float)

    for engine, group in plans:
        folder = target / "engines" / engine_name(engine, group)
        earlier.keeps(folder, partial(differs, folder, engine, group))
    return finished


def peak_rss() -> int:
    """Peak resident memory in bytes of this process and of its largest child."""
    usages = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usages) * 1024
