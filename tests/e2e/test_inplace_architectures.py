"""Caches in place, of every architecture: the logits of prompts in pieces and of single tokens are those of whole texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from bismooth.engines.inplace_caches import update_in_place
from bismooth.engines.kept_logits import keep_logits
from bismooth.engines.subgraph import load_graph
from tests.models import ARCHITECTURES, Exported, exported, feeds_of, positions, tokens

CAPACITY, LENGTH = 24, 18
FEEDS = tokens(3, LENGTH, {0: (6, 0), 2: (1, 0)})


def session(file: str) -> Any:
    runtime: Any = onnxruntime
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns of every cache that it copies
    return runtime.InferenceSession(file, options)


def decode(model: Exported, *bounds: int) -> NDArray[np.float32]:
    """Logits of the last position of each piece; ``bounds`` are the ends of the pieces."""
    graph = load_graph(model.graph)
    aliases = update_in_place(graph, CAPACITY, str(model.graph))
    keep_logits(graph)
    file = model.folder / "in_place.onnx"  # beside the weights
    file.write_bytes(graph.SerializeToString())
    program = session(str(file))
    inputs = {port.name: port.shape for port in program.get_inputs()}
    caches = {name: np.zeros((3, *inputs[name][1:]), np.float32) for name in aliases}
    real = np.ones((3, CAPACITY), np.int64)
    real[:, :LENGTH] = FEEDS["attention_mask"]
    numbers = positions(FEEDS["attention_mask"])
    logits: list[NDArray[np.float32]] = []
    for start, end in zip((0, *bounds[:-1]), bounds, strict=True):
        feeds = {
            "input_ids": FEEDS["input_ids"][:, start:end],
            "position_ids": numbers[:, start:end],
            "attention_mask": real,
            "write_indices": np.full(3, start),
            "logits_at": np.array([end - start - 1]),
            **caches,
        }
        results = program.run(None, {name: value for name, value in feeds.items() if name in inputs})
        named = dict(zip([port.name for port in program.get_outputs()], results, strict=True))
        logits.append(named["logits"])
        caches = {name: named[output] for name, output in aliases.items()}
    file.unlink()
    return np.concatenate(logits, 1)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bert"])
def test_logits_are_those_of_whole_texts(name: str) -> None:
    model = exported(name)
    whole = session(str(model.graph))
    expected = whole.run(["logits"], feeds_of(whole, FEEDS))[0]
    for bounds in ((LENGTH,), (7, 8, 9, 10, 17, LENGTH)):
        got = decode(model, *bounds)
        wanted = expected[:, [end - 1 for end in bounds]]
        real = FEEDS["attention_mask"][:, [end - 1 for end in bounds]] == 1
        np.testing.assert_allclose(got[real], wanted[real], atol=2e-4 * np.abs(expected).max())


def test_the_types_of_caches_are_those_of_the_graph() -> None:
    graph = load_graph(exported("llama").graph)
    aliases = update_in_place(graph, CAPACITY, "llama")
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)}
    assert {types[name] for pair in aliases.items() for name in pair} == {TensorProto.FLOAT}
