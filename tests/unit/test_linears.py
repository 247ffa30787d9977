"""Which products are linears, what is known about them, and which of them make the logits."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

from bismooth.passes.linears import Bias, Linear, Skipped, find_head, find_linears, scan
from tests.graphs import Builder, decoder


def only(b: Builder, folder: Path) -> Linear:
    (linear,) = find_linears(b.graph(folder))
    return linear


def skipped(b: Builder, folder: Path) -> list[Skipped]:
    linears, others = scan(b.graph(folder))
    assert not linears
    return others


def test_matmul_with_transposed_weight_and_bias(tmp_path: Path) -> None:
    b = Builder()
    b.outputs.append(b.linear(b.tokens("x", 4), "model.layers.0.fc", 3, 4, bias=True))
    assert only(b, tmp_path) == Linear(
        name="model.layers.0.fc",
        node="model.layers.0.fc/MatMul",
        x="x",
        output=b.outputs[0],
        weight="model.layers.0.fc.weight",
        layout="NK",
        k=4,
        n=3,
        bias=Bias("model.layers.0.fc.bias", "model.layers.0.fc.bias", "model.layers.0.fc/Add"),
        is_cast=False,
        shared_with=(),
    )


def test_matmul_with_plain_weight(tmp_path: Path) -> None:
    b = Builder()
    b.outputs.append(b.linear(b.tokens("x", 4), "fc", 3, 4, layout="KN"))
    linear = only(b, tmp_path)
    assert (linear.layout, linear.k, linear.n, linear.bias) == ("KN", 4, 3, None)


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm(tmp_path: Path, transposed: bool) -> None:
    b = Builder()
    w = b.matrix("fc.weight", *((3, 4) if transposed else (4, 3)))
    y = b.op("Gemm", b.input("x", "rows", 4), w, b.vector("fc.bias", 3), at="fc", transB=int(transposed))
    b.outputs.append(y)
    linear = only(b, tmp_path)
    assert (linear.layout, linear.k, linear.n) == ("NK" if transposed else "KN", 4, 3)
    assert linear.bias == Bias("fc.bias", "fc.bias", "fc/Gemm")
    assert linear.output == y


def test_weight_and_bias_behind_casts(tmp_path: Path) -> None:
    b = Builder()
    w = b.constant("fc.weight", b.random.standard_normal((3, 4)).astype(ml_dtypes.bfloat16))
    bias = b.op("Cast", b.constant("fc.bias", np.ones(3, ml_dtypes.bfloat16)), to=TensorProto.FLOAT)
    weight = b.op("Transpose", b.op("Cast", w, to=TensorProto.FLOAT), perm=[1, 0])
    b.outputs.append(b.op("Add", bias, b.op("MatMul", b.tokens("x", 4), weight, at="fc"), at="fc"))
    linear = only(b, tmp_path)
    assert linear.is_cast
    assert linear.layout == "NK"
    assert linear.bias == Bias(bias, "fc.bias", "fc/Add")


@pytest.mark.parametrize("what", ["activation", "matrix", "second user", "output"])
def test_additions_that_are_no_bias(tmp_path: Path, what: str) -> None:
    b = Builder()
    y = b.linear(b.tokens("x", 4), "fc", 3, 4)
    other = {"activation": lambda: b.tokens("r", 3), "matrix": lambda: b.matrix("m", 5, 3)}
    b.outputs.append(b.op("Add", y, other.get(what, lambda: b.vector("v", 3))()))
    if what == "second user":
        b.outputs.append(b.op("Relu", y))
    if what == "output":
        b.outputs.append(y)
    linear = only(b, tmp_path)
    assert linear.bias is None
    assert linear.output == y


def test_product_of_activations_is_no_linear(tmp_path: Path) -> None:
    b = Builder()
    b.outputs.append(b.op("MatMul", b.tokens("x", 4), b.input("y", "batch", 4, 3)))
    assert scan(b.graph(tmp_path)) == ([], [])


def test_products_with_a_constant_that_are_no_linear_say_why(tmp_path: Path) -> None:
    b = Builder()
    x, rows = b.tokens("x", 4), b.input("rows", "rows", 4)
    w = b.matrix("w", 4, 3)
    b.outputs += [
        b.op("MatMul", b.input("e", 2, "n", 4), b.matrix("experts", 2, 4, 3), at="moe"),
        b.op("MatMul", b.matrix("left", 5, 3), b.input("r", 3, "n"), at="left"),
        b.op("MatMul", x, b.op("Gelu", w), at="computed"),
        b.op("Gemm", rows, w, at="scaled", alpha=0.5),
        b.op("Gemm", b.input("columns", 4, "rows"), w, at="turned", transA=1),
        b.op("Gemm", rows, w, b.constant("five", np.float32(5)), at="scalar"),
        b.op("Gemm", rows, w, b.input("c", "rows", 3), at="residual"),
    ]
    ids = b.input("ids", "n", 4, dtype=TensorProto.INT64)
    b.outputs.append(b.op("MatMul", ids, b.constant("table", np.ones((4, 2), np.int64)), at="integers"))
    assert {skip.node: skip.reason for skip in skipped(b, tmp_path)} == {
        "moe/MatMul": "its weight experts has shape [2, 4, 3], expected [N, K]",
        "left/MatMul": "the constant left is the left operand",
        "computed/MatMul": "its weight is computed by Gelu (graph/Gelu)",
        "scaled/Gemm": "alpha is 0.5, expected 1",
        "turned/Gemm": "transA is 1, expected 0",
        "scalar/Gemm": "its addend five is not a constant vector [3]",
        "residual/Gemm": "its addend c is not a constant vector [3]",
        "integers/MatMul": "its weight table is int64, expected a float type",
    }


def test_names_come_from_node_or_weight_and_are_unique(tmp_path: Path) -> None:
    b = Builder()
    x = b.tokens("x", 4)
    for name, weight in (
        ("model.fc/MatMul", "a"),
        ("model.fc/MatMul_7", "b"),
        ("/model/layers.0/q_proj/MatMul", "onnx::MatMul_12"),
        ("node_12", "model.layers.0.o_proj.weight"),
        ("MatMul_13", "onnx::MatMul_13"),
    ):
        b.outputs.append(b.op("MatMul", x, b.matrix(weight, 4, 4)))
        b.nodes[-1].name = name
    assert [linear.name for linear in find_linears(b.graph(tmp_path))] == [
        "model.fc",
        "model.fc_2",
        "model.layers.0.q_proj",
        "model.layers.0.o_proj",
        "MatMul_13",
    ]


def test_other_users_of_a_weight_are_named(tmp_path: Path) -> None:
    linears = {linear.name: linear for linear in find_linears(decoder().graph(tmp_path))}
    assert len(linears) == 15
    assert linears["lm_head"].shared_with == ("model.embed_tokens/Gather",)
    assert linears["model.layers.0.mlp.up_proj"].shared_with == ()


def test_layers_that_share_a_transposed_weight(tmp_path: Path) -> None:
    b = Builder()
    w = b.op("Transpose", b.matrix("shared", 4, 4), perm=[1, 0])
    b.outputs.append(b.op("MatMul", b.op("Relu", b.op("MatMul", b.tokens("x", 4), w, at="one")), w, at="two"))
    first, second = find_linears(b.graph(tmp_path))
    assert (first.shared_with, second.shared_with) == (("two/MatMul",), ("one/MatMul",))


def test_head_of_a_decoder(tmp_path: Path) -> None:
    loaded = decoder().graph(tmp_path)
    assert [linear.name for linear in find_head(find_linears(loaded), loaded)] == ["lm_head"]


def test_head_behind_a_soft_cap_and_a_slice(tmp_path: Path) -> None:
    b = Builder()
    cap = b.constant("cap", np.float32(30))
    y = b.linear(b.op("Relu", b.linear(b.tokens("x", 4), "fc", 4, 4)), "head", 8, 4, bias=True)
    y = b.op("Mul", b.op("Tanh", b.op("Div", y, cap)), cap)
    b.outputs.append(b.op("Slice", y, b.ints(-1), b.ints(9), b.ints(1)))
    loaded = b.graph(tmp_path)
    assert [linear.name for linear in find_head(find_linears(loaded), loaded)] == ["head"]


def test_a_pooler_and_a_residual_stream_are_no_head(tmp_path: Path) -> None:
    b = Builder()
    x = b.tokens("x", 4)
    b.outputs.append(b.op("Tanh", b.linear(x, "pooler", 4, 4)))
    b.outputs.append(b.op("Add", x, b.linear(x, "fc", 4, 4)))
    loaded = b.graph(tmp_path)
    assert find_head(find_linears(loaded), loaded) == []
