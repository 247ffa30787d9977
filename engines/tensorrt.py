"""Build and audit TensorRT engines: ahead of time with TensorRT-RTX, or with TensorRT where the target GPU is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..export.errors import BismoothError
from ..export.hashing import file_sha256
from ..export.replacing import scratch_folder
from .audit import audit_log, check_meant
from .base import BuildRequest, BuildResult, EngineRecord, PhaseCallback
from .linears import summarize
from .publish import publish
from .tensorrt_build import PlanReport, PlanRequest
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
        linears = summarize(request.onnx).linears
        check_meant(linears, request.meant_int8)
        with scratch_folder(request.engine) as folder, _kept_log(folder / "build.log", request.log) as log:
            plan = folder / "engine"
            report = run_worker(self._plan_request(request, plan, log), on_phase)
            audit = audit_log(log.read_text("utf-8"), linears, request.meant_int8)
            if not request.allow_float:
                audit.check(str(request.onnx))
            record = self._record(request, report, plan)
            audit_file = publish(plan, request.engine, record, audit)
        return BuildResult(request.engine, audit_file, record, audit, time.perf_counter() - start, report.peak_rss)

    def _plan_request(self, request: BuildRequest, plan: Path, log: Path) -> PlanRequest:
        spans = {name: (span.minimum, span.optimum, span.maximum) for name, span in request.profile.spans().items()}
        return PlanRequest(
            runtime=self.runtime.name,
            onnx=str(request.onnx),
            plan=str(plan),
            log=str(log),
            capabilities=request.capabilities,
            spans=spans,
        )

    def _record(self, request: BuildRequest, report: PlanReport, plan: Path) -> EngineRecord:
        return EngineRecord(
            runtime=self.runtime.name,
            version=report.version,
            capabilities=report.capabilities,
            shapes=report.shapes,
            bytes=plan.stat().st_size,
            sha256=file_sha256(plan),
            source=request.source,
        )


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
