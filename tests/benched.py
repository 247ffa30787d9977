"""Engines to bench, with figures that can be computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bismooth.engines.audit import Audit, LinearAudit
from bismooth.engines.base import Caches, EngineRecord
from bismooth.engines.publish import publish
from bismooth.export.artifact import finish_folder
from bismooth.tools.bench_subject import Case, Subject
from bismooth.tools.bench_timing import Timing
from bismooth.tools.cost import CostModel
from tests import artifacts

DIMS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CASE = Case(2, 8, 5)

RECORD = EngineRecord("onnxruntime", "1.2", (), {}, 2_000_000, "00", {"recipe": "w8a8"})


def linear(name: str, macs: int, types: str = "Int8 Int8 Half", *, head: bool = False) -> LinearAudit:
    """``types`` are those of input, weight and output."""
    operand, weight, output = types.split()
    int8 = (operand, weight) == ("Int8", "Int8")
    return LinearAudit(name, f"{name}/MatMul", macs, head, "k", "gemm", operand, weight, output, (), int8, int8)


LINEARS = (
    linear("q", 1000),
    linear("up", 500),
    linear("down", 300, "Half Half Half"),
    linear("o", 200, "Half Int8 Half"),
    linear("head", 400, "Half Half Half", head=True),
)


def audit(*linears: LinearAudit) -> Audit:
    return Audit({"gemm": 5}, 5, 2, 2, linears=linears or LINEARS)


COST = CostModel.of(audit(), DIMS, "engine")


def subject(path: str = "a", engine: str = "onnxruntime", cost: CostModel | None = COST, **record: Any) -> Subject:
    return Subject(Path(path), engine, replace(RECORD, **record), cost, "" if cost else f"{path}: no cost.")


def rtx(path: str = "rtx", *capabilities: int, capacity: int | None = 64) -> Subject:
    """An engine of TensorRT-RTX for 1 to 4 rows."""
    shapes = {"input_ids": ((1, 1), (1, 16), (4, 32))}
    caches = None if capacity is None else Caches(capacity, {}, {})
    return subject(
        path, "tensorrt-rtx", runtime="tensorrt-rtx", capabilities=capabilities or (89,), shapes=shapes, caches=caches
    )


def timings(*rounds: tuple[float, float]) -> tuple[Timing, ...]:
    """Rounds with seconds of the prefill and of each of the 4 further tokens."""
    return tuple(Timing(prefill, prefill + 0.001, (token,) * 4) for prefill, token in rounds)


def write_engine(path: Path, made: Subject, dims: dict[str, int] = DIMS, found: Audit | None = None) -> Path:
    """The folder of an engine, whose file is no engine."""
    path.mkdir(parents=True)
    name = "model.onnx" if made.engine == "onnxruntime" else "model.engine"
    (path / "staged").write_bytes(b"engine")
    publish(path / "staged", path / name, made.record, found or audit())
    stage = {"stage": "build", "engine": made.engine}
    finish_folder(path, replace(artifacts.FLOAT, kind="engine", graphs={}, dims=dims, stages=(stage,)))
    return path
