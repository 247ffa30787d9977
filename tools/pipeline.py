"""``compile``: all stages, from a model to verified engines."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..calibrators.replacing import replacing
from ..export.errors import BismoothError
from ..passes.recipe import Recipe
from . import console, stages
from .results import CompileResult


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
    batch: stages.Sizes | None = None,
    sequence: stages.Sizes | None = None,
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
    chosen = stages.load_recipe(recipe, alpha, data_free=not data)
    plans = _engine_plans(engines, capabilities)
    _check_inputs(chosen, engines, [*data, *verify_data], data_free=not data)
    if force:
        with suppress(OSError):  # then nothing can be written there: the export says so
            (output / "compile.json").unlink()
    exported = stages.export(
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
        stages.calibrate(
            exported.artifact,
            data,
            windows=calibrate_windows,
            length=length,
            rows=rows,
            seed=seed,
            histograms=chosen.needs_histograms,
        )
    quantized = stages.quantize(exported.artifact, chosen, output / "quantized", data_free=not data, force=force)
    built = [
        stages.build(
            quantized.artifact, engine, capabilities=group, batch=batch, sequence=sequence, allow_float=allow_float
        )
        for engine, group in plans
    ]
    verified = None
    if verify_data or data:
        verified = stages.verify(
            quantized.artifact,
            verify_data or data,
            windows=verify_windows,
            length=length,
            thresholds=thresholds,
            skip_windows=0 if verify_data else calibrate_windows,
        )
    result = CompileResult(exported, quantized, tuple(built), verified, time.perf_counter() - start, peak_rss())
    with replacing(output / "compile.json") as temporary:
        temporary.write_text(console.json_text(result.to_json()), "utf-8")
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
