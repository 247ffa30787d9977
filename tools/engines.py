"""Engines by name: their builders, the graph that each takes, and the check before a build."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..engines.base import EngineBuilder
from ..engines.null import NullBuilder
from ..engines.onnxruntime_build import OnnxRuntimeBuilder
from ..engines.tensorrt import TENSORRT, TENSORRT_RTX, TensorRTBuilder
from ..engines.tensorrt_runtime import require_package
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..passes.lint import Severity, Target, lint

_BUILDERS: dict[str, EngineBuilder] = {
    "tensorrt-rtx": TensorRTBuilder(TENSORRT_RTX),
    "tensorrt": TensorRTBuilder(TENSORRT),
    "onnxruntime": OnnxRuntimeBuilder(),
    "null": NullBuilder(),
}
_SHOWN = 5


def find_builder(engine: str) -> EngineBuilder:
    """The builder of an engine; raises :class:`BismoothError` naming those there are."""
    if engine not in _BUILDERS:
        raise BismoothError(f"engine {engine!r}: Expected one of {', '.join(_BUILDERS)}.")
    return _BUILDERS[engine]


def require_engine(engine: str) -> None:
    """Raise :class:`BismoothError` now if the engine is unknown or its package is not installed."""
    builder = find_builder(engine)
    if isinstance(builder, TensorRTBuilder):
        require_package(builder.runtime)


def deployment_graph(artifact: Artifact, engine: str) -> Path:
    """The graph that an engine is made of: 16 bits for TensorRT, float32 for ONNX Runtime's CPU provider."""
    narrow = [role for role in ("float16", "bfloat16") if role in artifact.manifest.graphs]
    return artifact.graph(narrow[0] if narrow and engine != "onnxruntime" else "float32")


def engine_file(engine: str) -> str:
    """Name of the file that an engine folder is about."""
    return "model.onnx" if engine == "onnxruntime" else "model.engine"


def lint_for(graph: Path, engine: str, capabilities: Sequence[int]) -> None:
    """Refuse a graph that the engine would reject or misread.

    Raises:
        BismoothError: lists the linter's errors.
    """
    targets: dict[str, Target] = {"tensorrt-rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
    target = targets.get(engine, "onnxruntime")
    errors = [item for item in lint(graph, target=target, capabilities=capabilities) if item.severity is Severity.ERROR]
    if errors:
        shown = "; ".join(str(item) for item in errors[:_SHOWN])
        more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise BismoothError(f"{graph}: {engine} cannot run this graph as meant: {shown}{more}")
