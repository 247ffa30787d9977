"""Run an artifact on the GPU of this machine: the INT8 engine against the engine of the float graph in 16 bits.

Engines for this GPU that the artifact already has are used; missing ones are built into ``engines/device-…`` of the
artifact, and found there the next time. One engine at a time is on the GPU.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.base import BuildRequest, EngineBuilder, EngineRecord, Profile, Span
from ..engines.cuda import Device, cuda_available, load_cuda
from ..engines.publish import read_record
from ..engines.tensorrt_runtime import RUNTIMES, Runtime, known_capabilities, load_module
from ..engines.tensorrt_session import EngineSession
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..export.graph_names import INPUT_IDS
from ..export.hashing import file_sha256
from .comparison import Figures, Ids, Values, WindowFile
from .engines import find_builder, lint_for
from .meant import engine_source, meant_int8
from .shipped import find_engines

Progress = Callable[[str, int, int], None]
Update = Callable[[Ids, Values, Values], None]

RUNS = 20
"""Runs whose median is an engine's latency."""

_ROLES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Target:
    """A GPU, and the installed runtime that builds and runs engines for it."""

    device: Device
    runtime: Runtime
    version: str

    @property
    def capabilities(self) -> tuple[int, ...]:
        """What to ask the builder for."""
        return (self.device.capability,) if self.runtime.ahead_of_time else ()

    def runs(self, record: EngineRecord) -> bool:
        """Whether the engine is for this runtime and GPU, as far as its record tells."""
        fits = not self.runtime.ahead_of_time or self.device.capability in record.capabilities
        return fits and (record.runtime, record.version) == (self.runtime.name, self.version)


@dataclass(frozen=True)
class _Plan:
    """One of the two engines: the graph that it is made of, and where it is or will be."""

    graph: Path
    engine: Path
    source: dict[str, Any]
    meant_int8: frozenset[str]


def find_target(artifact: Artifact) -> Target | str:
    """Where to run the artifact, or why it cannot be run on a GPU of this machine."""
    if _role(artifact) is None:
        return "the artifact has no float graph in 16 bits to compare with"
    if reason := cuda_available():
        return reason
    device = load_cuda().device()
    reasons: list[str] = []
    for runtime in RUNTIMES.values():
        found = _try_runtime(runtime, device)
        if isinstance(found, Target):
            return found
        reasons.append(found)
    return f"no engine can be built for {device.name} (compute capability {device.capability}): {' '.join(reasons)}"


def compare_engines(
    target: Target,
    artifact: Artifact,
    ids: Ids,
    update: Update,
    progress: Progress,
    builder: EngineBuilder | None = None,
) -> Figures:
    """Run both engines on token windows ids [N, S]; for each window call ``update(ids, float, int8)``.

    Args:
        builder: of missing engines; by default the one of the target's runtime.

    Returns:
        The device, and the latency in milliseconds of one window in either engine: the median of :data:`RUNS` runs
        without copies from and to the host.

    Raises:
        BismoothError: an engine cannot be built or run, or there is no space for the outputs of the first.
    """
    role = _role(artifact)
    assert role is not None, "find_target says so"
    chosen = builder or find_builder(target.runtime.name)
    engines = [_engine(target, artifact, name, ids, chosen, progress) for name in (f"reference_{role}", role)]
    with WindowFile([artifact.path, Path(tempfile.gettempdir())], len(ids)) as outputs:
        with EngineSession(engines[0]) as session:
            for values in _windows(session, ids, "run the float engine", progress):
                outputs.append(values)
            float_latency = _latency(session, ids)
        with EngineSession(engines[1]) as session:
            for number, values in enumerate(_windows(session, ids, "run the INT8 engine", progress)):
                update(ids[number], outputs.read(number), values)
            latency = _latency(session, ids)
    return {
        "device": target.device.name,
        "capability": target.device.capability,
        "runtime": f"{target.runtime.title} {target.version}",
        "engine_files": [str(engine.relative_to(artifact.path)) for engine in engines],
        "float_latency_ms": float_latency,
        "latency_ms": latency,
        "speedup": float_latency / latency,
    }


def _role(artifact: Artifact) -> str | None:
    """The 16-bit type in which the artifact has both its float and its quantized graph."""
    graphs = artifact.manifest.graphs
    return next((role for role in _ROLES if role in graphs and f"reference_{role}" in graphs), None)


def _try_runtime(runtime: Runtime, device: Device) -> Target | str:
    try:
        trt = load_module(runtime)
    except BismoothError as error:
        return str(error)
    if runtime.ahead_of_time and device.capability not in (known := known_capabilities(trt)):
        names = ", ".join(map(str, sorted(known)))
        return f"{runtime.name}: {runtime.title} {trt.__version__} builds for {names}."
    return Target(device, runtime, trt.__version__)


def _engine(
    target: Target, artifact: Artifact, role: str, ids: Ids, builder: EngineBuilder, progress: Progress
) -> Path:
    """An engine of the graph ``role`` for this GPU and these windows: one that is there, or a new one."""
    plan = _plan(target, artifact, role)
    length = ids.shape[1]
    candidates = [*_shipped(artifact, role), (plan.engine, _intact(plan.engine))]
    for engine, record in candidates:
        if record and target.runs(record) and _covers(record, length) and _made_of(record, plan):
            return engine
    lint_for(plan.graph, target.runtime.name, (target.device.capability,))
    request = BuildRequest(
        onnx=plan.graph,
        engine=plan.engine,
        capabilities=target.capabilities,
        profile=Profile(batch=Span(1, 1, 1), sequence=Span(1, length, length), capacity=length),
        meant_int8=plan.meant_int8,
        allow_float=True,  # the audit judges that; here counts what comes out
        source=plan.source,
    )
    builder.build(request, lambda phase: progress(f"build {role}: {phase.name}", phase.done, phase.total))
    return plan.engine


def _plan(target: Target, artifact: Artifact, role: str) -> _Plan:
    graph = artifact.graph(role)
    folder = f"device-{target.runtime.name}-sm{target.device.capability}"
    # two folders deep: `engines/*/` are those that the audit judges
    engine = artifact.path / "engines" / folder / role / "model.engine"
    source = engine_source(artifact) | {"graph_sha256": file_sha256(graph)}
    return _Plan(graph, engine, source, meant_int8(artifact) if role in _ROLES else frozenset())


def _shipped(artifact: Artifact, role: str) -> list[tuple[Path, EngineRecord | None]]:
    """The engines that ``bismooth build`` made of the artifact, which are all of its quantized 16-bit graph."""
    if role not in _ROLES:
        return []
    engines, _ = find_engines(artifact)
    # what was built on a GPU does not say on which
    return [(engine.file, engine.record) for engine in engines if engine.record.capabilities and not engine.is_chain]


def _made_of(record: EngineRecord, plan: _Plan) -> bool:
    """Whether the engine's source is that of the plan, as far as both tell."""
    source = {key: value for key, value in plan.source.items() if key != "graph_sha256" or key in record.source}
    return all(key in record.source and record.source[key] == value for key, value in source.items())


def _covers(record: EngineRecord, length: int) -> bool:
    """Whether the profile has windows of one batch and this length."""
    names = (INPUT_IDS,) if record.caches else record.shapes
    return all(
        low <= size <= high
        for smallest, _, largest in (record.shapes[name] for name in names)
        for low, size, high in zip(smallest, (1, length), largest, strict=False)
    )


def _intact(engine: Path) -> EngineRecord | None:
    """The record, if the engine is the one that was recorded."""
    with suppress(BismoothError):
        record = read_record(engine)
        return record if engine.is_file() and file_sha256(engine) == record.sha256 else None
    return None


def _windows(session: EngineSession, ids: Ids, step: str, progress: Progress) -> Iterator[Values]:
    for number, values in enumerate(session.windows(ids)):
        yield values[0]
        progress(step, number + 1, len(ids))


def _latency(session: EngineSession, ids: Ids) -> float:
    """Median in milliseconds."""
    return 1e3 * statistics.median(session.latencies(ids[:1], RUNS))
