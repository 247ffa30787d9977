"""The parts of a chain: which blocks they hold, what goes from one to the next, which caches they read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bismooth.engines.chain import Carried
from bismooth.engines.chain_cut import ChainCutter, cut_at, split_evenly
from bismooth.engines.cuts import find_segments
from bismooth.engines.subgraph import load_graph
from bismooth.export.errors import BismoothError
from tests.cached_model import HIDDEN
from tests.cuttable import cuttable
from tests.models import exported
from tests.quantized import make


def names(values: Iterable[onnx.ValueInfoProto]) -> list[str]:
    return [value.name for value in values]


@pytest.mark.parametrize(
    ("blocks", "count", "ranges"),
    [(3, 1, [(0, 3)]), (5, 2, [(0, 3), (3, 5)]), (7, 3, [(0, 3), (3, 5), (5, 7)]), (2, 2, [(0, 1), (1, 2)])],
)
def test_ranges_differ_by_one_block_at_most(blocks: int, count: int, ranges: list[tuple[int, int]]) -> None:
    assert split_evenly(blocks, count) == ranges


def test_parts_and_what_goes_between_them() -> None:
    model = cuttable(half=True, wide=True)
    parts = ChainCutter(model, "model.onnx").cut(2)
    assert [(part.name, part.holds, part.blocks) for part in parts] == [
        ("part-00", "embedding", None),
        ("part-01", "blocks", (0, 1)),
        ("part-02", "blocks", (1, 2)),
        ("part-03", "head", None),
    ]
    assert [part.reads for part in parts] == [None, *(part.gives for part in parts[:-1])]
    assert parts[-1].gives is None
    assert parts[0].gives == Carried("graph/Add", "float16", ("batch", "sequence", HIDDEN))
    nodes = [node.name for part in parts for node in part.model.graph.node if "layers" in node.name]
    assert sorted(nodes) == sorted(node.name for node in model.graph.node if "layers" in node.name)
    assert sum(len(part.model.graph.initializer) for part in parts) >= len(model.graph.initializer)


def test_blocks_of_the_float_graph_that_more_than_one_value_crosses() -> None:
    plain, model = cuttable(), cuttable()
    logits, embedded = model.graph.output[0], find_segments(model.graph)[0].exit
    assert embedded is not None
    table = numpy_helper.from_array(np.ones((HIDDEN, logits.type.tensor_type.shape.dim[-1].dim_value), np.float32), "t")
    (last,) = (node for node in model.graph.node if logits.name in node.output)
    last.output[:] = ["before"]
    model.graph.initializer.append(table)
    model.graph.node.append(helper.make_node("MatMul", [embedded, "t"], ["skipped"], "skip/MatMul"))
    model.graph.node.append(helper.make_node("Add", ["before", "skipped"], [logits.name], "skip/Add"))
    message = r"m\.onnx: cannot be cut at '.*', where a block of the float graph begins or ends: more than this value"
    with pytest.raises(BismoothError, match=message):
        ChainCutter(model, "m.onnx", plain)


def test_each_part_reads_its_own_caches() -> None:
    parts = ChainCutter(cuttable(), "model.onnx").cut(2)
    for number in range(2):
        graph = parts[1 + number].model.graph
        caches = {f"past_key_values.{number}.key", f"past_key_values.{number}.value"}
        assert {name for name in names(graph.input) if name.startswith("past")} == caches
        assert names(graph.output)[1:] == [f"present.{number}.key", f"present.{number}.value"]
        assert "input_ids" in names(graph.input)
        cast(Any, onnx.checker).check_model(parts[1 + number].model, full_check=True)


def test_new_tokens_are_counted_by_their_ids_where_nothing_else_reads_them() -> None:
    """What updates caches in place reads their number there."""
    model = cuttable()
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] == "input_ids":
            node.input[0] = "position_ids"
    graph = ChainCutter(model, "model.onnx").cut(1)[1].model.graph
    assert {"input_ids", "position_ids"} <= set(names(graph.input))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "gpt_neox", "bert"])
def test_blocks_of_architectures(name: str) -> None:
    made = exported(name)
    cutter = ChainCutter(load_graph(made.graph), name)
    assert made.manifest.blocks is not None
    assert cutter.blocks == len(made.manifest.blocks.kinds)
    parts = cutter.cut(2)
    assert [part.holds for part in parts] == ["embedding", "blocks", "blocks", "head"]


def test_blocks_are_those_of_the_float_graph() -> None:
    """Where quantization has made a block unlike the others."""
    plain, model = cuttable(), cuttable()
    odd = next(node for node in model.graph.node if node.name == "layers.0.o/MatMul")
    place = list(model.graph.node).index(odd)
    model.graph.node.insert(place + 1, helper.make_node("Abs", [odd.output[0]], ["odd"], "odd"))
    follower = next(node for node in model.graph.node if odd.output[0] in node.input and node.name != "odd")
    follower.input[list(follower.input).index(odd.output[0])] = "odd"
    with pytest.raises(BismoothError, match="has no repeated blocks"):
        ChainCutter(model, "model.onnx")
    assert ChainCutter(model, "model.onnx", plain).blocks == 2


def test_more_parts_than_blocks() -> None:
    with pytest.raises(BismoothError, match=r"--split-blocks 3: model\.onnx has 2 blocks\. Expected 1 to 2\."):
        ChainCutter(cuttable(), "model.onnx").cut(3)


def test_a_model_without_blocks() -> None:
    model = make("(float[batch, 8] x) => (float[batch, 8] y) { y = Relu(x) }")
    with pytest.raises(BismoothError, match=r"m\.onnx: has no repeated blocks, .* Build it without --split-blocks"):
        ChainCutter(model, "m.onnx")


def test_a_block_that_attends_to_the_cache_of_another() -> None:
    model = cuttable()
    shape = next(node for node in model.graph.node if node.op_type == "Shape" and node.input[0].startswith("past"))
    del shape.attribute[:]
    with pytest.raises(BismoothError, match=r"reads 'past_key_values\.0\.key', the cache of another block"):
        ChainCutter(model, "model.onnx").cut(2)


def test_cuts_that_a_graph_does_not_have() -> None:
    assert len(cut_at(cuttable(), "model.onnx", ["graph/Add", "graph/Add__"])) == 3
    with pytest.raises(BismoothError, match=r"cannot be cut at 'elsewhere', as the chain is"):
        cut_at(cuttable(), "model.onnx", ["graph/Add", "elsewhere"])
