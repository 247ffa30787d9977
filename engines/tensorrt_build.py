"""Build an engine with a TensorRT Python module, in this process.

One code for three: ``tensorrt_rtx`` 1.x, ``tensorrt`` 10.x and ``tensorrt`` 11.x, whose APIs differ in what
:mod:`.tensorrt_runtime` says and in the flag for strong typing, which 10.x needs and the others imply. ``trt: Any`` is
that untyped module, everywhere below.

NOTE: run it through :mod:`.tensorrt_worker`. TensorRT keeps the first logger of a process, so that later builds would
log to that one, and a fault in its compiler kills the process.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from ..export.errors import BismoothError
from .base import Phase, PhaseCallback, Profile, Shapes, Span
from .kernel_log import HEADER
from .memory import peak_rss
from .tensorrt_runtime import Runtime, check_capabilities, known_capabilities

Spans = dict[str, tuple[int, int, int]]
"""Minimum, optimum and maximum by symbolic dimension."""

_SOURCE_POSITION = re.compile(r"^\w+\.cpp:\d+: ")
_ASSERTION = re.compile(r"(In node -1 with name:  and operator:  \(\w+\): \w+: )?Assertion failed: .*?: (?=[A-Z])")
_REPETITION = "ModelImporter.cpp"
_GPU_COMPLAINT = "catchCudaError"
_PHASE_INTERVAL_S = 0.1


@dataclass(frozen=True)
class PlanRequest:
    """What the builder process is asked for; see :class:`.base.BuildRequest`.

    Attributes:
        onnx: the graph's file, by which messages name it and where its weights are looked for.
        graph: a file with another form of that graph, which is built instead; empty for none.
        profiles: an optimization profile each.
    """

    runtime: str
    onnx: str
    plan: str
    log: str
    capabilities: tuple[int, ...]
    profiles: tuple[Spans, ...]
    graph: str = ""


@dataclass(frozen=True)
class PlanReport:
    """What the builder process has done; see :class:`.base.EngineRecord`. ``shapes`` are those of each profile."""

    version: str
    capabilities: tuple[int, ...]
    shapes: tuple[Shapes, ...]
    peak_rss: int | None


def build_plan(trt: Any, runtime: Runtime, request: PlanRequest, on_phase: PhaseCallback) -> PlanReport:
    """Build the engine, write it to ``request.plan`` and the builder's verbose log to ``request.log``.

    Raises:
        BismoothError: the request, the graph or this machine does not permit it.
        OSError: a file cannot be written.
    """
    known = known_capabilities(trt) if runtime.ahead_of_time else ()
    capabilities = check_capabilities(runtime, request.capabilities, known)
    with Path(request.log).open("w", encoding="utf-8", errors="replace", newline="\n", buffering=1) as sink:
        shapes = _build(trt, runtime, replace(request, capabilities=capabilities), sink, on_phase)
    return PlanReport(trt.__version__, capabilities, shapes, peak_rss())


def _build(
    trt: Any, runtime: Runtime, request: PlanRequest, sink: TextIO, on_phase: PhaseCallback
) -> tuple[Shapes, ...]:
    """Build and write the engine; returns its input shapes. All objects of TensorRT, which may log, end here."""
    log, monitor = _make_logger(trt, sink), _make_monitor(trt, on_phase)
    builder = _create_builder(trt, runtime, log)
    network = builder.create_network(_network_flags(trt, runtime))
    parser = _parse(trt, runtime, network, log, request)
    config, shapes = _configure(trt, builder, network, request)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    del parser  # it owns the weights, so it had to outlive the build
    if plan is None:
        raise BismoothError(f"{request.onnx}: {_title(trt, runtime)} cannot build an engine: {_reasons(log.errors)}")
    Path(request.plan).write_bytes(memoryview(plan))
    if not log.listed:
        sink.write(_inspect(trt, runtime, log, plan))
    return shapes


def _network_flags(trt: Any, runtime: Runtime) -> int:
    """Strong typing is a flag in TensorRT 10, and the only mode of TensorRT 11 and TensorRT-RTX."""
    major = int(trt.__version__.partition(".")[0])
    if runtime.ahead_of_time or major >= 11:
        return 0
    if major < 10:
        raise BismoothError(f"{runtime.name}: version {trt.__version__} is too old. Expected 10 or later; upgrade it.")
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _create_builder(trt: Any, runtime: Runtime, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except (RuntimeError, TypeError) as error:  # the binding's constructor got no object
        advice = (
            "Check its installation."
            if runtime.ahead_of_time
            else "It builds only where the target GPU is. Build on that host, or use tensorrt-rtx, which needs no GPU."
        )
        raise BismoothError(f"{_title(trt, runtime)} cannot start: {_reasons(log.errors) or error} {advice}") from error


def _parse(trt: Any, runtime: Runtime, network: Any, log: Any, request: PlanRequest) -> Any:
    """Read the ONNX file; weights are mapped, not copied. The returned parser owns them."""
    parser, onnx = trt.OnnxParser(network, log), request.onnx
    lowered = Path(request.graph).read_bytes() if request.graph else None
    if not (parser.parse_from_file(onnx) if lowered is None else parser.parse(lowered, onnx)):
        errors = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
        causes = _reasons([error for error in log.errors if not error.startswith(_REPETITION)])
        reasons = "; ".join([*errors, *([causes] if causes else [])])
        raise BismoothError(f"{onnx}: {_title(trt, runtime)} cannot read the graph: {reasons}")
    if not network.num_outputs:
        raise BismoothError(f"{onnx}: the graph has no outputs. Expected an ONNX model; make the artifact again.")
    _permit_unfused_attention(trt, network)
    return parser


def _permit_unfused_attention(trt: Any, network: Any) -> None:
    """Let attention that has no fused kernel (head sizes below 16, say) become several kernels."""
    kinds = getattr(trt, "LayerType", None)
    boundary = getattr(kinds, "ATTENTION_INPUT", None)
    if boundary is None:  # before TensorRT 10.14 the parser takes attention apart itself
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == boundary:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _describe(error: Any) -> str:
    """A parser error as ``node 'name' (Operator): what (CODE)``."""
    code = str(error.code()).rpartition(".")[2]
    text = _clean(error.desc()) or code
    name, operator = error.node_name(), error.node_operator()
    return f"node '{name}' ({operator}): {text} ({code})" if operator else f"{text} ({code})"


def _clean(message: str) -> str:
    """The message without source code and complaints about the missing GPU."""
    lines = [line for line in message.splitlines() if _GPU_COMPLAINT not in line]
    return " ".join(_ASSERTION.sub("", _SOURCE_POSITION.sub("", line)).strip() for line in lines)


def _reasons(errors: list[str]) -> str:
    return "; ".join(dict.fromkeys(reason for error in errors if (reason := _clean(error))))


def _title(trt: Any, runtime: Runtime) -> str:
    return f"{runtime.title} {trt.__version__}"


def _configure(trt: Any, builder: Any, network: Any, request: PlanRequest) -> tuple[Any, tuple[Shapes, ...]]:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.capabilities:
        config.num_compute_capabilities = len(request.capabilities)
        for index, capability in enumerate(request.capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
    profiles = tuple(_shapes(network, spans) for spans in request.profiles)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, triple in shapes.items():
            profile.set_shape(name, *triple)
        if config.add_optimization_profile(profile) < 0:
            raise BismoothError(
                f"{request.onnx}: the builder refuses the optimization profile {shapes}. "
                "Expected sizes the graph allows."
            )
    return config, profiles


def _shapes(network: Any, sizes: Spans) -> Shapes:
    spans = {name: Span(*triple) for name, triple in sizes.items()}
    profile = Profile(spans.pop("batch"), spans.pop("sequence"), spans)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    return {tensor.name: profile.shapes(tensor.name, _dimensions(tensor)) for tensor in inputs}


def _dimensions(tensor: Any) -> tuple[int | str | None, ...]:
    return tuple(size if size >= 0 else tensor.get_dimension_name(axis) for axis, size in enumerate(tensor.shape))


def _inspect(trt: Any, runtime: Runtime, log: Any, plan: Any) -> str:
    """The kernel listing from the engine itself, for versions whose builder does not log it; that takes a GPU."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise BismoothError(
            f"{_title(trt, runtime)} neither logs the engine's kernels nor loads the engine to list them: "
            f"{_reasons(log.errors)}. Without them it cannot be audited; use another version."
        )
    listing: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE)
    return listing if listing.startswith(HEADER) else f"{HEADER}\n{listing}"


def _make_logger(trt: Any, sink: TextIO) -> Any:
    """A logger for any thread: writes all to ``sink``, keeps ``errors``, knows whether the kernels were ``listed``."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lock = threading.Lock()
            self.errors: list[str] = []
            self.listed = False

        def log(self, severity: Any, message: str) -> None:
            with self._lock:
                sink.write(f"{message}\n")
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    self.errors.append(message)
                self.listed = self.listed or message.startswith(HEADER)

    return Logger()


def _make_monitor(trt: Any, on_phase: PhaseCallback) -> Any:
    """A progress monitor that reports the innermost phase. TensorRT calls it from any thread, thousands of times."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._phases: list[Phase] = []
            self._reported = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases.append(Phase(phase_name, 0, num_steps))
                self._report(now=True)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self._phases = [
                    Phase(phase.name, step + 1, phase.total) if phase.name == phase_name else phase
                    for phase in self._phases
                ]
                self._report(now=False)
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases = [phase for phase in self._phases if phase.name != phase_name]
                self._report(now=True)

        def _report(self, now: bool) -> None:
            elapsed = time.monotonic() - self._reported
            if self._phases and (now or elapsed >= _PHASE_INTERVAL_S):
                self._reported = time.monotonic()
                on_phase(self._phases[-1])

    return Monitor()
