"""Build and audit TensorRT engines: ahead of time with TensorRT-RTX, or with TensorRT where the target GPU is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..export.errors import BismoothError
from ..export.graph_names import LOGITS, has_caches
from ..export.hashing import file_sha256
from ..export.replacing import scratch_folder
from .audit import audit_log, check_meant
from .base import KEPT, BuildRequest, BuildResult, Caches, EngineRecord, PhaseCallback, Profile, Span
from .linears import summarize
from .publish import publish
from .tensorrt_build import PlanReport, PlanRequest, Spans
from .tensorrt_runtime import TENSORRT, TENSORRT_RTX, Runtime, require_package
from .tensorrt_worker import run_worker

__all__ = ["TENSORRT", "TENSORRT_RTX", "TensorRTBuilder"]


@dataclass(frozen=True)
class TensorRTBuilder:
    """Builds engines with ``runtime``, each in a process of its own (:mod:`.tensorrt_worker` says why)."""

    runtime: Runtime = TENSORRT_RTX

    @property
    def name(self) -> str:
        return self.runtime.name

    def build(self, request: BuildRequest, on_phase: PhaseCallback | None = None) -> BuildResult:
        """See :class:`.base.EngineBuilder`."""
        start = time.perf_counter()
        require_package(self.runtime)
        graph = summarize(request.onnx, request.part)
        check_meant(graph.linears, request.meant_int8)
        of_decoder = request.part is not None and request.profile.capacity is not None
        lowered = _Lowered(request) if of_decoder or has_caches(graph.inputs) else None
        with scratch_folder(request.engine) as folder, _kept_log(folder / "build.log", request.log) as log:
            plan = folder / "engine"
            asked = self._plan_request(request, plan, log)
            if lowered:
                asked = lowered.applied(asked, folder)
            elif request.part is not None:
                asked = _with_graph(asked, request.part, folder)
            report = run_worker(asked, on_phase)
            audit = audit_log(log.read_text("utf-8"), graph.linears, request.meant_int8)
            if not request.allow_float:
                audit.check(str(request.onnx))
            record = self._record(request, report, plan, lowered)
            audit_file = publish(plan, request.engine, record, audit)
        return BuildResult(request.engine, audit_file, record, audit, time.perf_counter() - start, report.peak_rss)

    def _plan_request(self, request: BuildRequest, plan: Path, log: Path) -> PlanRequest:
        return PlanRequest(
            runtime=self.runtime.name,
            onnx=str(request.onnx),
            plan=str(plan),
            log=str(log),
            capabilities=request.capabilities,
            profiles=(_spans(request.profile),),
        )

    def _record(self, request: BuildRequest, report: PlanReport, plan: Path, lowered: _Lowered | None) -> EngineRecord:
        return EngineRecord(
            runtime=self.runtime.name,
            version=report.version,
            capabilities=report.capabilities,
            shapes=report.shapes[0],
            bytes=plan.stat().st_size,
            sha256=file_sha256(plan),
            source=request.source,
            caches=lowered.record(report) if lowered else None,
        )


class _Lowered:
    """A graph with caches, rewritten to keep them in place; or a part of one, which may be without.

    Raises:
        BismoothError: the graph cannot be rewritten so, or the caches do not hold the longest sequence.
    """

    def __init__(self, request: BuildRequest) -> None:
        from .inplace_caches import update_in_place
        from .kept_logits import keep_logits
        from .subgraph import load_graph, parse_graph

        longest, self._capacity = request.profile.sequence.maximum, request.profile.capacity or 0
        if longest > self._capacity:
            raise BismoothError(
                f"{request.onnx}: caches of {self._capacity} positions do not hold sequences of {longest}. "
                f"Expected a profile with a capacity of at least {longest}, or with shorter sequences."
            )
        label = str(request.onnx)
        self._model = load_graph(request.onnx) if request.part is None else parse_graph(request.part, label)
        cached = has_caches(value.name for value in self._model.graph.input)
        self._aliases = update_in_place(self._model, self._capacity, label) if cached else {}
        if any(value.name == LOGITS for value in self._model.graph.output):
            keep_logits(self._model)

    def applied(self, request: PlanRequest, folder: Path) -> PlanRequest:
        """The request for the rewritten graph, written to ``folder``, with a second profile for single tokens."""
        (spans,) = request.profiles
        one = (1, 1, 1)
        prompts, tokens = spans | {KEPT: (1, 1, spans["sequence"][2])}, spans | {"sequence": one, KEPT: one}
        return replace(_with_graph(request, self._model.SerializeToString(), folder), profiles=(prompts, tokens))

    def record(self, report: PlanReport) -> Caches:
        prompts, tokens = report.shapes
        decode = {name: shapes for name, shapes in tokens.items() if shapes != prompts[name]}
        return Caches(self._capacity, self._aliases, decode)


def _with_graph(request: PlanRequest, graph: bytes, folder: Path) -> PlanRequest:
    """The request for ``graph``, written to ``folder``, in place of the file's."""
    file = folder / "graph.onnx"
    file.write_bytes(graph)
    return replace(request, graph=str(file))


def _spans(profile: Profile) -> Spans:
    def sizes(span: Span) -> tuple[int, int, int]:
        return span.minimum, span.optimum, span.maximum

    return {name: sizes(span) for name, span in profile.spans().items()}


@contextmanager
def _kept_log(log: Path, target: Path | None) -> Generator[Path]:
    """The path ``log`` to write to; what is there at the end, also after a failure, is copied to ``target``."""
    try:
        yield log
    finally:
        if target and log.exists():
            _copy_log(log, target)


def _copy_log(log: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, target)
    except OSError as error:
        raise BismoothError(f"{target}: the builder's log cannot be written: {error.strerror or error}.") from error
