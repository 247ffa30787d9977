"""Rewrites that spare float32 copies: the same values, and what must not be rewritten."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx.shape_inference
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bismooth.engines.lean import make_lean
from bismooth.engines.onnxruntime import InMemoryGraph, Mode, Session

Array = NDArray[Any]
N, K = 210, 40
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, N, (2, 5))
X = RNG.standard_normal((2, 5, K)).astype(np.float32)
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SMALL: dict[str, Any] = {"most": 4 * N * K - 1, "piece": 4 * K * 70}
"""Limits that cut N outputs into slices of 64, 64, 64 and 18."""


def model(body: str, inputs: str, **constants: Any) -> onnx.ModelProto:
    """A graph that makes ``y``."""
    text = f'<ir_version: 10, opset_import: ["" : 23]> g ({inputs}) => (float[b, s, m] y) {{ {body} }}'
    result = onnx.parser.parse_model(text)
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    result.graph.initializer.extend(tensors)
    return onnx.shape_inference.infer_shapes(result)


def run(graph: onnx.ModelProto, mode: Mode = "plain", **feeds: Array) -> Array:
    data = InMemoryGraph("graph", graph.SerializeToString(), Path())
    with Session(data, mode=mode, threads=1, lean=True) as session:
        return session.run(feeds)["y"]


def lean(graph: onnx.ModelProto, *, fuse: bool = True, **options: Any) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(graph.SerializeToString())
    make_lean(copy, fuse=fuse, **options)
    return copy


def operators(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.node)


def weight(dtype: str, *shape: int) -> Array:
    return RNG.standard_normal(shape).astype(TYPES[dtype])


def integers(*shape: int) -> NDArray[np.int8]:
    return RNG.integers(-127, 128, shape).astype(np.int8)


# --- embeddings -----------------------------------------------------------------------------------------------------

EMBEDDING = "wide = Cast<to = 1>(table) y = Gather<axis = 0>(wide, ids)"


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_a_table_are_widened_after_they_were_looked_up(dtype: str) -> None:
    graph = model(EMBEDDING, "int64[b, s] ids", table=weight(dtype, N, K))
    changed = lean(graph)
    assert [node.op_type for node in changed.graph.node] == ["Gather", "Cast"]
    assert changed.graph.node[0].input[0] == "table"
    (stored,) = [info for info in changed.graph.value_info if info.name == "y/stored"]
    assert stored.type.tensor_type.elem_type == helper.np_dtype_to_tensor_dtype(np.dtype(TYPES[dtype]))
    np.testing.assert_array_equal(run(changed, ids=IDS), run(graph, ids=IDS))


def test_all_casts_of_a_table_are_moved() -> None:
    body = "half = Cast<to = 10>(table) wide = Cast<to = 1>(half) y = Gather<axis = 0>(wide, ids)"
    graph = model(body, "int64[b, s] ids", table=weight("bfloat16", N, K))
    changed = lean(graph)
    assert [node.op_type for node in changed.graph.node] == ["Gather", "Cast", "Cast"]
    np.testing.assert_array_equal(run(changed, ids=IDS), run(graph, ids=IDS))


def test_a_table_that_the_head_reads_too_keeps_its_float32_copy_for_it() -> None:
    body = "wide = Cast<to = 1>(table) h = Gather<axis = 0>(wide, ids) t = Transpose<perm = [1, 0]>(wide)"
    graph = model(f"{body} y = MatMul(h, t)", "int64[b, s] ids", table=weight("float16", N, K))
    changed = lean(graph)
    assert operators(changed) == {"Gather": 1, "Cast": 2, "FusedMatMul": 1}
    np.testing.assert_array_equal(run(changed, ids=IDS), run(graph, ids=IDS))


@pytest.mark.parametrize(
    "body",
    [
        "wide = Add(table, table) y = Gather<axis = 0>(wide, ids)",
        "y = Gather<axis = 0>(table, ids)",
    ],
)
def test_what_is_no_widened_table_stays(body: str) -> None:
    graph = model(body, "int64[b, s] ids", table=weight("float16", N, K).astype(np.float32))
    assert lean(graph) == graph


def test_a_copy_that_somebody_else_reads_stays() -> None:
    graph = model(EMBEDDING, "int64[b, s] ids", table=weight("float16", N, K))
    assert operators(lean(graph, keep=["wide"])) == {"Gather": 1, "Cast": 2}


# --- transposed weights ---------------------------------------------------------------------------------------------


def test_products_read_weights_as_they_are_stored() -> None:
    body = "wide = Cast<to = 1>(w) t = Transpose<perm = [1, 0]>(wide) y = MatMul(x, t)"
    graph = model(body, f"float[b, s, {K}] x", w=weight("float16", N, K))
    changed = lean(graph)
    assert operators(changed) == {"Cast": 1, "FusedMatMul": 1}
    np.testing.assert_array_equal(run(changed, x=X), run(graph, x=X))
    assert lean(graph, fuse=False) == graph


def test_other_transposes_stay() -> None:
    body = "t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(x, t)"
    graph = model(body, f"float[b, s, {K}] x")
    assert lean(graph) == graph


# --- slices ---------------------------------------------------------------------------------------------------------

PLAIN = f"float[b, s, {K}] x"
CHAINS: dict[str, tuple[str, dict[str, Any]]] = {
    "float16 [N, K]": (
        "wide = Cast<to = 1>(w) t = Transpose<perm = [1, 0]>(wide) y = MatMul(x, t)",
        {"w": weight("float16", N, K)},
    ),
    "bfloat16 [N, K]": (
        "wide = Cast<to = 1>(w) t = Transpose<perm = [1, 0]>(wide) y = MatMul(x, t)",
        {"w": weight("bfloat16", N, K)},
    ),
    "transposed before it is widened": (
        "t = Transpose<perm = [1, 0]>(w) wide = Cast<to = 1>(t) y = MatMul(x, wide)",
        {"w": weight("float16", N, K)},
    ),
    "transposed twice": (
        "t = Transpose<perm = [1, 0]>(w) wide = Cast<to = 1>(t) u = Transpose<perm = [1, 0]>(wide) y = MatMul(x, u)",
        {"w": weight("float16", K, N)},
    ),
    "float16 [K, N]": ("wide = Cast<to = 1>(w) y = MatMul(x, wide)", {"w": weight("float16", K, N)}),
    "bias": (
        "wide = Cast<to = 1>(w) p = MatMul(x, wide) y = Add(p, bias)",
        {"w": weight("float16", K, N), "bias": RNG.standard_normal(N).astype(np.float32)},
    ),
    "int8 [N, K], scale per output": (
        "d = DequantizeLinear<axis = 0>(w, s) t = Transpose<perm = [1, 0]>(d) y = MatMul(x, t)",
        {"w": integers(N, K), "s": RNG.uniform(0.01, 0.1, N).astype(np.float32)},
    ),
    "int8 [K, N], scale per output": (
        "d = DequantizeLinear<axis = 1>(w, s, z) y = MatMul(x, d)",
        {"w": integers(K, N), "s": RNG.uniform(0.01, 0.1, N).astype(np.float32), "z": np.zeros(N, np.int8)},
    ),
    "int8 [K, N], scale per input": (
        "d = DequantizeLinear<axis = 0>(w, s) y = MatMul(x, d)",
        {"w": integers(K, N), "s": RNG.uniform(0.01, 0.1, K).astype(np.float32)},
    ),
    "int8 [K, N], one scale": (
        "d = DequantizeLinear(w, s, z) y = MatMul(x, d)",
        {"w": integers(K, N), "s": np.float32(0.01), "z": np.int8(0)},
    ),
    "int8 [K, N], scale per group of inputs": (
        "d = DequantizeLinear<axis = 0, block_size = 4>(w, s) y = MatMul(x, d)",
        {"w": integers(K, N), "s": RNG.uniform(0.01, 0.1, (K // 4, N)).astype(np.float32)},
    ),
    "uint8 [K, N], zero point per output": (
        "d = DequantizeLinear<axis = 1>(w, s, z) y = MatMul(x, d)",
        {
            "w": RNG.integers(0, 256, (K, N)).astype(np.uint8),
            "s": RNG.uniform(0.01, 0.1, N).astype(np.float32),
            "z": RNG.integers(0, 256, N).astype(np.uint8),
        },
    ),
    "float32, rounded to float16": (
        "narrow = Cast<to = 10>(w) wide = Cast<to = 1>(narrow) y = MatMul(x, wide)",
        {"w": RNG.standard_normal((K, N)).astype(np.float32)},
    ),
    "int8 with float16 scales": (
        "d = DequantizeLinear<axis = 1>(w, s) wide = Cast<to = 1>(d) y = MatMul(x, wide)",
        {"w": integers(K, N), "s": RNG.uniform(0.01, 0.1, N).astype(np.float16)},
    ),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("fuse", [True, False])
def test_outputs_of_a_large_linear_come_in_slices(name: str, fuse: bool) -> None:
    body, constants = CHAINS[name]
    graph = model(body, PLAIN, **constants)
    changed = lean(graph, fuse=fuse, **SMALL)
    counts = operators(changed)
    assert counts["Concat"] == 1
    assert counts["MatMul"] + counts["FusedMatMul"] == 4
    assert counts["Transpose"] == (4 if name.startswith("transposed") else 0)
    np.testing.assert_array_equal(run(changed, "reference", x=X), run(graph, "reference", x=X))


def test_slices_have_shapes() -> None:
    body, constants = CHAINS["float16 [N, K]"]
    graph = lean(model(body, PLAIN, **constants), **SMALL)
    shapes = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in graph.graph.value_info}
    assert [shapes[f"y/{start}"][-1] for start in (0, 64, 128, 192)] == [64, 64, 64, 18]
    assert [shapes[f"y/{start}/w"] for start in (0, 192)] == [[64, K], [18, K]]


def test_tiles_are_whole_even_if_they_are_larger_than_a_slice_may_be() -> None:
    body, constants = CHAINS["float16 [N, K]"]
    changed = lean(model(body, PLAIN, **constants), most=0, piece=1)
    assert operators(changed)["FusedMatMul"] == 4


def test_many_columns_bit_for_bit() -> None:
    """With slices of any width, 2 of 10 000 of these values differ."""
    w, x = RNG.standard_normal((7000, 576)).astype(np.float16), RNG.standard_normal((1, 64, 576)).astype(np.float32)
    body, _ = CHAINS["float16 [N, K]"]
    graph = model(body, "float[b, s, 576] x", w=w)
    np.testing.assert_array_equal(run(lean(graph, most=0, piece=1 << 22), x=x), run(graph, x=x))


def test_a_slice_against_float64() -> None:
    body, constants = CHAINS["bfloat16 [N, K]"]
    got = run(lean(model(body, PLAIN, **constants), **SMALL), x=X)
    expected = X.astype(np.float64) @ constants["w"].astype(np.float64).T
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("y = MatMul(x, w)", {"w": RNG.standard_normal((K, N)).astype(np.float32)}),  # no copy is made of it
        (
            "wide = Cast<to = 1>(w) half = Mul(wide, two) y = MatMul(x, half)",
            {"w": weight("float16", K, N), "two": np.float32(2)},
        ),
        ("wide = Cast<to = 1>(w) y = MatMul(x, wide)", {"w": weight("float16", 1, K, N)}),
        (
            "d = DequantizeLinear<axis = 1, block_size = 3>(w, s) y = MatMul(x, d)",  # outputs share scales
            {"w": integers(K, N), "s": RNG.uniform(0.01, 0.1, (K, N // 3)).astype(np.float32)},
        ),
        (
            "wide = Cast<to = 1>(s) d = DequantizeLinear<axis = 1>(w, wide) y = MatMul(x, d)",
            {"w": integers(K, N), "s": RNG.uniform(0.01, 0.1, N).astype(np.float16)},
        ),
    ],
)
def test_what_cannot_be_sliced_stays(body: str, constants: dict[str, Any]) -> None:
    graph = model(body, PLAIN, **constants)
    assert lean(graph, **SMALL) == graph


def test_a_linear_that_is_not_large_stays() -> None:
    body, constants = CHAINS["float16 [K, N]"]
    graph = model(body, PLAIN, **constants)
    assert lean(graph, most=4 * N * K, piece=64) == graph


def test_products_of_integers_are_left_to_the_optimizer() -> None:
    activation = "q = QuantizeLinear(x, t, z) a = DequantizeLinear(q, t, z)"
    body = f"{activation} d = DequantizeLinear<axis = 1>(w, s) y = MatMul(a, d)"
    scales = RNG.uniform(0.01, 0.1, N).astype(np.float32)
    graph = model(body, PLAIN, w=integers(K, N), s=scales, t=np.float32(0.02), z=np.int8(0))
    assert lean(graph, fuse=False, **SMALL) == graph
    assert operators(lean(graph, fuse=True, **SMALL))["Concat"] == 1
