"""Graphs cut by data flow and run in pieces compute what they compute as a whole, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from bismooth.engines.cuts import Repeated, find_repeated, find_segments
from bismooth.engines.onnxruntime import Mode
from bismooth.engines.pieces import Piece, PieceMaker
from bismooth.engines.subgraph import load_graph
from bismooth.export.errors import BismoothError
from tests.cached_model import LAYERS, cached_model
from tests.graphs import TOKENS, Builder, DecoderShape, decoder
from tests.language_model import language_model
from tests.quantizing import quantize, recipe
from tests.streaming import divide, run_pieces, run_whole, save_narrow, streamed

SHAPE = DecoderShape(layers=3)
IDS = np.random.default_rng(0).integers(0, SHAPE.vocab, (5, 7))
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Graphs of one small decoder by name."""
    root = tmp_path_factory.mktemp("pieces")
    for name in ("float", "float16", "bfloat16"):
        (root / name).mkdir()
    paths = {
        "float": decoder(SHAPE, tied=False).save(root / "float", external=True),
        "float16": save_narrow(decoder(SHAPE), root / "float16"),
        "bfloat16": save_narrow(decoder(SHAPE, tied=False), root / "bfloat16", TensorProto.BFLOAT16),
        "int8": quantize(decoder(SHAPE, tied=False), root / "int8", recipe()).folder / "model.onnx",
    }
    return paths.__getitem__


@pytest.mark.parametrize("name", ["float", "float16", "bfloat16", "int8"])
def test_as_many_blocks_as_layers(made: Made, name: str) -> None:
    graph = load_graph(made(name)).graph
    segments = find_segments(graph)
    assert find_repeated(graph, segments) == Repeated(first=1, length=2, count=SHAPE.layers)
    assert [segment.entry for segment in segments[1:]] == [segment.exit for segment in segments[:-1]]
    assert (segments[0].entry, segments[-1].exit) == (None, None)
    numbers = [number for segment in segments for number in segment.nodes]
    assert numbers == sorted(set(numbers))


def test_a_block_begins_and_ends_with_the_residual_stream(made: Made) -> None:
    graph = load_graph(made("float")).graph
    segments = find_segments(graph)
    makers = {name: node for node in graph.node for name in node.output}
    repeated = find_repeated(graph, segments)
    assert repeated is not None
    entries = [segments[start].entry for start in repeated.starts]
    assert [makers[entry or ""].op_type for entry in entries] == ["Gather", "Add", "Add", "Add"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("float", "plain"),
        ("float16", "plain"),
        ("bfloat16", "plain"),
        ("int8", "plain"),
        ("int8", "reference"),
        ("int8", "int8"),
    ],
)
def test_segments_one_by_one_are_the_whole(made: Made, tmp_path: Path, name: str, mode: Mode) -> None:
    path = made(name)
    run = streamed(path, IDS, mode)
    one = run_pieces(run, run.plan(None), tmp_path)
    assert len(run.plan(None)) == 1
    assert (run_pieces(run, divide(run.stop, *range(run.stop)), tmp_path) == one).all()
    np.testing.assert_allclose(one, run_whole(path, IDS, mode), rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ends=st.sets(st.integers(1, 8)), name=st.sampled_from(["float16", "int8"]))
def test_any_pieces_are_the_whole(made: Made, tmp_path: Path, ends: set[int], name: str) -> None:
    mode: Mode = "int8" if name == "int8" else "plain"
    run = streamed(made(name), IDS, mode)
    whole = run_pieces(run, divide(run.stop), tmp_path)
    assert (run_pieces(run, divide(run.stop, *ends), tmp_path) == whole).all()


def test_a_model_with_caches(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx.shape_inference.infer_shapes(cached_model()).SerializeToString())
    graph = load_graph(tmp_path / "model.onnx").graph
    repeated = find_repeated(graph, find_segments(graph))
    assert repeated is not None
    assert repeated.count == LAYERS
    run = streamed(tmp_path / "model.onnx", IDS % 13)
    pieces = divide(run.stop, *range(run.stop))
    assert (run_pieces(run, pieces, tmp_path) == run_pieces(run, divide(run.stop), tmp_path)).all()


def test_layers_side_by_side_are_one_cut_each(tmp_path: Path) -> None:
    """Attention and feed-forward part read the same norm, as in GPT-NeoX and Falcon."""
    b = Builder(unknown="sequence")
    x = b.op("Gather", b.matrix("embed", 16, 8), b.input("input_ids", *TOKENS, dtype=TensorProto.INT64), axis=0)
    for layer in range(4):
        norm = b.layer_norm(x, f"{layer}.norm", 8)
        left, right = (b.op("Relu", b.linear(norm, f"{layer}.{name}", 8, 8)) for name in ("a", "b"))
        x = b.op("Add", b.op("Add", left, right), x)
    b.outputs.append(b.linear(x, "head", 16, 8))
    graph = load_graph(b.save(tmp_path)).graph
    assert find_repeated(graph, find_segments(graph)) == Repeated(first=1, length=1, count=4)


def test_a_branch_that_ends_in_an_output_is_no_cut(tmp_path: Path) -> None:
    """Behind such a head the same value is still to be read: the file that carries it must not be begun anew."""
    b = Builder(unknown="sequence")
    x = b.op("Gather", b.matrix("embed", 16, 8), b.input("input_ids", *TOKENS, dtype=TensorProto.INT64), axis=0)
    early: list[str] = []
    for layer in range(3):
        x = b.op("Add", b.op("Relu", b.linear(x, f"{layer}", 8, 8)), x)
        early.append(b.linear(x, f"{layer}.head", 16, 8))
    b.outputs += [b.linear(x, "head", 16, 8), *early]
    path = b.save(tmp_path)
    segments = find_segments(load_graph(path).graph)
    assert len(segments) > 3
    assert all(segment.entry != segment.exit for segment in segments)
    run = streamed(path, IDS % 16)
    pieces = divide(run.stop, *range(run.stop))
    assert (run_pieces(run, pieces, tmp_path) == run_pieces(run, divide(run.stop), tmp_path)).all()


@pytest.mark.parametrize(("fixed", "batch_size", "batches"), [(1, 4, 5), (2, 4, 3), (2, 1, 5)])
def test_batches_have_the_size_that_the_graph_takes(tmp_path: Path, fixed: int, batch_size: int, batches: int) -> None:
    b = Builder()
    x = b.op("Gather", b.matrix("embed", 16, 8), b.input("input_ids", fixed, "", dtype=TensorProto.INT64), axis=0)
    b.outputs.append(b.linear(b.op("Relu", x), "head", 16, 8))
    run = streamed(b.save(tmp_path), IDS % 16, batch_size=batch_size)
    assert len(run.batches) == batches
    assert "" not in run.sizes


def test_a_stream_that_every_layer_reads_cannot_be_cut(tmp_path: Path) -> None:
    b = Builder(unknown="sequence")
    first = x = b.op("Gather", b.matrix("embed", 16, 8), b.input("input_ids", *TOKENS, dtype=TensorProto.INT64), axis=0)
    for layer in range(3):
        x = b.op("Add", b.op("Mul", b.linear(x, f"{layer}", 8, 8), first), x)
    b.outputs.append(b.linear(b.op("Add", x, first), "head", 16, 8))
    graph = load_graph(b.save(tmp_path)).graph
    segments = find_segments(graph)
    assert [segment.exit for segment in segments][1:] == [b.nodes[-3].output[0], None]
    assert find_repeated(graph, segments) is None


def test_without_shapes_there_is_one_segment(tmp_path: Path) -> None:
    graph = load_graph(language_model(tmp_path)).graph
    (segment,) = find_segments(graph)
    assert (segment.entry, segment.exit) == (None, None)
    assert find_repeated(graph, [segment]) is None


def test_a_graph_that_no_token_enters_is_one_segment(tmp_path: Path) -> None:
    b = Builder()
    b.outputs.append(b.linear(b.tokens("x", 8), "fc", 8, 8))
    (segment,) = find_segments(load_graph(b.save(tmp_path)).graph)
    assert segment.entry is segment.exit is None


def test_static_sizes_are_one_segment(tmp_path: Path) -> None:
    b = Builder()
    x = b.op("Gather", b.matrix("embed", 16, 8), b.input("input_ids", 1, 4, dtype=TensorProto.INT64), axis=0)
    b.outputs.append(b.linear(b.op("Relu", x), "head", 16, 8))
    assert len(find_segments(load_graph(b.save(tmp_path)).graph)) == 1


def test_a_piece_has_its_own_weights_alone(made: Made) -> None:
    maker = PieceMaker(load_graph(made("float")))
    first = maker.segments[1].entry
    model = maker.make(Piece(1, 3), [maker.segments[2].exit or ""])
    weights = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith("weight")}
    assert weights
    assert all(name.startswith("model.layers.0.") for name in weights)
    assert first in [value.name for value in model.graph.input]
    assert len(model.graph.node) < len(maker.model.graph.node) / 2


def test_values_by_segment(made: Made) -> None:
    maker = PieceMaker(load_graph(made("float")))
    values = [maker.segments[2].exit or "", maker.segments[0].exit or "", "attention_mask"]
    assert maker.by_segment([*values, values[0]]) == {2: values[:1], 0: values[1:2], 1: values[2:]}
    with pytest.raises(BismoothError, match=r"value nowhere: not in the graph"):
        maker.by_segment(["nowhere"])


def test_functions_of_a_model_go_with_its_pieces(tmp_path: Path) -> None:
    model = load_graph(decoder(SHAPE).save(tmp_path))
    function = helper.make_function(
        "own", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 23)]
    )
    model.functions.append(function)
    made = PieceMaker(model).make(Piece(0, 1), [])
    assert [item.name for item in made.functions] == ["Twice"]
