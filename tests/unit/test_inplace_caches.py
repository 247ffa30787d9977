"""Graphs that update caches in place compute what those that concatenate do, or are refused; logits that are kept."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from bismooth.engines.inplace_caches import update_in_place
from bismooth.engines.kept_logits import keep_logits
from bismooth.export.errors import BismoothError
from bismooth.export.graph_names import has_caches
from tests.cached_model import KV_HEADS, LAYERS, SIZE, VOCAB, cached_model, empty_past, expected_logits
from tests.quantized import make

CAPACITY = 10
IDS = np.random.default_rng(0).integers(0, VOCAB, (2, 8))
MASK = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
POSITIONS = np.maximum(np.cumsum(MASK, 1) - 1, 0)


def check(model: onnx.ModelProto) -> None:
    checker: Any = onnx.checker
    checker.check_model(model, full_check=True)


def session(model: onnx.ModelProto) -> Any:
    runtime: Any = onnxruntime
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns of every cache that it copies
    return runtime.InferenceSession(model.SerializeToString(), options)


def shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def run_in_pieces(model: onnx.ModelProto, aliases: dict[str, str], *bounds: int, last: bool = False) -> NDArray[Any]:
    """Logits of all positions, or of the last of each piece, of which ``bounds`` are the ends."""
    program = session(model)
    real = np.ones((2, CAPACITY), np.int64)
    real[:, : MASK.shape[1]] = MASK
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    chooses = "logits_at" in types
    dtype = np.float16 if types["past_key_values.0.key"] == TensorProto.FLOAT16 else np.float32
    caches = {name: np.zeros((2, KV_HEADS, CAPACITY, SIZE), dtype) for name in aliases}
    pieces: list[NDArray[Any]] = []
    for start, end in zip((0, *bounds[:-1]), bounds, strict=True):
        feeds = {"input_ids": IDS[:, start:end], "position_ids": POSITIONS[:, start:end], "attention_mask": real}
        feeds["write_indices"] = np.array([start, start])
        if chooses:
            feeds["logits_at"] = np.arange(end - start)[-1 if last else 0 :]
        results = program.run(None, feeds | caches)
        named = {value.name: result for value, result in zip(program.get_outputs(), results, strict=True)}
        pieces.append(named["logits"])
        caches = {name: named[output] for name, output in aliases.items()}
    return np.concatenate(pieces, 1)


@pytest.mark.parametrize("window", [None, 3])
def test_logits_are_those_of_the_graph_that_concatenates(window: int | None) -> None:
    model = cached_model(window=window)
    feeds = {"input_ids": IDS, "position_ids": POSITIONS, "attention_mask": MASK, **empty_past(2, model)}
    expected = session(model).run(["logits"], feeds)[0]
    np.testing.assert_allclose(expected, expected_logits(IDS, MASK, window), atol=1e-4)
    aliases = update_in_place(model, CAPACITY, "m.onnx")
    check(model)
    for bounds in ((8,), (3, 5, 8), (1, 2, 3, 4, 5, 6, 7, 8)):
        np.testing.assert_allclose(run_in_pieces(model, aliases, *bounds), expected, atol=1e-5)


def test_inputs_and_outputs() -> None:
    model = cached_model()
    aliases = update_in_place(model, CAPACITY, "m.onnx")
    names = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    assert aliases == {f"past_key_values.{name}": f"present.{name}" for name in names}
    cache = ["batch", KV_HEADS, CAPACITY, SIZE]
    assert {value.name: shape(value) for value in model.graph.input} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", CAPACITY],
        "position_ids": ["batch", "sequence"],
        **dict.fromkeys(aliases, cache),
        "write_indices": ["batch"],
    }
    outputs = {value.name: shape(value) for value in model.graph.output}
    assert outputs == {"logits": ["batch", "sequence", VOCAB], **dict.fromkeys(aliases.values(), cache)}
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("TensorScatter") == 2 * LAYERS
    assert operators.count("Concat") == 0
    assert [entry.version for entry in model.opset_import] == [24]


def test_names_of_linears_stay() -> None:
    model = cached_model()
    before = {node.name for node in model.graph.node if node.op_type in ("MatMul", "Attention")}
    update_in_place(model, CAPACITY, "m.onnx")
    keep_logits(model)
    assert {node.name for node in model.graph.node if node.op_type in ("MatMul", "Attention")} == before


@pytest.mark.parametrize("oddity", ["", "wide keys"])
def test_caches_of_a_graph_in_16_bits_have_16_bits(oddity: str) -> None:
    """Also where the graph joins keys in float32 and casts the whole of them for attention."""
    model = cached_model(half=True, wide=True, oddity=oddity)
    aliases = update_in_place(model, CAPACITY, "m.onnx")
    check(model)
    values = [*model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    assert {types[name] for name in (*aliases, *aliases.values())} == {TensorProto.FLOAT16}
    np.testing.assert_allclose(run_in_pieces(model, aliases, 3, 8), expected_logits(IDS, MASK), atol=0.5)
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert not [node for node in casts if {*node.input, *node.output}.intersection((*aliases, *aliases.values()))]


def test_a_window_that_the_caches_do_not_fill_is_none() -> None:
    plain, wide = cached_model(), cached_model(window=CAPACITY)
    for model in (plain, wide):
        update_in_place(model, CAPACITY, "m.onnx")
    assert [node.op_type for node in plain.graph.node] == [node.op_type for node in wide.graph.node]


@pytest.mark.parametrize(
    ("oddity", "problem"),
    [
        (
            "sees the future",
            "the attention mask 'graph/Or' is neither causal nor a sliding window, at 0 past and 5 new",
        ),
        ("computed mask", "the attention mask 'graph/Or' depends on what is computed. Expected one that follows from"),
        ("no mask", "'layers.0/Attention' does not attend to a cache through a mask"),
        ("longer heads", "'layers.0/Concat' does not append positions to 'past_key_values.0.key'"),
        ("second past", "'past_key_values.1.value' is not a past whose Concat with new positions is an output"),
        ("scale by the past's size", "'graph/Size' uses the length of the past in a way of its own"),
    ],
)
def test_graphs_of_another_form(oddity: str, problem: str) -> None:
    with pytest.raises(BismoothError, match=re.escape(f"m.onnx: {problem}")) as caught:
        update_in_place(cached_model(oddity=oddity), CAPACITY, "m.onnx")
    assert "Export the model with --no-kv-cache" in str(caught.value)


def test_a_graph_without_attention_nodes() -> None:
    """As opset 20 has it."""
    model = make(
        "(float[batch, 2, past, 4] x, float[batch, 2, new, 4] y) => (float[batch, 2, total, 4] z) "
        "{ z = Concat<axis = 2>(x, y) }"
    )
    for value, name in ((model.graph.input[0], "past_key_values.0.key"), (model.graph.output[0], "present.0.key")):
        value.name = name
    model.graph.node[0].input[0], model.graph.node[0].output[0] = "past_key_values.0.key", "present.0.key"
    with pytest.raises(BismoothError, match=r"m\.onnx: it has no Attention node, as graphs of opset 23 have"):
        update_in_place(model, CAPACITY, "m.onnx")


def test_which_graphs_have_caches() -> None:
    assert has_caches(["input_ids", "past_key_values.0.key"])
    assert not has_caches(["input_ids", "attention_mask"])


def test_logits_of_chosen_positions() -> None:
    model = cached_model()
    aliases = update_in_place(model, CAPACITY, "m.onnx")
    expected = run_in_pieces(model, aliases, 3, 8)
    keep_logits(model)
    check(model)
    (head,) = (node for node in model.graph.node if node.name == "head/MatMul")
    assert head.input[0] == "graph/Add___/kept", "the other positions do not reach the head"
    np.testing.assert_array_equal(run_in_pieces(model, aliases, 3, 8), expected)
    np.testing.assert_array_equal(run_in_pieces(model, aliases, 3, 8, last=True), expected[:, [2, 7]])
    assert [shape(value) for value in model.graph.output if value.name == "logits"] == [["batch", "kept", VOCAB]]
    assert [shape(value) for value in model.graph.input if value.name == "logits_at"] == [["kept"]]


QUANTIZED_HEAD = """
    t = ReduceMax<keepdims = 1>(hidden, last)
    unit = Div(hidden, t)
    xq = QuantizeLinear(unit, one, zero)
    xd = DequantizeLinear(xq, one, zero)
    wd = DequantizeLinear(w, one, zero)
    acc = MatMul(xd, wd)
    logits = Mul(acc, t)"""
HEAD_OVER_POSITIONS = QUANTIZED_HEAD.replace("last)", "positions)")
SORTED_HEAD = """
    product = MatMul(hidden, wf)
    wide = Reshape(product, shape)
    logits = Softmax(wide)"""


@pytest.mark.parametrize(
    ("head", "place"), [(QUANTIZED_HEAD, "hidden"), (HEAD_OVER_POSITIONS, "logits"), (SORTED_HEAD, "logits")]
)
def test_heads_of_other_forms(head: str, place: str) -> None:
    """A value that the whole head follows from; behind the head where it does what is not known to go by positions."""
    rng = np.random.default_rng(0)
    model = make(
        f"(float[batch, sequence, 4] x) => (float[batch, sequence, 5] logits) {{ hidden = Softmax(x) {head} }}",
        last=np.array([-1]),
        positions=np.array([1, 2]),
        one=np.float32(1),
        zero=np.int8(0),
        shape=np.array([0, 0, 5]),
        w=rng.integers(-9, 9, (4, 5), np.int8),
        wf=rng.normal(size=(4, 5)).astype(np.float32),
    )
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    expected = session(model).run(None, {"x": x})[0]
    keep_logits(model)
    check(model)
    (gather,) = (node for node in model.graph.node if node.op_type == "Gather")
    assert place in (gather.input[0], gather.output[0])
    result = session(model).run(None, {"x": x, "logits_at": np.array([2, 0])})[0]
    np.testing.assert_array_equal(result, expected[:, [2, 0]])


@pytest.mark.parametrize("more", ["float[batch, sequence, 5] product", "float[batch, sequence, 5] other"])
def test_a_head_whose_values_are_read_elsewhere_keeps_all_positions(more: str) -> None:
    rng = np.random.default_rng(0)
    model = make(
        f"(float[batch, sequence, 4] x) => (float[batch, sequence, 5] logits, {more}) {{"
        "hidden = Softmax(x) product = MatMul(hidden, w) logits = Mul(product, two) other = Softmax(product) }",
        w=rng.normal(size=(4, 5)).astype(np.float32),
        two=np.float32(2),
    )
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    logits, others = session(model).run(None, {"x": x})
    keep_logits(model)
    check(model)
    results = session(model).run(None, {"x": x, "logits_at": np.array([2, 0])})
    np.testing.assert_array_equal(results[0], logits[:, [2, 0]])
    np.testing.assert_array_equal(results[1], others)


def test_a_head_that_is_all_there_is() -> None:
    """As in the last part of a chain, where the head's input is the graph's."""
    w = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    model = make("(float[batch, sequence, 4] x) => (float[batch, sequence, 5] logits) { logits = MatMul(x, w) }", w=w)
    x = np.ones((2, 3, 4), np.float32)
    keep_logits(model)
    check(model)
    result = session(model).run(None, {"x": x, "logits_at": np.array([2, 0])})[0]
    np.testing.assert_allclose(result, x[:, [2, 0]] @ w, rtol=1e-6)
