"""Weights that no graph reads are left out, and the graph computes what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines.base import BuildRequest, audit_path
from bismooth.engines.onnxruntime import Session
from bismooth.engines.onnxruntime_build import OnnxRuntimeBuilder
from bismooth.engines.publish import read_audit, read_record
from bismooth.export.external_data import load_model, weight_files
from bismooth.export.hashing import file_sha256
from bismooth.tools.trim import trim_weights
from tests.quantized import make, save

SIZE = 256
X = np.random.default_rng(2).normal(size=(3, SIZE)).astype(np.float32)


def build(folder: Path, unread: int, name: str = "all.weights") -> Path:
    """An engine of two linears, whose file of weights has ``unread`` bytes more at its end."""
    weights = {name: np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32) for name in "wv"}
    text = "(float[batch, 256] x) => (float[batch, 256] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    graph = save(make(text, **weights), folder / "art", name)
    with (folder / "art" / name).open("ab") as file:
        file.write(bytes(unread))
    engine = folder / "engine/model.onnx"
    OnnxRuntimeBuilder().build(BuildRequest(graph, engine, source={"recipe": "r"}))
    return engine


def run(engine: Path) -> Any:
    with Session(engine, threads=1) as session:
        return session.run({"x": X})["y"]


@pytest.mark.parametrize("name", ["all.weights", "weights.bin"])
def test_what_is_not_read_is_left_out(tmp_path: Path, name: str) -> None:
    engine = build(tmp_path, 1_000_000, name)
    before, old, audit = run(engine), read_record(engine), read_audit(audit_path(engine))
    assert trim_weights(engine)
    (file,) = weight_files(engine).values()
    assert {path.name for path in engine.parent.iterdir()} == {engine.name, audit_path(engine).name, file.name}
    assert file.stat().st_size == 2 * SIZE * SIZE * 4
    np.testing.assert_array_equal(run(engine), before)
    record = read_record(engine)
    assert record.sha256 == file_sha256(engine) != old.sha256
    assert record.bytes == engine.stat().st_size + file.stat().st_size
    assert (record.source, record.runtime, read_audit(audit_path(engine))) == (old.source, old.runtime, audit)
    assert (tmp_path / "art" / name).stat().st_size > 1_000_000, "the artifact keeps its file"
    assert not trim_weights(engine), "nothing is left to leave out"


def test_a_file_that_is_read_whole_stays_a_link(tmp_path: Path) -> None:
    engine = build(tmp_path, 1_000)
    content = engine.read_bytes()
    assert not trim_weights(engine)
    assert (engine.parent / "all.weights").samefile(tmp_path / "art/all.weights")
    assert engine.read_bytes() == content


def test_a_weight_that_two_tensors_share_is_written_once(tmp_path: Path) -> None:
    engine = build(tmp_path, 1_000_000)
    model = load_model(engine)
    first, second = model.graph.initializer
    second.external_data[1].CopyFrom(first.external_data[1])
    engine.write_bytes(model.SerializeToString())
    before = run(engine)
    assert trim_weights(engine)
    assert (engine.parent / "weights.bin").stat().st_size == SIZE * SIZE * 4
    np.testing.assert_array_equal(run(engine), before)


def test_a_graph_with_its_weights_inside(tmp_path: Path) -> None:
    text = "(float[batch, 2] x) => (float[batch, 2] y) { y = MatMul(x, w) }"
    (tmp_path / "art").mkdir()
    graph = tmp_path / "art/model.onnx"
    graph.write_bytes(make(text, w=np.eye(2, dtype=np.float32)).SerializeToString())
    OnnxRuntimeBuilder().build(BuildRequest(graph, tmp_path / "engine/model.onnx"))
    assert not trim_weights(tmp_path / "engine/model.onnx")
