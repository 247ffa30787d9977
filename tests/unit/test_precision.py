"""float32 graphs turned into 16-bit ones: which node computes in which type, where Casts stand, equal numbers."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes._gs import Graph, dtype_of, make_constant, make_variable, read
from bismooth.passes.precision import SetPrecision, narrow, store, stored_casts
from tests.textgraphs import Array, check, externalize, make, open_graph, ops, run, tiny_llama, tokens, types

F2, F4, BF16 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
BF = np.dtype(ml_dtypes.bfloat16)
RNG = np.random.default_rng(0)


def values(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def half(text: str, folder: Path, /, **constants: Array) -> Graph:
    """The graph of a text in float16."""
    graph = open_graph(make(text, **constants), folder)
    SetPrecision("float16").apply(graph)
    check(graph)
    return graph


def assert_no_cast_chains(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op == "Cast":
            assert not any(reader.op == "Cast" for reader in node.outputs[0].outputs), node.name


def test_llama_in_float16(tmp_path: Path) -> None:
    model = tiny_llama()
    graph = open_graph(model, tmp_path)
    report = SetPrecision("float16").apply(graph)
    converted = check(graph)
    assert set(types(graph, "MatMul", "Attention", "Gather", "Sigmoid", "Add")) == {"float16"}
    assert set(types(graph, "RMSNormalization", "Cos", "Sin")) == {"float32"}
    assert_no_cast_chains(graph)
    reads = [(node.inputs[0].name, node.attrs["to"]) for node in graph.nodes if node.op == "Cast"]
    assert len(set(reads)) == len(reads) == report.casts
    assert (report.narrow, report.wide) == (87, 9)  # 5 norms, 4 for the angles
    (expected,), (got,) = run(model, tokens()), run(converted, tokens())
    real = tokens()["attention_mask"] > 0
    assert got.dtype == np.float32
    assert 0 < np.abs(got - expected)[real].max() < 0.01 * np.abs(expected).max()


def test_llama_in_bfloat16(tmp_path: Path) -> None:
    graph = open_graph(tiny_llama(), tmp_path)
    SetPrecision("bfloat16").apply(graph)
    check(graph)
    assert set(types(graph, "MatMul", "Attention", "Gather", "Add")) == {"bfloat16"}
    assert set(types(graph, "RMSNormalization", "Cos")) == {"float32"}


def test_the_two_casts_of_rotary_tables_serve_all_layers(tmp_path: Path) -> None:
    graph = open_graph(tiny_llama(layers=3), tmp_path)
    SetPrecision("float16").apply(graph)
    tables = [node for node in graph.nodes if node.op == "Cast" and node.inputs[0].name in ("cos", "sin")]
    assert len(tables) == 2
    assert all(len(node.outputs[0].outputs) == 6 for node in tables)


def test_angles_are_float32_at_far_positions(tmp_path: Path) -> None:
    text = """(float[n, 64] x, int64[n, 1] positions) => (float[n, 64] y, float[n, 64] angles) {
        moments = Cast<to = 1>(positions)
        angle = MatMul(moments, inv_freq)
        angles = Concat<axis = -1>(angle, angle)
        cos = Cos(angles)
        wx = MatMul(x, w)
        y = Mul(wx, cos)
    }"""
    inv_freq = (10000.0 ** -(np.arange(0, 64, 2) / 64)).astype(np.float32)[None]
    model = make(text, inv_freq=inv_freq, w=np.eye(64, dtype=np.float32))
    graph = open_graph(model, tmp_path)
    SetPrecision("float16").apply(graph)
    feeds = {"x": np.ones((3, 64), np.float32), "positions": np.array([[8000], [8001], [131071]])}
    expected, got = run(model, feeds), run(check(graph), feeds)
    assert np.array_equal(got[1], expected[1])
    assert np.abs(got[0] - expected[0]).max() < 2**-11
    assert types(graph, "Cos", "Mul") == ["float32", "float32"]  # y is an output, so it stays in float32


def test_a_sine_that_is_an_activation_leaves_its_linears_narrow(tmp_path: Path) -> None:
    graph = half(
        "(float[n, 8] x) => (float[n, 8] y) { a = MatMul(x, w)  b = Sin(a)  y = MatMul(b, w) }",
        tmp_path,
        w=values(8, 8),
    )
    assert types(graph, "MatMul", "Sin") == ["float16", "float32", "float16"]


@pytest.mark.parametrize("norm", ["RMSNormalization(x, g)", "LayerNormalization(x, g, b)"])
def test_norms_compute_in_float32_with_their_own_gamma(tmp_path: Path, norm: str) -> None:
    text = f"(float[n, 8] x) => (float[n, 8] y) {{ n = {norm}  y = MatMul(n, w) }}"
    gamma, beta = np.full(8, 1e-7, np.float32), np.zeros(8, np.float32)
    model = make(text, g=gamma, b=beta, w=1e6 / 32 * np.eye(8, dtype=np.float32))
    graph = open_graph(model, tmp_path)
    SetPrecision("float16").apply(graph)
    (node,) = [node for node in graph.nodes if node.op.endswith("Normalization")]
    assert [dtype_of(tensor) for tensor in (*node.inputs, *node.outputs)] == [F4] * (len(node.inputs) + 1)
    assert np.array_equal(read(node.inputs[1]), gamma)


def test_a_float32_reader_takes_the_norm_directly(tmp_path: Path) -> None:
    text = """(float[n, 8] x) => (float[n, 8] y, float[n, 1] t) {
        n = RMSNormalization(x, g)  y = MatMul(n, w)  a = Abs(n)  t = ReduceMax(a, axes)
    }"""
    graph = half(text, tmp_path, g=values(8), w=values(8, 8), axes=np.array([-1]))
    assert types(graph, "RMSNormalization", "Abs", "ReduceMax") == ["float32"] * 3
    assert ops(graph) == ["RMSNormalization", "Cast", "MatMul", "Cast", "Abs", "ReduceMax"]


DECOMPOSED = {
    "pow": "s = Pow(h, two)",
    "mul": "s = Mul(h, h)",
}


@pytest.mark.parametrize("square", DECOMPOSED.values(), ids=DECOMPOSED)
def test_decomposed_norms_are_float32(tmp_path: Path, square: str) -> None:
    text = f"""(float[n, 8] x) => (float[n, 8] y) {{
        h = MatMul(x, w)  {square}  m = ReduceMean<keepdims = 1>(s, axes)  e = Add(m, eps)  q = Sqrt(e)
        r = Reciprocal(q)  u = Mul(h, r)  n = Mul(g, u)  y = MatMul(n, w)
    }}"""
    constants = {"two": np.array(2, np.float32), "eps": np.array(1e-6, np.float32), "axes": np.array([-1])}
    graph = half(text, tmp_path, w=values(8, 8), g=values(8), **constants)
    assert set(types(graph, "Pow", "Mul", "ReduceMean", "Add", "Sqrt", "Reciprocal")) == {"float32"}
    assert types(graph, "MatMul") == ["float16"] * 2
    assert ops(graph).count("Cast") == 4  # x, h, n, y


def test_attention_in_primitive_operators_has_its_softmax_and_mask_in_float32(tmp_path: Path) -> None:
    text = """(float[1, n, 8] x, bool[n, n] mask) => (float[1, n, 8] y) {
        q = MatMul(x, w)  k = MatMul(x, w)  v = MatMul(x, w)  kt = Transpose<perm = [0, 2, 1]>(k)
        s = MatMul(q, kt)  scaled = Mul(s, scale)  masked = Where(mask, scaled, lowest)
        p = Softmax<axis = -1>(masked)  y = MatMul(p, v)
    }"""
    lowest = np.array(np.finfo(np.float32).min)
    model = make(text, w=values(8, 8), scale=np.array(8**-0.5, np.float32), lowest=lowest)
    graph = open_graph(model, tmp_path)
    SetPrecision("float16").apply(graph)
    assert types(graph, "Mul", "Where", "Softmax") == ["float32"] * 3
    assert types(graph, "MatMul", "Transpose") == ["float16"] * 6
    mask = np.tril(np.ones((5, 5), np.bool_))
    mask[0] = False
    feeds = {"x": values(1, 5, 8), "mask": mask}
    (expected,), (got,) = run(model, feeds), run(check(graph), feeds)
    assert np.abs(got - expected).max() < 0.02


def test_masks_are_clamped_where_they_become_narrow(tmp_path: Path) -> None:
    text = """(float[1, 2, n, 8] x, bool[n, n] mask, float[n, n] m) => (float[1, 2, n, 8] y, float[1, 2, n, 8] z) {
        bias = Where(mask, zero, lowest)
        y = Attention(x, x, x, bias)
        i = Cast<to = 7>(m)  f = Cast<to = 1>(i)  inverted = Sub(one, f)  bias2 = Mul(inverted, lowest)
        z = Attention(x, x, x, bias2)
    }"""
    constants = {"zero": np.array(0, np.float32), "one": np.array(1, np.float32)}
    model = make(text, lowest=np.array(np.finfo(np.float32).min), **constants)
    graph = open_graph(model, tmp_path)
    SetPrecision("float16").apply(graph)
    assert types(graph, "Where", "Attention", "Attention") == ["float16"] * 3
    mask = np.tril(np.ones((5, 5), np.bool_))
    feeds = {"x": values(1, 2, 5, 8), "mask": mask, "m": mask.astype(np.float32)}
    (expected, same), (got, other) = run(model, feeds), run(check(graph), feeds)
    assert np.abs(got - expected).max() < 0.01
    assert np.abs(other - same).max() < 0.01


@pytest.mark.parametrize(("scale", "type_"), [(0.5, "float16"), (1e5, "float32"), (1e-6, "float32"), (0.0, "float16")])
def test_scalars_that_float16_cannot_hold_stay_in_float32(tmp_path: Path, scale: float, type_: str) -> None:
    text = "(float[n, 8] x) => (float[n, 8] y) { h = MatMul(x, w)  s = Mul(h, scale)  y = MatMul(s, w) }"
    graph = half(text, tmp_path, w=values(8, 8), scale=np.array(scale, np.float32))
    assert types(graph, "Mul") == [type_]
    (node,) = [node for node in graph.nodes if node.op == "Mul"]
    assert read(node.inputs[1]) == np.float32(scale)
    assert ops(graph).count("Cast") == (2 if type_ == "float16" else 4)


def test_a_weight_that_overflows_is_an_error(tmp_path: Path) -> None:
    weight = values(8, 8)
    weight[3, 4] = 70000
    with pytest.raises(
        BismoothError, match=r"^y/MatMul: w: does not fit into float16\. Expected values within ±65504, got 70000\."
    ):
        half("(float[n, 8] x) => (float[n, 8] y) { y = MatMul(x, w) }", tmp_path, w=weight)


def test_sums_after_a_post_norm_are_float32(tmp_path: Path) -> None:
    """Gemma's residual stream: what a norm returns is added in float32."""
    text = """(int64[n] ids) => (float[n, 8] y) {
        e = Gather(w, ids)  a = MatMul(e, w)  n = RMSNormalization(a, g)  r = Add(e, n)  y = MatMul(r, w)
    }"""
    graph = half(text, tmp_path, w=values(8, 8), g=values(8))
    assert types(graph, "Gather", "MatMul", "Add") == ["float16", "float16", "float32", "float16"]


def test_residual_sums_stay_narrow_before_norms(tmp_path: Path) -> None:
    text = """(int64[n] ids) => (float[n, 8] y) {
        e = Gather(w, ids)  a = MatMul(e, w)  r = Add(e, a)  n = RMSNormalization(r, g)  y = MatMul(n, w)
    }"""
    assert types(half(text, tmp_path, w=values(8, 8), g=values(8)), "Add") == ["float16"]


def test_a_float_input_does_not_widen_what_reads_it(tmp_path: Path) -> None:
    text = """(float[n, 8] x) => (float[n, 8] y) {
        a = MatMul(x, w)  r = Add(x, a)  n = RMSNormalization(r, g)  y = MatMul(n, w)
    }"""
    assert types(half(text, tmp_path, w=values(8, 8), g=values(8)), "Add") == ["float16"]


def test_rotating_the_result_of_an_integer_gemm_is_no_rescale(tmp_path: Path) -> None:
    text = """(float[n, 8] x) => (float[n, 8] y) {
        q = QuantizeLinear(x, one, zero)  d = DequantizeLinear(q, one, zero)  wd = DequantizeLinear(wq, one, zero)
        acc = MatMul(d, wd)  h = Mul(acc, r)  moved = Reshape(h, shape)  table = Cos(angles)
        turned = Mul(moved, table)  y = MatMul(turned, w)
    }"""
    constants = {"one": np.array(1, np.float32), "zero": np.array(0, np.int8), "shape": np.array([0, 8])}
    weights = {"wq": np.ones((8, 8), np.int8), "r": values(8), "w": values(8, 8), "angles": values(8)}
    graph = half(text, tmp_path, **constants, **weights)
    assert types(graph, "MatMul", "Mul", "Reshape") == ["float16", "float32", "float16", "float16", "float16"]


def test_moved_activations_are_widened_after_the_move(tmp_path: Path) -> None:
    text = """(float[2, n, 8] x) => (float[n, 2, 8] y) {
        a = MatMul(x, w)  t = Transpose<perm = [1, 0, 2]>(a)  y = RMSNormalization(t, g)
    }"""
    assert types(half(text, tmp_path, w=values(8, 8), g=values(8)), "Transpose") == ["float16"]


def test_new_names_do_not_collide_with_old_ones(tmp_path: Path) -> None:
    model = make(
        "(float[n, 8] x) => (float[n, 8] y) { h = MatMul(x, w)  z = Add(h, w1)  y = Exp(z) }",
        w=values(8, 8),
        w1=values(8),
    )
    for node in model.graph.node:
        node.output[:] = [{"h": "x.float16", "z": "x.float16.float32"}.get(name, name) for name in node.output]
        node.input[:] = [{"h": "x.float16", "z": "x.float16.float32"}.get(name, name) for name in node.input]
    del model.graph.value_info[:]
    graph = open_graph(model, tmp_path)
    SetPrecision("float16").apply(graph)
    check(graph)
    outputs = [tensor.name for node in graph.nodes for tensor in node.outputs]
    assert len(set(outputs)) == len(outputs)


def test_the_long_name_of_the_standard_domain_is_known(tmp_path: Path) -> None:
    model = make("(float[n, 8] x) => (float[n, 8] y) { h = MatMul(x, w)  y = Exp(h) }", w=values(8, 8))
    model.graph.node[0].domain = "ai.onnx"
    graph = open_graph(model, tmp_path)
    SetPrecision("float16").apply(graph)
    assert types(graph, "MatMul") == ["float16"]
    assert [dtype_of(tensor) for tensor in graph.nodes[1].inputs] == [F2, F2]


def test_images_keep_float32_inputs_and_the_scales_of_resize(tmp_path: Path) -> None:
    text = """(float[n, 3, 8, 8] image) => (float[n, 4, 16, 16] y) {
        c = Conv<pads = [1, 1, 1, 1]>(image, w, b)  a = Relu(c)  p = MaxPool<kernel_shape = [1, 1]>(a)
        up = Resize<mode = "nearest">(p, , scales)  y = Conv<kernel_shape = [1, 1]>(up, v)
    }"""
    constants = {"w": values(4, 3, 3, 3), "b": values(4), "v": values(4, 4, 1, 1)}
    graph = half(text, tmp_path, scales=np.array([1, 1, 2, 2], np.float32), **constants)
    assert types(graph, "Conv", "Relu", "MaxPool", "Resize") == ["float16"] * 5
    (resize,) = [node for node in graph.nodes if node.op == "Resize"]
    assert dtype_of(resize.inputs[2]) == F4
    assert [dtype_of(tensor) for tensor in (*graph.inputs, *graph.outputs)] == [F4, F4]


QUANTIZED = """(int64[n] ids) => (float[n, 16] y) {
    e = Gather(w, ids)
    a = Abs(e)  peak = ReduceMax(a, axes)  floor = Max(peak, tiny)  t = Div(floor, c127)
    unit = Div(e, t)  q = QuantizeLinear(unit, one, zero)  d = DequantizeLinear(q, one, zero)
    wd = DequantizeLinear(wq, s0, zero)
    acc = MatMul(d, wd)  scaled = Mul(acc, r)  h = Mul(scaled, t)
    moved = Add(e, h)
    product = Mul(moved, inverse_scale)  q2 = QuantizeLinear(product, one, zero)  d2 = DequantizeLinear(q2, one, zero)
    acc2 = MatMul(d2, wd)  h2 = Mul(acc2, r)  y = Add(moved, h2)
}"""


def test_a_quantized_graph_scales_and_rescales_in_float32(tmp_path: Path) -> None:
    weight = values(16, 16)
    scale = np.abs(weight).max(0) / 127
    constants: dict[str, Array] = {
        "w": values(16, 16),
        "axes": np.array([-1]),
        "tiny": np.array(1e-20, np.float32),
        "c127": np.array(127, np.float32),
        "one": np.array(1, np.float32),
        "zero": np.array(0, np.int8),
        "wq": np.asarray(np.round(weight / scale), np.int8),
        "s0": np.array(2.0**-14, np.float32),
        "r": np.float32(2.0**14) * scale,
        "inverse_scale": np.array(20, np.float32),
    }
    model = make(QUANTIZED, **constants)
    graph = open_graph(model, tmp_path)
    SetPrecision("float16").apply(graph)
    assert types(graph, "Abs", "ReduceMax", "Max", "Div", "Mul") == ["float32"] * 9
    assert types(graph, "DequantizeLinear", "MatMul") == ["float16"] * 5
    quantizers = [node for node in graph.nodes if node.op == "QuantizeLinear"]
    assert [dtype_of(tensor) for node in quantizers for tensor in node.inputs[:2]] == [F4] * 4
    dequantizers = [node for node in graph.nodes if node.op == "DequantizeLinear"]
    assert [dtype_of(node.inputs[1]) for node in dequantizers] == [F2] * 3
    assert types(graph, "Add") == ["float16", "float16"]
    feeds = {"ids": np.arange(16)}
    (expected,), (got,) = run(model, feeds), run(check(graph), feeds)
    assert np.abs(got - expected).max() < 0.01 * np.abs(expected).max()


def checkpoint(folder: Path, dtype: np.dtype[np.generic]) -> Graph:
    """A linear and a norm whose weights are in a file, in a 16-bit type."""
    text = """(float[n, 48] x) => (float[n, 48] y) {
        w32 = Cast<to = 1>(w)  g32 = Cast<to = 1>(g)  n = RMSNormalization(x, g32)  t = Transpose(w32)  y = MatMul(n, t)
    }"""
    model = make(text, w=values(48, 48).astype(dtype), g=values(48).astype(dtype))
    externalize(model, folder, "w", "g")
    return open_graph(model, folder)


def test_a_float16_checkpoint_is_read_as_it_is(tmp_path: Path) -> None:
    graph = checkpoint(tmp_path, F2)
    report = SetPrecision("float16").apply(graph)
    assert report.stored == ()
    (transpose,) = [node for node in graph.nodes if node.op == "Transpose"]
    assert transpose.inputs[0].name == "w"
    assert_no_cast_chains(graph)


def test_a_bfloat16_checkpoint_is_cast_once(tmp_path: Path) -> None:
    graph = checkpoint(tmp_path, BF)
    report = SetPrecision("float16").apply(graph)
    assert report.stored == ("g", "w")
    assert_no_cast_chains(graph)
    casts = [(cast.initializer.name, dtype_of(cast.initializer), cast.dtype) for cast in stored_casts(graph)]
    assert casts == [("g", BF, np.dtype(np.float32)), ("w", BF, F2)]


def test_stored_weights_take_the_place_of_casts(tmp_path: Path) -> None:
    text = "(float[n, 48] x) => (float[n, 48] y) { h = MatMul(x, w)  t = Transpose(w)  y = MatMul(h, t) }"
    model = make(text, w=values(48, 48))
    externalize(model, tmp_path, "w")
    graph = open_graph(model, tmp_path)
    report = SetPrecision("float16").apply(graph)
    assert report.stored == ("w",)
    (cast,) = stored_casts(graph)
    store(graph, cast, make_constant("w", narrow(read(cast.initializer), cast.dtype, "w")))
    assert stored_casts(graph) == ()
    assert [node.inputs[1].name for node in graph.nodes if node.op == "MatMul"] == ["w", "t"]
    assert len(check(graph).graph.initializer) == 1


def test_a_stored_weight_must_have_the_type_of_the_cast(tmp_path: Path) -> None:
    graph = checkpoint(tmp_path, BF)
    SetPrecision("float16").apply(graph)
    _, cast = stored_casts(graph)
    with pytest.raises(
        BismoothError, match=r"^w: the stored weight does not fit\. Expected float16 \(48, 48\), got float32"
    ):
        store(graph, cast, make_constant("w", values(48, 48)))


def test_control_flow_is_refused(tmp_path: Path) -> None:
    text = """(float[n, 8] x, bool c) => (float[n, 8] y) {
        y = If (c) <
            then_branch = a () => (float[n, 8] u) { u = Relu(x) },
            else_branch = b () => (float[n, 8] v) { v = Neg(x) }
        >
    }"""
    with pytest.raises(BismoothError, match=r"^precision: node y/If has a subgraph\. Expected .* got If\."):
        half(text, tmp_path)


def test_a_graph_that_is_narrow_already_is_refused(tmp_path: Path) -> None:
    text = "(float[n, 8] x) => (float[n, 8] y) { h = Cast<to = 10>(x)  y = Cast<to = 1>(h) }"
    with pytest.raises(
        BismoothError, match=r"^precision: value h of node h/Cast is float16 already\. Expected a graph"
    ):
        half(text, tmp_path)


def test_a_value_without_a_type_is_refused(tmp_path: Path) -> None:
    graph = open_graph(make("(float[n, 8] x) => (float[n, 8] y) { h = Relu(x)  y = Neg(h) }"), tmp_path)
    untyped = make_variable("h", None, None)
    graph.nodes[0].outputs[0] = untyped
    with pytest.raises(BismoothError, match=r"^precision: value h of node h/Relu has no recorded type\. Expected one"):
        SetPrecision("float16").apply(graph)
