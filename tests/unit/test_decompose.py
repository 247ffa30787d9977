"""Attention and RMS norms in primitive operators of opset 20: the same numbers, and errors for what it lacks."""

from pathlib import Path

import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes._gs import Graph, make_variable
from bismooth.passes.decompose import Decompose
from bismooth.passes.precision import SetPrecision
from tests.textgraphs import Array, check, make, open_graph, ops, run, tiny_llama, tokens, types

RNG = np.random.default_rng(1)


def values(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def lowered(text: str, folder: Path, opset: int = 23, /, **constants: Array) -> Graph:
    graph = open_graph(make(text, opset, **constants), folder)
    Decompose().apply(graph)
    return graph


def test_llama(tmp_path: Path) -> None:
    model = tiny_llama()
    graph = open_graph(model, tmp_path)
    assert Decompose().apply(graph) == 7
    older = check(graph)
    assert (older.opset_import[0].version, older.ir_version) == (20, 9)
    assert {"Attention", "RMSNormalization"}.isdisjoint(ops(graph))
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)
    (expected,), (got,) = run(model, tokens()), run(older, tokens())
    real = tokens()["attention_mask"] > 0
    assert np.abs(got - expected)[real].max() < 1e-5 * np.abs(expected).max()
    assert np.isfinite(got).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_precision_before_or_after_gives_the_same_types(tmp_path: Path, dtype: str) -> None:
    first, second = open_graph(tiny_llama(), tmp_path), open_graph(tiny_llama(), tmp_path)
    precision = SetPrecision("float16" if dtype == "float16" else "bfloat16")
    for step in (Decompose(), precision):
        step.apply(first)
    for step in (precision, Decompose()):
        step.apply(second)
    computing = sorted(set(ops(first)) - {"Cast", "Constant"})
    assert sorted(types(first, *computing)) == sorted(types(second, *computing))
    assert set(types(first, "MatMul", "Expand")) == {dtype}
    assert set(types(first, "Softmax", "Where", "ReduceMean", "Sqrt", "Div")) == {"float32"}


ATTENTION = "(float[b, 4, n, 8] q, float[b, {kv}, m, 8] k, float[b, {kv}, m, {v}] v{mask}) => (float[b, 4, n, {v}] y)"


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("v", [8, 6])
@pytest.mark.parametrize("attrs", ["", "<scale = 0.3>", "<softcap = 2.0>", "<is_causal = 1>"])
def test_attention(tmp_path: Path, kv: int, v: int, attrs: str) -> None:
    text = ATTENTION.format(kv=kv, v=v, mask="") + f"{{ y = Attention{attrs}(q, k, v) }}"
    rows = 5 if attrs else 3
    feeds = {"q": values(2, 4, rows, 8), "k": values(2, kv, 5, 8), "v": values(2, kv, 5, v)}
    assert_equal(text, feeds, tmp_path)


@pytest.mark.parametrize("shape", [(5, 5), (1, 5, 5), (2, 1, 5, 5), (2, 4, 5, 5)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_masks(tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    mask = RNG.random(shape) < 0.6
    mask[..., 0] = True
    dims = ", ".join(str(size) for size in shape)
    text = ATTENTION.format(kv=2, v=8, mask=f", {kind}[{dims}] mask") + "{ y = Attention(q, k, v, mask) }"
    feeds = {"q": values(2, 4, 5, 8), "k": values(2, 2, 5, 8), "v": values(2, 2, 5, 8)}
    feeds["mask"] = mask if kind == "bool" else np.where(mask, values(*shape), np.float32(-1e4))
    assert_equal(text, feeds, tmp_path)


def test_a_row_without_keys_is_the_mean_of_v(tmp_path: Path) -> None:
    text = ATTENTION.format(kv=4, v=8, mask=", bool[n, m] mask") + "{ y = Attention(q, k, v, mask) }"
    mask = np.array([[False, False, False], [True, True, False]])
    feeds = {"q": values(1, 4, 2, 8), "k": values(1, 4, 3, 8), "v": values(1, 4, 3, 8), "mask": mask}
    (got,) = run(check(lowered(text, tmp_path)), feeds)
    np.testing.assert_allclose(got[:, :, 0], feeds["v"].mean(axis=2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [-1, -2, 1])
def test_rms_normalization(tmp_path: Path, axis: int) -> None:
    shape = "[4]" if axis == -1 else "[3, 4]"
    text = f"(float[b, 3, 4] x, float{shape} g) => (float[b, 3, 4] y) {{"
    text += f"y = RMSNormalization<axis = {axis}, epsilon = 0.01>(x, g) }}"
    assert_equal(text, {"x": values(2, 3, 4), "g": values(*eval_shape(shape))}, tmp_path)


def eval_shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.strip("[]").split(","))


def test_rms_normalization_in_float16_squares_in_float32(tmp_path: Path) -> None:
    text = "(float16[n, 8] x, float16[8] g) => (float16[n, 8] y) { y = RMSNormalization(x, g) }"
    graph = lowered(text, tmp_path)
    assert ops(graph)[0] == "Cast"
    assert types(graph, "Mul", "ReduceMean", "Add", "Sqrt", "Div") == ["float32"] * 5 + ["float16"]
    (got,) = run(check(graph), {"x": np.full((1, 8), 300, np.float16), "g": np.ones(8, np.float16)})
    assert got.tolist() == [[1.0] * 8]


def test_rms_normalization_without_a_shape_is_refused(tmp_path: Path) -> None:
    graph = open_graph(make("(float[n, 8] x, float[8] g) => (float[n, 8] y) { y = RMSNormalization(x, g) }"), tmp_path)
    graph.nodes[0].inputs[0] = make_variable("x", np.dtype(np.float32), None)
    with pytest.raises(
        BismoothError, match=r"^decompose: node y/.* cannot be lowered.*Expected a recorded shape, got none"
    ):
        Decompose().apply(graph)


def test_attributes_that_say_their_default_are_dropped(tmp_path: Path) -> None:
    text = """(float[n, 8] x) => (float[n, 8] y) {
        q = QuantizeLinear<block_size = 0, output_dtype = 0>(x, s, z)
        y = DequantizeLinear<block_size = 0>(q, s, z)
    }"""
    graph = lowered(text, tmp_path, s=np.array(0.5, np.float32), z=np.array(0, np.int8))
    assert [node.attrs for node in graph.nodes] == [{}, {}]
    check(graph)


def assert_equal(text: str, feeds: dict[str, Array], folder: Path) -> None:
    """The lowered graph gives what ONNX Runtime's own operator gives."""
    (expected,), (got,) = run(make(text), feeds), run(check(lowered(text, folder)), feeds)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_blocked_scales_are_refused(tmp_path: Path) -> None:
    text = (
        "(float[n, 8] x) => (float[n, 8] y) { w = DequantizeLinear<axis = 0, block_size = 4>(q, s)  y = MatMul(x, w) }"
    )
    with pytest.raises(
        BismoothError, match=r"^decompose: node w/.* \(DequantizeLinear\) does not exist in opset 20\. .*block_size=4"
    ):
        lowered(text, tmp_path, q=np.ones((8, 8), np.int8), s=np.ones((2, 8), np.float32))


def test_operators_that_are_too_new_are_refused(tmp_path: Path) -> None:
    text = "(float[1, 2, n, 8] x, float[n, 4] c, float[n, 4] s, int64[1, n] p) => (float[1, 2, n, 8] y) {"
    text += " y = RotaryEmbedding(x, c, s, p) }"
    with pytest.raises(BismoothError, match=r"^decompose: node y/RotaryEmbedding .*got RotaryEmbedding of opset 23\."):
        lowered(text, tmp_path)


def test_operators_that_changed_their_meaning_are_refused(tmp_path: Path) -> None:
    text = "(float[n, 4, 8] x) => (float[n, 4, 8] y) { y = GroupNormalization<num_groups = 2>(x, g, g) }"
    with pytest.raises(
        BismoothError, match=r"^decompose: node y/GroupNormalization .*Expected an operator of opset 20"
    ):
        lowered(text, tmp_path, g=np.ones(4, np.float32))


def test_types_that_are_too_new_are_refused(tmp_path: Path) -> None:
    text = "(bfloat16[n, 4] x) => (bfloat16[n, 4] y) { y = Selu(x) }"
    with pytest.raises(
        BismoothError, match=r"^decompose: node y/Selu .*got x of type tensor\(bfloat16\)\. Export with --opset 23"
    ):
        lowered(text, tmp_path)


def test_control_flow_is_refused(tmp_path: Path) -> None:
    branch = "{0} = {0} () => (float[n, 8] {0}_v) {{ {0}_v = Relu(x) }}"
    text = "(float[n, 8] x, bool c) => (float[n, 8] y) { y = If (c) <"
    text += ", ".join(branch.format(name) for name in ("then_branch", "else_branch")) + "> }"
    with pytest.raises(BismoothError, match=r"^decompose: node y/If .*Expected a graph without control flow"):
        lowered(text, tmp_path)


REFUSED = {
    "cache": (
        "(float[1, 2, n, 8] q, float[1, 2, p, 8] c)"
        " => (float[1, 2, n, 8] y, float[1, 2, t, 8] pk, float[1, 2, t, 8] pv)",
        "y, pk, pv = Attention(q, q, q, , c, c)",
        r"Expected attention over its own keys alone, got one with a cache",
    ),
    "rank": (
        "(float[1, n, 16] q) => (float[1, n, 16] y)",
        "y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, q, q)",
        r"Expected Q, K, V of shape \[batch, heads, sequence, size\], got ranks \[3, 3, 3\]",
    ),
    "head size": (
        "(float[1, 2, n, d] q) => (float[1, 2, n, d] y)",
        "y = Attention(q, q, q)",
        r"Expected a fixed head size, or a scale, got d",
    ),
    "heads": (
        "(float[1, h, n, 8] q, float[1, 2, n, 8] k) => (float[1, h, n, 8] y)",
        "y = Attention(q, k, k)",
        r"Expected fixed numbers of heads, .* got h and 2",
    ),
}


@pytest.mark.parametrize(("signature", "node", "message"), REFUSED.values(), ids=REFUSED)
def test_attention_that_cannot_be_lowered(tmp_path: Path, signature: str, node: str, message: str) -> None:
    with pytest.raises(
        BismoothError, match=r"^decompose: node y/Attention \(Attention\) cannot be lowered.*" + message
    ):
        lowered(f"{signature} {{ {node} }}", tmp_path)
