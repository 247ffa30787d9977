"""The memory of a run is told from its graph: never less than it takes, and not much more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from bismooth.engines.footprint import MARGIN, SLACK, footprint, resolve, tensor_bytes
from bismooth.engines.onnxruntime import Mode
from tests.graphs import TOKENS, Builder, DecoderShape, decoder
from tests.quantizing import quantize, recipe
from tests.streaming import save_narrow

ROOT = Path(__file__).parents[2]
LARGE = DecoderShape(layers=4, hidden=768, heads=12, kv_heads=4, head_size=64, ffn=3072, vocab=16000)
MEGA = 10**6


def graph(body: str, inputs: str = "float[n, 1000] x", output: str = "float[n, 1000] y") -> onnx.ModelProto:
    text = f'<ir_version: 10, opset_import: ["" : 23]> g ({inputs}) => ({output}) {{ {body} }}'
    return onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))


def external(name: str, kind: int, *dims: int) -> TensorProto:
    return TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)


def values(model: onnx.ModelProto, mode: Mode = "plain", **sizes: int) -> float:
    """Bytes of values, in the unit of one [n, 1000] with n = 1000."""
    return (footprint(model, {"n": 1000, **sizes}, mode) - MARGIN) / (1 + SLACK) / (4 * MEGA)


def test_what_lives_at_one_time() -> None:
    assert values(graph("y = Relu(x)")) == pytest.approx(2)
    assert values(graph("a = Relu(x) y = Relu(a)")) == pytest.approx(3)
    assert values(graph("a = Relu(x) b = Relu(a) c = Relu(b) y = Relu(c)")) == pytest.approx(3)
    assert values(graph("a = Relu(x) b = Relu(a) c = Relu(b) y = Add(c, a)")) == pytest.approx(4)


def test_views_take_nothing() -> None:
    assert values(graph("a = Relu(x) b = Identity(a) c = Identity(b) y = Relu(c)")) == pytest.approx(3)


def test_other_types() -> None:
    assert values(graph("a = Cast<to = 10>(x) y = Cast<to = 1>(a)")) == pytest.approx(2.5)
    assert values(graph("a = Cast<to = 10>(x) b = Relu(a) y = Cast<to = 1>(b)")) == pytest.approx(2.5)


def test_values_without_shapes_are_as_large_as_what_they_are_made_of() -> None:
    model = graph("a = Cast<to = 10>(x) b = Identity(a) c = Cast<to = 1>(b) y = Relu(c)")
    del model.graph.value_info[:]
    assert values(model) == pytest.approx(3 + 0.5, abs=0.51)  # nothing says that a is half as large


def test_a_table_counts_by_the_rows_that_are_looked_up() -> None:
    model = graph("y = Gather<axis = 0>(table, ids)", "int64[n] ids", "float[n, 1000] y")
    model.graph.initializer.append(external("table", TensorProto.FLOAT16, 10**6, 1000))
    assert footprint(model, {"n": 10}, "plain") < MARGIN + 15 * MEGA
    assert footprint(model, {"n": 10**8}, "plain") > 2000 * MEGA
    assert footprint(model, {"n": 10}, "plain", rows=50) == footprint(model, {"n": 10}, "plain") + 40 * (
        2000 + (1 << 20)
    )
    model.graph.node[0].attribute[0].i = 1
    assert footprint(model, {"n": 10}, "plain") > 2000 * MEGA


def test_weights_in_the_graph_itself_are_there_three_times() -> None:
    model = graph("y = Add(x, w)")
    model.graph.initializer.append(external("w", TensorProto.FLOAT, 1000, 1000))
    mapped = footprint(model, {"n": 1000}, "plain")
    model.graph.initializer[0].data_location = TensorProto.DEFAULT
    assert footprint(model, {"n": 1000}, "plain") == mapped + 2 * 4 * MEGA


def test_products_of_integers_need_no_float_operands() -> None:
    dequantized = "d = DequantizeLinear(w, s) q = QuantizeLinear(x, s) a = DequantizeLinear(q, s) y = MatMul(a, d)"
    model = graph(dequantized)
    for name, kind, dims in (("w", TensorProto.INT8, [1000, 1000]), ("s", TensorProto.FLOAT, [])):
        model.graph.initializer.append(external(name, kind, *dims))
    assert footprint(model, {"n": 1000}, "reference") - footprint(model, {"n": 1000}, "int8") > 4 * MEGA


def test_scores_of_attention_count() -> None:
    model = graph("y = Attention(q, q, q)", "float[b, 8, s, 64] q", "float[b, 8, s, 64] y")
    scores = 2 * 4 * 8 * 1000 * 1000
    assert footprint(model, {"b": 1, "s": 1000, "total": 1000}, "plain") > MARGIN + scores


def test_sizes_may_be_sums_and_products() -> None:
    shape = helper.make_tensor_type_proto(1, ["batch", "past + sequence", "2*batch*sequence", 7]).tensor_type.shape
    assert resolve(shape, {"batch": 2, "past": 0, "sequence": 5}) == (2, 5, 20, 7)
    assert resolve(shape, {"batch": 2, "past": 0}) is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(TensorProto.FLOAT, 84), (TensorProto.BFLOAT16, 42), (TensorProto.INT8, 21), (TensorProto.INT4, 11)],
)
def test_bytes_of_what_is_stored(kind: int, expected: int) -> None:
    assert tensor_bytes(TensorProto(name="w", data_type=kind, dims=[3, 7])) == expected


# --- measured -------------------------------------------------------------------------------------------------------


def encoder() -> Builder:
    """Post-norm blocks with decomposed attention, as BERT's."""
    b = Builder(unknown="sequence")
    hidden, heads = 512, 8
    x = b.op("Gather", b.matrix("embed", 8000, hidden), b.input("input_ids", *TOKENS, dtype=TensorProto.INT64), axis=0)
    for layer in range(3):
        q, k, v = (b.heads(b.linear(x, f"{layer}.{n}", hidden, hidden, bias=True), heads, 64) for n in "qkv")
        scores = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
        x = b.layer_norm(b.op("Add", b.merged(b.op("MatMul", scores, v), hidden), x), f"{layer}.a", hidden)
        up = b.op("Gelu", b.linear(x, f"{layer}.up", 4 * hidden, hidden, bias=True))
        x = b.layer_norm(b.op("Add", b.linear(up, f"{layer}.down", hidden, 4 * hidden), x), f"{layer}.b", hidden)
    b.outputs.append(x)
    return b


def experts() -> Builder:
    """Each layer has stacked weights [experts, K, N], all of which run."""
    b = Builder(unknown="sequence")
    hidden, inner, count = 256, 1024, 8
    x = b.op("Gather", b.matrix("embed", 8000, hidden), b.input("input_ids", *TOKENS, dtype=TensorProto.INT64), axis=0)
    for layer in range(3):
        up, down = b.matrix(f"{layer}.up", count, hidden, inner), b.matrix(f"{layer}.down", count, inner, hidden)
        parts = b.op("MatMul", b.op("Relu", b.op("MatMul", b.op("Unsqueeze", x, b.ints(1)), up)), down)
        x = b.op("Add", b.op("ReduceSum", parts, b.ints(1), keepdims=0), x)
    b.outputs.append(b.linear(x, "head", 8000, hidden))
    return b


def table() -> Builder:
    """A table of 200 MB in 16 bits, of which a run looks up a few rows."""
    b = Builder(unknown="sequence")
    ids = b.input("input_ids", *TOKENS, dtype=TensorProto.INT64)
    x = b.op("Gather", b.matrix("embed", 50000, 2000), ids, axis=0)
    b.outputs.append(b.linear(b.op("Relu", b.op("Add", x, x)), "head", 8, 2000))
    return b


def wide() -> Builder:
    """Layers whose weights are much larger than the values: what a weight's float32 copy had is free for the next."""
    b = Builder(unknown="sequence")
    hidden, inner = 1024, 40_000
    x = b.op("Gather", b.matrix("embed", inner, hidden), b.input("input_ids", *TOKENS, dtype=TensorProto.INT64), axis=0)
    for layer in range(2):
        up = b.op("Relu", b.linear(x, f"{layer}.up", inner, hidden))
        x = b.op("Add", b.linear(up, f"{layer}.down", hidden, inner), x)
    b.outputs.append(x)
    return b


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Graphs whose weights and values are larger than the margin, each made once."""
    root = tmp_path_factory.mktemp("footprint")

    def make(name: str) -> Path:
        folder = root / name
        int8 = {"int8": lambda: decoder(LARGE, tied=False), "wide": wide}
        path = folder / "quantized/model.onnx" if name in int8 else folder / "model.onnx"
        if not folder.exists() and name in int8:
            quantize(int8[name](), folder, recipe())
        elif not folder.exists():
            folder.mkdir()
            builders = {"encoder": encoder, "experts": experts, "table": table}
            save_narrow(builders[name]() if name in builders else decoder(LARGE), folder)
        return path

    return make


@pytest.mark.parametrize(
    ("name", "mode", "windows", "length", "part", "options"),
    [
        ("decoder", "plain", 1, 256, (0, 0), ""),
        ("decoder", "plain", 8, 256, (0, 0), ""),
        ("decoder", "plain", 8, 256, (1, 5), "taps"),
        ("decoder", "plain", 2, 1024, (1, 2), ""),
        ("encoder", "plain", 8, 256, (0, 0), ""),
        ("encoder", "plain", 2, 1024, (0, 0), "taps"),
        ("experts", "plain", 4, 256, (0, 0), ""),
        ("table", "plain", 32, 8, (0, 0), "batches"),
        ("wide", "reference", 1, 16, (0, 0), ""),
        ("int8", "int8", 8, 256, (0, 0), ""),
        ("int8", "int8", 8, 256, (1, 5), "taps"),
        ("int8", "reference", 8, 256, (0, 0), ""),
    ],
)
def test_told_and_measured(
    made: Callable[[str], Path], name: str, mode: Mode, windows: int, length: int, part: tuple[int, int], options: str
) -> None:
    arguments = [str(made(name)), mode, *map(str, (windows, length, *part)), *options.split()]
    command = [sys.executable, "-m", "tests.measured", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["taken"] <= found["need"] <= MARGIN + 1.7 * found["taken"]
