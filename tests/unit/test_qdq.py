"""Q/DQ insertion: the numbers of the definition in float64, the shape of the graph, and kernels that fuse."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bismooth.engines.onnxruntime import import_onnxruntime
from bismooth.export.errors import BismoothError
from bismooth.passes._gs import Tensor, make_constant
from bismooth.passes.graph import load
from bismooth.passes.linears import find_linears
from bismooth.passes.lint import lint
from bismooth.passes.qdq import InsertQdq
from bismooth.passes.spec import LinearSpec, RangeMethod, StaticActivation, WeightSpec
from tests.graphs import Builder
from tests.quantizing import Array, Quantized, Seen, per_channel, quantize, recipe, relative_error, w8a8

K, N, T = 48, 24, (2, 5)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((*T, K)).astype(np.float32) * np.exp(RNG.standard_normal((*T, 1))).astype(np.float32)
STATIC = {"granularity": "per_tensor", "range": "minmax"}
TOLERANCE = 1e-6


def one_linear(*, layout: str = "NK", bias: bool = True) -> Builder:
    b = Builder()
    b.outputs.append(b.linear(b.tokens("x", K), "fc", N, K, bias=bias, layout=layout))
    return b


def three_linears() -> Builder:
    """q, k and v on one tensor."""
    b = Builder()
    x = b.tokens("x", K)
    b.outputs += [b.linear(x, name, N, K) for name in "qkv"]
    return b


def run(made: Quantized, x: Array = X, **options: Any) -> list[Array]:
    return list(made.run({"x": x}, **options).values())


def bias_of(b: Builder) -> Array:
    return b.initializers["fc.bias"].astype(np.float64)


def placeholder(name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> Tensor:
    return make_constant(name, np.zeros(tuple(shape), dtype))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.ModelProto.FromString(path.read_bytes()).graph.node)


def optimized(path: Path, folder: Path) -> Counter[str]:
    """The operators of the graph that ONNX Runtime really runs."""
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 4
    runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return operators(folder / "optimized.onnx")


@pytest.mark.parametrize("layout", ["NK", "KN"])
@pytest.mark.parametrize("bias", [True, False])
def test_per_token(tmp_path: Path, layout: str, bias: bool) -> None:
    b = one_linear(layout=layout, bias=bias)
    weight = b.initializers["fc.weight"]
    expected = w8a8(X, weight if layout == "NK" else weight.T) + (bias_of(b) if bias else 0)
    made = quantize(b, tmp_path, recipe())
    assert relative_error(expected, run(made)[0]) <= TOLERANCE


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_rows_of_any_magnitude_and_of_zeros(tmp_path: Path, scale: float) -> None:
    b = one_linear(bias=False)
    x = (X * np.float32(scale)).copy()
    x[0, 1] = 0
    got = run(quantize(b, tmp_path, recipe()), x)[0]
    assert not got[0, 1].any()
    kept = np.ones(T, np.bool_)
    kept[0, 1] = False
    expected = w8a8(x[kept], b.initializers["fc.weight"])
    assert relative_error(expected, got[kept]) <= TOLERANCE


def test_static(tmp_path: Path) -> None:
    b = one_linear()
    seen = Seen({"x": X[:, :4].reshape(-1, K)})  # the last token of each sequence exceeds what was seen
    x = X.copy()
    x[:, 4] *= 1.5 * np.abs(X[:, :4]).max() / np.abs(X[:, 4]).max()
    scale = np.float64(np.float32(np.abs(X[:, :4]).max())) / 127
    values = np.clip(np.rint(x * np.float32(1 / scale)), -128, 127).astype(np.float64)
    wq, sw = per_channel(b.initializers["fc.weight"])
    expected = (values @ wq.T) * scale * sw.T + bias_of(b)
    made = quantize(b, tmp_path, recipe(activations=STATIC), seen)
    assert relative_error(expected, run(made, x)[0]) <= TOLERANCE
    assert "ReduceMax" not in operators(made.folder / "model.onnx")


def test_weight_only_linears_run_in_the_mode_of_integer_kernels(tmp_path: Path) -> None:
    made = quantize(three_linears(), tmp_path, recipe(activations=None))
    for expected, got in zip(run(made), run(made, mode="int8"), strict=True):
        assert relative_error(expected, got) <= TOLERANCE


def test_weight_only(tmp_path: Path) -> None:
    b = one_linear()
    wq, scale = per_channel(b.initializers["fc.weight"])
    expected = X.astype(np.float64) @ (wq * scale).T + bias_of(b)
    made = quantize(b, tmp_path, recipe(activations=None))
    assert relative_error(expected, run(made)[0]) <= TOLERANCE
    assert "QuantizeLinear" not in operators(made.folder / "model.onnx")


@pytest.mark.parametrize("activations", [{"granularity": "per_token"}, STATIC, None])
def test_gemm_with_its_own_bias(tmp_path: Path, activations: Mapping[str, str] | None) -> None:
    b = Builder()
    x = b.input("x", "tokens", K)
    b.outputs.append(b.op("Gemm", x, b.matrix("fc.weight", K, N), b.vector("fc.bias", N), at="fc"))
    rows = X.reshape(-1, K)
    made = quantize(b, tmp_path, recipe(activations=activations), Seen({"x": rows}))
    exact = rows.astype(np.float64) @ b.initializers["fc.weight"] + bias_of(b)
    assert relative_error(exact, run(made, rows)[0]) < 0.02
    if activations == {"granularity": "per_token"}:
        assert relative_error(w8a8(rows, b.initializers["fc.weight"].T) + bias_of(b), run(made, rows)[0]) <= TOLERANCE
    names = {node.name: node.op for node in load(made.folder / "model.onnx").nodes}
    assert names["fc/Gemm"] == "MatMul"
    assert names["fc/Add"] == "Add"


def test_linears_that_read_one_tensor_share_its_quantizer(tmp_path: Path) -> None:
    made = quantize(three_linears(), tmp_path, recipe())
    count = operators(made.folder / "model.onnx")
    assert (count["QuantizeLinear"], count["ReduceMax"], count["MatMul"]) == (1, 1, 3)
    assert count["DequantizeLinear"] == 1 + 3


def test_a_static_and_a_dynamic_reader_have_a_quantizer_each(tmp_path: Path) -> None:
    b = three_linears()
    made = quantize(b, tmp_path, recipe({"match": "q", "activations": STATIC}), Seen({"x": X.reshape(-1, K)}))
    count = operators(made.folder / "model.onnx")
    assert (count["QuantizeLinear"], count["ReduceMax"]) == (2, 1)
    for name, got in zip("qkv", run(made), strict=True):
        exact = X.astype(np.float64) @ b.initializers[f"{name}.weight"].T
        assert relative_error(exact, got) < 0.03


def test_products_and_outputs_keep_their_names(tmp_path: Path) -> None:
    b = three_linears()
    before = load(b.save(tmp_path))
    after = load(quantize(b, tmp_path / "q", recipe()).folder / "model.onnx")
    products = [node.name for node in after.nodes if node.op == "MatMul"]
    assert (
        products == [node.name for node in before.nodes if node.op == "MatMul"] == ["q/MatMul", "k/MatMul", "v/MatMul"]
    )
    assert [tensor.name for tensor in after.outputs] == [tensor.name for tensor in before.outputs]
    names = [node.name for node in after.nodes]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("activations", [{"granularity": "per_token"}, STATIC])
@pytest.mark.parametrize("build", [one_linear, three_linears])
def test_integer_kernels_fuse_and_equal_the_reference(
    tmp_path: Path, build: Any, activations: Mapping[str, str]
) -> None:
    b: Builder = build()
    made = quantize(b, tmp_path, recipe(activations=activations), Seen({"x": X.reshape(-1, K)}))
    for expected, got in zip(run(made), run(made, mode="int8"), strict=True):
        assert relative_error(expected, got) <= TOLERANCE
    fused = optimized(made.folder / "model.onnx", tmp_path)
    assert fused["MatMulIntegerToFloat"] == len(b.outputs)
    assert fused["MatMul"] == 0


def test_activations_are_unsigned_on_the_cpu_and_signed_for_tensorrt(tmp_path: Path) -> None:
    made = quantize(three_linears(), tmp_path, recipe(compute_dtype="float16"))
    for role, zero in (("float32", np.array(128, np.uint8)), ("float16", np.array(0, np.int8))):
        path = made.folder / made.result.graphs[role]
        zeros = [node.inputs[2] for node in load(path).nodes if node.op == "QuantizeLinear"]
        values: list[Any] = [zero_point.values for zero_point in zeros]  # type: ignore[attr-defined]
        assert [(value.item(), value.dtype) for value in values] == [(zero.item(), zero.dtype)]


@pytest.mark.parametrize("activations", [{"granularity": "per_token"}, STATIC, None])
def test_the_float16_graph_is_clean_for_tensorrt(tmp_path: Path, activations: Mapping[str, str] | None) -> None:
    b = three_linears()
    made = quantize(
        b, tmp_path, recipe(activations=activations, compute_dtype="float16"), Seen({"x": X.reshape(-1, K)})
    )
    path = made.folder / "model.float16.onnx"
    for capability in (75, 89):
        assert lint(path, target="tensorrt-rtx", capabilities=[capability]) == []
    assert lint(made.folder / "model.onnx", target="onnxruntime") == []
    expected = X.astype(np.float64) @ b.initializers["q.weight"].T
    assert relative_error(expected, run(made, role="float16")[0]) < 0.02


def test_each_quantized_linear_needs_a_range_if_it_is_static(tmp_path: Path) -> None:
    graph = load(one_linear().save(tmp_path))
    specs = {"fc": LinearSpec(WeightSpec(), StaticActivation(RangeMethod.MINMAX))}
    insert = InsertQdq(find_linears(graph), specs, {}, placeholder)
    with pytest.raises(BismoothError, match=r"^x: has no range for its static scale\. Expected one from calibration"):
        insert.apply(graph)


def test_linears_without_a_specification_stay_as_they_are(tmp_path: Path) -> None:
    graph = load(one_linear().save(tmp_path))
    before = [node.name for node in graph.nodes]
    InsertQdq(find_linears(graph), {}, {}, placeholder).apply(graph)
    assert [node.name for node in graph.nodes] == before
    InsertQdq(find_linears(graph), {"fc": LinearSpec()}, {}, placeholder).apply(graph)
    assert [node.name for node in graph.nodes] == before
