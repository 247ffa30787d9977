"""Attention with caches that have room: what it computes, with a past and without, and what it is not made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from bismooth.engines.onnxruntime import InMemoryGraph, Session
from bismooth.passes._gs import export_model, shape_of
from bismooth.passes.cache_in_place import CAPACITY, UpdateCachesInPlace
from bismooth.passes.fuse_rotary import FuseRotary
from bismooth.passes.graph import Index
from bismooth.tools.decoding import CachedRun, stepwise
from tests.cached_model import LAYERS, VOCAB, cached_model, expected_logits
from tests.lowered import Array, assert_close, graph_of, run_text
from tests.models import exported
from tests.textgraphs import open_graph, ops

IDS = np.random.default_rng(0).integers(0, VOCAB, (2, 9))
PADDED = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
FUSED = "GroupQueryAttention"


def lowered(model: onnx.ModelProto, folder: Path) -> tuple[int, onnx.ModelProto]:
    graph = open_graph(model, folder)
    count = UpdateCachesInPlace().apply(graph)
    return count, export_model(graph)


@pytest.mark.parametrize("window", [None, 3])
def test_a_window_without_a_past(tmp_path: Path, window: int | None) -> None:
    count, model = lowered(cached_model(window=window), tmp_path)
    assert count == LAYERS
    assert [node.op_type for node in model.graph.node].count(FUSED) == LAYERS
    assert not {"Attention", "Transpose"} & {node.op_type for node in model.graph.node}, "heads are split inside"
    with Session(InMemoryGraph("cached", model.SerializeToString(), tmp_path)) as session:
        positions = np.maximum(np.cumsum(PADDED, 1) - 1, 0)
        feeds = session.token_feeds(IDS, {"attention_mask": PADDED, "position_ids": positions})
        logits = session.run(feeds)["logits"]
    assert_close(logits, expected_logits(IDS, PADDED, window), 1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_token_by_token_with_caches_that_grow(tmp_path: Path, window: int | None) -> None:
    _, model = lowered(cached_model(window=window), tmp_path)
    with Session(InMemoryGraph("cached", model.SerializeToString(), tmp_path)) as session:
        logits = stepwise(CachedRun(session, session.outputs[0].name), IDS[:1], 4, lambda step: None)[0]
    assert_close(logits, expected_logits(IDS[:1], None, window)[0], 1e-5)


def test_room_behind_the_past_is_neither_read_nor_moved(tmp_path: Path) -> None:
    """One buffer as input and as output, full of NaN but for the past."""
    _, model = lowered(cached_model(), tmp_path)
    with Session(InMemoryGraph("cached", model.SerializeToString(), tmp_path)) as session:
        first = session.run(session.token_feeds(IDS[:, :6]))
        binding, buffers = session.bind(), dict[str, Array]()
        for name, value in first.items():
            if name.startswith("present."):
                past = name.replace("present", "past_key_values")
                buffer = buffers[past] = np.full((2, value.shape[1], 12, value.shape[3]), np.nan, np.float32)
                buffer[:, :, :6] = value
                place = "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data
                binding.bind_input(past, *place)
                binding.bind_output(name, *place)
        logits = np.empty((2, 1, VOCAB), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        feeds = {"input_ids": IDS[:, 6:7].copy(), "attention_mask": np.ones((2, 7), np.int64)}
        session.run_bound(binding, feeds | {"position_ids": np.full((2, 1), 6)})
    assert_close(logits[:, 0], expected_logits(IDS)[:, 6], 1e-5)
    for name, buffer in buffers.items():
        assert np.isfinite(buffer[:, :, :7]).all()
        assert np.isnan(buffer[:, :, 7:]).all()
        np.testing.assert_array_equal(buffer[:, :, :6], first[name.replace("past_key_values", "present")])


def test_input_and_output_have_one_axis_of_positions(tmp_path: Path) -> None:
    graph = open_graph(cached_model(), tmp_path)
    UpdateCachesInPlace().apply(graph)
    names = Index.of(graph).values
    shapes = [shape_of(names[f"{prefix}.1.value"]) for prefix in ("past_key_values", "present")]
    assert shapes == [("batch", 2, CAPACITY, 16)] * 2
    assert [tensor.name for tensor in graph.outputs][:2] == ["logits", "present.0.key"]


@pytest.mark.parametrize(
    "oddity", ["sees the future", "no mask", "scale by the past's size", "longer heads", "second past"]
)
def test_what_stays(tmp_path: Path, oddity: str) -> None:
    graph = open_graph(cached_model(oddity=oddity), tmp_path)
    before = ops(graph)
    assert UpdateCachesInPlace().apply(graph) == 0
    assert ops(graph) == before


def test_sixteen_bits_stay(tmp_path: Path) -> None:
    assert lowered(cached_model(half=True), tmp_path)[0] == 0


def no_second_layer(model: onnx.ModelProto) -> None:
    """Its Attention gets a further input: the sizes of unpadded rows."""
    node = [node for node in model.graph.node if node.op_type == "Attention"][1]
    node.input.extend(["", ""])


def two_readers(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["present.0.key"], ["copy"], name="copy"))
    model.graph.output.append(helper.make_empty_tensor_value_info("copy"))


def other_mask(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        value.name = value.name.replace("attention_mask", "mask")
    for node in model.graph.node:
        node.input[:] = [name.replace("attention_mask", "mask") for name in node.input]


@pytest.mark.parametrize("edit", [no_second_layer, two_readers, other_mask])
def test_one_cache_of_another_kind_keeps_all_as_they_are(tmp_path: Path, edit: Any) -> None:
    model = cached_model()
    edit(model)
    assert lowered(model, tmp_path)[0] == 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"])
def test_models(name: str) -> None:
    """After the rotary embeddings, which are moved to where heads are not split."""
    layers = exported(name).module.config.num_hidden_layers
    expected, graph = run_text(graph_of(name), name), graph_of(name)
    rotary = FuseRotary().apply(graph)
    assert UpdateCachesInPlace().apply(graph) == layers
    assert ops(graph).count(FUSED) == layers
    assert ops(graph).count("RotaryEmbedding") == rotary
    if name in ("llama", "gemma2", "qwen3"):
        assert ops(graph).count("Transpose") == 1 + 7 * layers, "those of weights"
    for output, value in run_text(graph, name).items():
        assert_close(value, expected[output], 2e-6)
