"""An engine for tests: nothing is compiled, so every stage around a build runs without TensorRT.

Its "kernels" are the graph's own nodes: a MatMul whose operands both come from DequantizeLinear counts as an INT8 GEMM.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass

from ..export.hashing import file_sha256
from ..export.replacing import scratch_folder
from .audit import Audit, audit_kernels
from .base import BuildRequest, BuildResult, EngineRecord, Phase, PhaseCallback
from .kernel_log import Kernel, Tensor
from .linears import GraphSummary, Linear, summarize
from .publish import publish


@dataclass(frozen=True)
class NullBuilder:
    """Writes a small JSON file with the graph's hash and shapes as the engine."""

    name: str = "null"

    def build(self, request: BuildRequest, on_phase: PhaseCallback | None = None) -> BuildResult:
        """See :class:`.base.EngineBuilder`; ``capabilities`` are recorded and change nothing."""
        start = time.perf_counter()
        summary = summarize(request.onnx, request.part)
        audit = _audit(summary, request)
        if not request.allow_float:
            audit.check(str(request.onnx))
        shapes = {name: request.profile.shapes(name, dimensions) for name, dimensions in summary.inputs.items()}
        with scratch_folder(request.engine) as folder:
            staged = folder / request.engine.name
            graph = request.onnx.read_bytes() if request.part is None else request.part
            digest = hashlib.sha256(graph).hexdigest()
            content = {"format": "bismooth-null-engine", "onnx": digest, "shapes": shapes}
            staged.write_text(json.dumps(content) + "\n", "utf-8")
            record = EngineRecord(
                self.name, "1", request.capabilities, shapes, staged.stat().st_size, file_sha256(staged), request.source
            )
            audit_file = publish(staged, request.engine, record, audit)
        if on_phase:
            on_phase(Phase("Building engine", 1, 1))
        return BuildResult(request.engine, audit_file, record, audit, time.perf_counter() - start, None)


def _audit(summary: GraphSummary, request: BuildRequest) -> Audit:
    kernels = [_kernel(linear) for linear in summary.linears]
    attention = [
        Kernel(f"mha_{index}", "Attention", (), (), (), ()) for index in range(summary.operators.get("Attention", 0))
    ]
    return audit_kernels([*kernels, *attention], summary.linears, request.meant_int8)


def _kernel(linear: Linear) -> Kernel:
    operand = Tensor(linear.name, (linear.macs,), "Int8" if linear.quantized else "Float")
    result = Tensor(linear.name, (-1,), "Float")
    return Kernel(linear.node, "gemm", (operand,), (operand,), (result,), (linear.node,))
