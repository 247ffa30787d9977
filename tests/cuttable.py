"""Small graphs that can be cut into the parts of a chain, saved with their weights beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.shape_inference

from bismooth.engines.base import BuildRequest, Profile, Span
from bismooth.engines.build_memory import NEEDS, BuildPlan, plan_build
from bismooth.engines.subgraph import load_graph
from tests.cached_model import cached_model
from tests.quantized import save


def cuttable(**options: Any) -> onnx.ModelProto:
    """:func:`.cached_model.cached_model`, two blocks between embedding and head, with all shapes on record."""
    return onnx.shape_inference.infer_shapes(cached_model(**options), data_prop=True)


def write_cuttable(folder: Path, **options: Any) -> Path:
    return save(cuttable(**options), folder)


def plan(graph: Path, split: int | None = 2) -> BuildPlan:
    return plan_build(NEEDS["null"], load_graph(graph), str(graph), split=split)


def request(graph: Path, engine: Path, **options: Any) -> BuildRequest:
    return BuildRequest(graph, engine, profile=Profile(sequence=Span(1, 16, 16), capacity=64), **options)
