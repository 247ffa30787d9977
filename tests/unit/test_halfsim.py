"""The simulation of 16-bit graphs: rounding where hardware rounds, and the edges that overflow found by name."""

from pathlib import Path

import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.graph import save
from bismooth.passes.precision import SetPrecision
from bismooth.tools.halfsim import HalfRun, HalfSimulation
from tests.quantized import per_token
from tests.textgraphs import Array, externalize, make, open_graph, run, tiny_llama, tokens

RNG = np.random.default_rng(0)
HALF = np.dtype(np.float16)


def values(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def simulation(text: str, folder: Path, **constants: Array) -> HalfSimulation:
    path = folder / "half.onnx"
    path.write_bytes(make(text, **constants).SerializeToString())
    return HalfSimulation(path)


def feed(text: str, folder: Path, x: Array, **constants: Array) -> HalfRun:
    with simulation(text, folder, **constants) as simulated:
        return simulated.feed({"x": x})


CAST = "(float[n] x) => (float[n] y) { h = Cast<to = 10>(x)  y = Cast<to = 1>(h) }"


def test_values_are_rounded_to_half(tmp_path: Path) -> None:
    x = np.array([1 + 2**-12, 70000, 65519, 1e-8, -(2.0**-24)], np.float32)
    result = feed(CAST, tmp_path, x)
    assert result.logits.tolist() == [1, np.inf, 65504, 0, -(2.0**-24)]


def test_values_are_rounded_to_bfloat16(tmp_path: Path) -> None:
    text = CAST.replace("10", "16")
    result = feed(text, tmp_path, np.array([1 + 2**-9, 1 + 2**-7, 70000], np.float32))
    assert result.logits.tolist() == [1, 1 + 2**-7, 70144]


@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Div"])
def test_each_operation_rounds_as_numpy_in_half(tmp_path: Path, op: str) -> None:
    """The result equals numpy's float16 arithmetic, which rounds after each operation, bit by bit."""
    text = f"""(float[n] x, float[n] z) => (float[n] y) {{
        a = Cast<to = 10>(x)  b = Cast<to = 10>(z)  c = {op}(a, b)  d = Add(c, a)  e = Mul(d, b)  y = Cast<to = 1>(e)
    }}"""
    x, z = 10 * values(1000), values(1000)
    with simulation(text, tmp_path) as simulated:
        got = simulated.feed({"x": x, "z": z}).logits
    a, b = x.astype(HALF), z.astype(HALF)
    functions = {"Add": np.add, "Mul": np.multiply, "Sub": np.subtract, "Div": np.divide}
    with np.errstate(over="ignore"):
        expected = (functions[op](a, b) + a) * b
    assert np.array_equal(got, expected.astype(np.float32))


def test_a_sum_that_overflows_is_found_by_name(tmp_path: Path) -> None:
    text = """(float[n, 64] x) => (float[n, 64] y) {
        h = Cast<to = 10>(x)  m = MatMul(h, w)  r = Relu(m)  s = Mul(r, small)  y = Cast<to = 1>(s)
    }"""
    weight = np.full((64, 64), 32, HALF)
    with simulation(text, tmp_path, w=weight, small=np.array(2**-10, HALF)) as simulated:
        fine = simulated.feed({"x": np.full((3, 64), 10, np.float32)})
        over = simulated.feed({"x": np.full((3, 64), 40, np.float32)})
        edges = {edge.value: place for place, edge in enumerate(simulated.edges)}
        assert list(edges) == ["h", "m", "s"]  # Relu's result is m's, or zero
        assert fine.ratios[edges["m"]] == pytest.approx(20480 / 65504)
        assert simulated.findings(fine.ratios) == []
        assert fine.logits[0, 0] == 20
        found = simulated.findings(over.ratios)
        assert [finding.node for finding in found] == ["m/MatMul", "s/Mul"]
        assert found[0].message.startswith("value m reached infinite in float16. Expected at most 0.5 of 65504.")
        assert np.isinf(over.logits).all()


def test_a_limit_is_a_share_of_the_largest_number(tmp_path: Path) -> None:
    with simulation(CAST, tmp_path) as simulated:
        ratios = simulated.feed({"x": np.array([-40000], np.float32)}).ratios
        assert [str(finding.severity) for finding in simulated.findings(ratios)] == ["error"]
        assert "value h reached 40000 in float16" in simulated.findings(ratios)[0].message
        assert simulated.findings(ratios, limit=0.7) == []


def test_nan_is_found_where_it_arises(tmp_path: Path) -> None:
    text = "(float[n] x) => (float[n] y) { h = Cast<to = 10>(x)  d = Div(h, h)  s = Add(h, h)  y = Cast<to = 1>(d) }"
    with simulation(text, tmp_path) as simulated:
        found = simulated.findings(simulated.feed({"x": np.array([1, 0, 2], np.float32)}).ratios)
    assert [finding.node for finding in found] == ["d/Div"]
    assert "reached not a number" in found[0].message


def test_llama_stays_close_and_every_edge_is_measured(tmp_path: Path) -> None:
    model = tiny_llama()
    externalize(model, tmp_path, *[tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2])
    graph = open_graph(model, tmp_path)
    SetPrecision("float16").apply(graph)
    save(graph, tmp_path / "half.onnx")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (expected,) = run(tiny_llama(), tokens())
    with HalfSimulation(tmp_path / "half.onnx") as simulated:
        result = simulated.run(tokens()["input_ids"], tokens()["attention_mask"])
        unmasked = simulated.run(tokens()["input_ids"])
        names = {edge.node for edge in simulated.edges}
    real = tokens()["attention_mask"] > 0
    error = np.abs(result.logits - expected)[real].max() / np.abs(expected).max()
    assert 1e-5 < error < 0.01
    assert not np.array_equal(unmasked.logits, result.logits)
    assert np.isfinite(result.ratios).all()
    assert (result.ratios > 0).all()
    assert {"l0_attention/Attention/MatMul", "l1_q/MatMul", "l0_q_weight/Cast_float16", "logits/MatMul"} <= names
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_stored_weight_that_overflows_is_found(tmp_path: Path) -> None:
    weight = values(64, 64)
    weight[3, 4] = -66000
    model = make("(float[n, 64] x) => (float[n, 64] y) { y = MatMul(x, w) }", w=weight)
    externalize(model, tmp_path, "w")
    graph = open_graph(model, tmp_path)
    SetPrecision("float16").apply(graph)
    save(graph, tmp_path / "half.onnx")
    with HalfSimulation(tmp_path / "half.onnx") as simulated:
        found = simulated.findings(simulated.feed({"x": values(2, 64)}).ratios)
    assert found[0].node == "w/Cast_float16"


def test_clamped_masks_are_no_finding(tmp_path: Path) -> None:
    text = """(float[1, 2, n, 8] x, float[n, n] m) => (float[1, 2, n, 8] y) {
        i = Cast<to = 7>(m)  f = Cast<to = 1>(i)  inverted = Sub(one, f)  bias = Mul(inverted, lowest)
        y = Attention(x, x, x, bias)
    }"""
    constants = {"one": np.array(1, np.float32), "lowest": np.array(np.finfo(np.float32).min)}
    graph = open_graph(make(text, **constants), tmp_path)
    SetPrecision("float16").apply(graph)
    save(graph, tmp_path / "half.onnx")
    with HalfSimulation(tmp_path / "half.onnx") as simulated:
        result = simulated.feed({"x": values(1, 2, 4, 8), "m": np.tril(np.ones((4, 4), np.float32))})
        assert simulated.findings(result.ratios) == []


def test_an_integer_gemm_is_exact_and_rounded_once(tmp_path: Path) -> None:
    """As the kernel: int32 sums, times 2^-14, rounded to half; then the rescale in float32."""
    path = tmp_path / "half.onnx"
    model = per_token("q")
    path.write_bytes(model.SerializeToString())
    x = RNG.standard_normal((1, 5, 256)).astype(HALF)
    with HalfSimulation(path) as simulated:
        got = simulated.feed({"x": x}).logits
        assert [edge.value for edge in simulated.edges] == ["q", "q_y"]
    constants = {tensor.name: _array(tensor) for tensor in model.graph.initializer}
    wide = x.astype(np.float32)
    t = np.maximum(np.abs(wide).max(-1, keepdims=True), np.float32(1e-20)) / np.float32(127)
    xq = np.rint(wide / t).astype(np.int64)
    sums = xq @ constants["q_int8"].astype(np.int64)
    product = (sums * 2.0**-14).astype(HALF).astype(np.float32)
    expected = (product * constants["q_r"] * t).astype(HALF)
    assert np.array_equal(got, expected.astype(np.float32))


def _array(tensor: object) -> Array:
    from onnx import TensorProto, numpy_helper

    assert isinstance(tensor, TensorProto)
    return numpy_helper.to_array(tensor)


def test_dequantized_values_for_float_readers_are_rounded(tmp_path: Path) -> None:
    text = """(float[n, 4] x) => (float[n, 4] y) {
        h = Cast<to = 10>(x)  w = DequantizeLinear(wq, s)  m = MatMul(h, w)  y = Cast<to = 1>(m)
    }"""
    scale = np.array(0.013, HALF)
    wq = (25 * np.eye(4)).astype(np.int8)
    result = feed(text, tmp_path, np.ones((1, 4), np.float32), wq=wq, s=scale)
    assert result.logits[0, 0] == np.float32(HALF.type(25) * scale)
    assert result.logits[0, 0] != np.float32(25) * np.float32(scale)


def test_a_float32_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BismoothError, match=r"half\.onnx: nothing to simulate\. Expected a graph that computes in float16"
    ):
        simulation("(float[n] x) => (float[n] y) { y = Relu(x) }", tmp_path)


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    with simulation(CAST, tmp_path) as simulated, pytest.raises(BismoothError, match="has the input 'x'"):
        simulated.run(np.zeros((1, 3), np.int64))
