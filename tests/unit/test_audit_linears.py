"""Which nodes of a graph are linears, how large, and which of them computes the logits."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from bismooth.engines.linears import GraphSummary, Linear, summarize
from bismooth.export.errors import BismoothError
from tests.quantized import K, N, make, per_token, save

WEIGHT = np.zeros((8, 6), np.float32)


def summary(folder: Path, body: str, results: str = "float[n, 6] y", **constants: np.ndarray) -> GraphSummary:
    return summarize(save(make(f"(float[n, 8] x) => ({results}) {{ {body} }}", **constants), folder))


def test_per_token_linears(tmp_path: Path) -> None:
    found = summarize(save(per_token("q_proj", "k_proj"), tmp_path))
    assert found.linears == tuple(
        Linear(name, f"{name}/MatMul", K * N, quantized=True, head=False) for name in ("q_proj", "k_proj")
    )
    assert found.inputs == {"x": ("batch", "sequence", K)}
    assert found.operators["QuantizeLinear"] == 1
    assert found.operators["MatMul"] == 2


def test_weight_through_cast_and_transpose(tmp_path: Path) -> None:
    body = "c = Cast<to = 1>(w) t = Transpose<perm = [1, 0]>(c) y = MatMul(x, t)"
    (linear,) = summary(tmp_path, body, w=WEIGHT.T.astype(np.float16)).linears
    assert linear == Linear("y", "y/MatMul", 48, quantized=False, head=False)


def test_gemm_and_constant_node(tmp_path: Path) -> None:
    body = "w = Constant<value = float[8, 6] {" + ", ".join(["0"] * 48) + "}>() y = Gemm(x, w)"
    assert summary(tmp_path, body).linears == (Linear("y", "y/Gemm", 48, quantized=False, head=False),)


def test_products_of_activations_and_of_constants_are_no_linears(tmp_path: Path) -> None:
    body = "t = Transpose<perm = [1, 0]>(x) s = MatMul(t, x) c = MatMul(w, v) y = MatMul(s, c)"
    (linear,) = summary(tmp_path, body, w=WEIGHT, v=WEIGHT.T).linears[:1] or (None,)
    assert linear is None


@pytest.mark.parametrize(
    "body",
    [
        "logits = MatMul(h, w)",
        "a = MatMul(h, w) b = Cast<to = 1>(a) logits = Mul(b, r)",
        "a = MatMul(h, w) b = Div(a, r) c = Tanh(b) logits = Mul(c, r)",
    ],
)
def test_head_is_what_the_logits_follow_from(tmp_path: Path, body: str) -> None:
    constants = {"v": np.zeros((8, 8), np.float32), "w": WEIGHT, "r": np.ones(6, np.float32)}
    found = summary(tmp_path, f"h0 = MatMul(x, v) h = Relu(h0) {body}", "float[n, 6] logits", **constants)
    assert [linear.head for linear in found.linears] == [False, True]


def test_without_logits_there_is_no_head(tmp_path: Path) -> None:
    assert not summary(tmp_path, "y = MatMul(x, w)", w=WEIGHT).linears[0].head


def test_node_without_a_name_has_the_one_that_tensorrt_gives_it(tmp_path: Path) -> None:
    model = make("(float[n, 8] x) => (float[n, 6] y) { y = MatMul(x, w) }", w=WEIGHT)
    model.graph.node[0].name = ""
    assert summarize(save(model, tmp_path)).linears[0].node == "node_of_y"


def test_two_nodes_of_one_name(tmp_path: Path) -> None:
    model = make("(float[n, 8] x) => (float[n, 6] y) { a = MatMul(x, v) y = MatMul(a, w) }", v=WEIGHT, w=WEIGHT)
    for node in model.graph.node:
        node.name = "same"
    with pytest.raises(BismoothError, match="two nodes are named 'same'"):
        summarize(save(model, tmp_path))


def test_cycle_before_the_logits_ends(tmp_path: Path) -> None:
    body = "a = Add(b, x) b = Mul(a, x) logits = Add(a, b)"
    assert summary(tmp_path, body, "float[n, 8] logits").linears == ()
    assert summary(tmp_path, "t = Cast<to = 1>(u) u = Cast<to = 1>(t) y = MatMul(x, t)").linears == ()


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match=r"absent\.onnx: cannot be read"):
        summarize(tmp_path / "absent.onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xffgarbage")
    with pytest.raises(BismoothError, match="not a valid ONNX file"):
        summarize(path)


def test_missing_onnx_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.ModelProto().SerializeToString())
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "bismooth.engines.subgraph", raising=False)
    with pytest.raises(BismoothError, match=re.escape("Install it with: pip install 'bismooth[compile]'")):
        summarize(path)
