"""The null engine: the interface of the others, with an audit read off the graph."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bismooth.engines.audit import Figures
from bismooth.engines.base import BuildRequest, Caches, EngineBuilder, Phase, Profile, Span, audit_path
from bismooth.engines.null import NullBuilder
from bismooth.engines.tensorrt import TensorRTBuilder
from bismooth.export.errors import BismoothError, GateError
from bismooth.export.hashing import file_sha256
from tests.quantized import K, N, float_linear, make, per_token, save


def test_builders_share_an_interface() -> None:
    builders: list[EngineBuilder] = [NullBuilder(), TensorRTBuilder()]
    assert [builder.name for builder in builders] == ["null", "tensorrt-rtx"]


def test_engine_and_audit(tmp_path: Path) -> None:
    graph, phases = save(per_token("q_proj", "k_proj"), tmp_path), list[Phase]()
    request = BuildRequest(
        graph, tmp_path / "m.engine", (86,), meant_int8=frozenset({"q_proj/MatMul"}), source={"recipe": "w8a8"}
    )
    result = NullBuilder().build(request, phases.append)
    content = json.loads(request.engine.read_text())
    assert content == {
        "format": "bismooth-null-engine",
        "onnx": file_sha256(graph),
        "shapes": {"x": [[1, 1, K], [1, 128, K], [4, 512, K]]},
    }
    assert [(linear.int8, linear.meant_int8, linear.macs) for linear in result.audit.linears] == [
        (True, True, K * N),
        (True, False, K * N),
    ]
    assert result.audit_file == audit_path(request.engine)
    stored = json.loads(result.audit_file.read_text())
    assert stored["engine"] == result.record.to_json()
    assert stored["engine"]["sha256"] == file_sha256(request.engine)
    assert stored["audit"] == json.loads(json.dumps(result.audit.to_json()))
    assert phases == [Phase("Building engine", 1, 1)]


def test_documented_keys_are_those_written(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "tensorrt.md").read_text("utf-8")
    example = text[text.index('{\n     "format"') : text.index("Every build runs")]
    result = NullBuilder().build(BuildRequest(save(float_linear(), tmp_path), tmp_path / "m.engine"))
    content = json.loads(result.audit_file.read_text())
    record = replace(result.record, caches=Caches(1, {}, {})).to_json()
    audit = replace(result.audit, others=(Figures({}, 0, 0, 0),)).to_json()
    parts = (record["caches"], audit["linears"][0], audit["others"][0])
    keys = {*content, *record, *audit}.union(*parts)
    assert set(re.findall(r'"([a-z0-9_]+)"', example)) == keys


def test_gate(tmp_path: Path) -> None:
    request = BuildRequest(save(float_linear(), tmp_path), tmp_path / "m.engine", meant_int8=frozenset({"fc/MatMul"}))
    with pytest.raises(GateError, match=r"model\.onnx: 1 of the 1 linears .*fc/MatMul \(gemm: Float x Float"):
        NullBuilder().build(request)
    assert not request.engine.exists()


def test_attention_is_counted(tmp_path: Path) -> None:
    model = make("(float[batch, 2, sequence, 8] x) => (float[batch, 2, sequence, 8] y) { y = Attention(x, x, x) }")
    result = NullBuilder().build(BuildRequest(save(model, tmp_path), tmp_path / "m.engine"))
    assert result.audit.fused_attention == 1


def test_profile_must_cover_the_inputs(tmp_path: Path) -> None:
    model = make("(float[rows, 8] x) => (float[rows, 8] y) { y = Relu(x) }")
    request = BuildRequest(save(model, tmp_path), tmp_path / "m.engine")
    with pytest.raises(BismoothError, match="no sizes for dimension 0 of input 'x', named 'rows'"):
        NullBuilder().build(request)
    sizes = Profile(others={"rows": Span(1, 2, 3)})
    result = NullBuilder().build(BuildRequest(request.onnx, request.engine, profile=sizes))
    assert result.record.shapes == {"x": ((1, 8), (2, 8), (3, 8))}
