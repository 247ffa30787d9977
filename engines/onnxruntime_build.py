"""A folder that plain ONNX Runtime runs: a graph made for it, exactly the weight files that it refers to, and an audit.

The graph uses ONNX Runtime's own operators where these are faster (``passes/for_onnxruntime.py``). The audit reads what
ONNX Runtime makes of it, in which a product of dequantized operands has become an integer kernel, or has not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.artifact import place_file
from ..export.errors import BismoothError
from ..export.graph_names import has_caches
from ..export.hashing import file_sha256
from ..export.replacing import scratch_folder
from .audit import audit_kernels, check_meant
from .base import BuildRequest, BuildResult, EngineRecord, Phase, PhaseCallback
from .kernel_log import Kernel, Tensor
from .linears import Linear, summarize
from .memory import peak_rss
from .onnxruntime import PROVIDERS, entries_of, import_onnxruntime, reason_of
from .publish import publish

_INTEGER = frozenset({"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul"})
"""Operators with integer operands, both of them."""
_WEIGHT_ONLY = frozenset({"MatMulNBits"})
_FLOAT = frozenset({"FusedGemm", "FusedMatMul", "Gemm", "MatMul"})
_ATTENTION = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})


@dataclass(frozen=True)
class OnnxRuntimeBuilder:
    """Lowers a graph for ONNX Runtime's CPU provider; weights become hard links, or copies where that is impossible."""

    name: str = "onnxruntime"

    def build(self, request: BuildRequest, on_phase: PhaseCallback | None = None) -> BuildResult:
        """See :class:`.base.EngineBuilder`; ``capabilities`` are recorded only, ``profile`` is not looked at."""
        start = time.perf_counter()
        runtime = import_onnxruntime()
        summary = summarize(request.onnx, request.part)
        check_meant(summary.linears, request.meant_int8)
        with scratch_folder(request.engine) as folder:
            staged = folder / request.engine.name
            last = (request.logits or ("last" if has_caches(summary.inputs) else "all")) == "last"
            _lower(request, staged, last_logits=last)
            optimized = _optimize(runtime, request.onnx, staged.read_bytes(), folder)
            audit = audit_kernels(_kernels(optimized, summary.linears), summary.linears, request.meant_int8)
            if not request.allow_float:
                audit.check(str(request.onnx))
            weights = _weight_files(request)
            record = EngineRecord(
                runtime=self.name,
                version=runtime.__version__,
                capabilities=request.capabilities,
                shapes={},
                bytes=sum(file.stat().st_size for file in (staged, *weights.values())),
                sha256=file_sha256(staged),
                source=request.source,
            )
            new = {name: file for name, file in weights.items() if name not in request.placed}
            _place(new, request.engine.parent, copy=request.copy_weights)
            audit_file = publish(staged, request.engine, record, audit)
        if on_phase:
            on_phase(Phase("Auditing kernels", 1, 1))
        return BuildResult(request.engine, audit_file, record, audit, time.perf_counter() - start, peak_rss())


def _weight_files(request: BuildRequest) -> dict[str, Path]:
    from ..export.external_data import check_locations, find_locations, weight_files
    from .subgraph import parse_graph

    if request.part is None:
        return weight_files(request.onnx)
    part = parse_graph(request.part, str(request.onnx))
    return check_locations(request.onnx, find_locations(part, request.onnx))


def _lower(request: BuildRequest, target: Path, *, last_logits: bool) -> None:
    """Write the graph as ONNX Runtime runs it fastest."""
    from ..passes.driver import run_passes
    from ..passes.for_onnxruntime import passes_for_onnxruntime
    from ..passes.graph import load, save

    graph = load(request.onnx, request.part)
    run_passes(graph, passes_for_onnxruntime(last_logits=last_logits))
    save(graph, target)


def _optimize(runtime: Any, source: Path, graph: bytes, folder: Path) -> Any:
    """ONNX Runtime's own version of ``graph``, made of ``source``, without its weights."""
    import onnx

    target = folder / "optimized.onnx"
    (folder / "optimized.bin").symlink_to(os.devnull)  # ONNX Runtime writes all weights anew, and nobody reads them
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions
    options.optimized_model_filepath = str(target)
    entries = {
        "session.optimized_model_external_initializers_file_name": "optimized.bin",
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.model_external_initializers_file_folder_path": str(source.parent),
        **entries_of(runtime, "int8"),
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        runtime.InferenceSession(graph, options, providers=[PROVIDERS["cpu"]], enable_fallback=0)
    except Exception as error:  # its exceptions have no public base class
        raise BismoothError(
            f"{source}: ONNX Runtime cannot load the graph: {reason_of(error)} "
            "Look for the cause with 'bismooth inspect' on the ONNX file."
        ) from error
    return onnx.ModelProto.FromString(target.read_bytes())


def _kernels(model: Any, linears: Iterable[Linear]) -> list[Kernel]:
    """The nodes of the optimized graph as kernels.

    A fused node begins with the name of the node that it grew from, behind the word ``fused`` if it has an activation.
    """
    known = {linear.node: linear for linear in linears}
    return [_kernel(node, _grown_from(node.name, known)) for node in model.graph.node]


def _grown_from(name: str, known: dict[str, Linear]) -> Linear | None:
    name = name.removeprefix("fused ")
    while name not in known and "/" in name:
        name = name.rpartition("/")[0]
    return known.get(name)


def _kernel(node: Any, linear: Linear | None) -> Kernel:
    operator: str = node.op_type
    if linear is None or operator not in _INTEGER | _WEIGHT_ONLY | _FLOAT:
        name = f"mha_{node.name}" if operator in _ATTENTION else node.name
        return Kernel(name, operator, (), (), (), ())
    activation = Tensor(node.input[0], (-1,), "Int8" if operator in _INTEGER else "Float")
    weight = Tensor(node.input[1], (linear.macs,), "Float" if operator in _FLOAT else "Int8")
    return Kernel(
        node.name, "gemm", (activation,), (weight,), (Tensor(node.output[0], (-1,), "Float"),), (linear.node,)
    )


def _place(weights: Mapping[str, Path], target: Path, *, copy: bool) -> None:
    """Link or copy the weights into ``target``."""
    for name, weight in weights.items():
        place = target / name
        if place.exists():
            if not place.samefile(weight):
                raise BismoothError(f"{place}: exists and is another file. Expected none. Choose an empty folder.")
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        place_file(weight, place, copy=copy)
