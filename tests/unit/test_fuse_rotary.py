"""Rotary embeddings as one operator: the same numbers, and what is no rotary embedding of this kind."""

from pathlib import Path

import numpy as np
import pytest

from bismooth.passes.fuse_rotary import FuseRotary
from tests.lowered import assert_close, graph_of, run_text
from tests.models import exported
from tests.textgraphs import Array, check, make, open_graph, ops, run

RNG = np.random.default_rng(0)
ROTATION = """(float[batch, 2, sequence, 8] x, float[batch, sequence, 4] f, float[batch, sequence, 4] g)
    => (float[batch, 2, sequence, 8] y) {
    angles = Concat<axis = -1>(f, f)
    cos = Cos(angles)
    sin = Sin(angles)
    cosines = Unsqueeze(cos, heads)
    sines = Unsqueeze(sin, heads)
    first = Slice(x, begin, middle, last)
    second = Slice(x, middle, end, last)
    negative = Neg(second)
    turned = Concat<axis = -1>(negative, first)
    a = Mul(x, cosines)
    b = Mul(turned, sines)
    y = Add(a, b)
}"""
SCALED = """cosine = Cos(angles)
    cos = Mul(cosine, scale)"""
BOUNDS = {name: np.array([value]) for name, value in {"heads": 1, "begin": 0, "middle": 4, "end": 8, "last": 3}.items()}
SCALE = {"scale": np.array(1.25, np.float32)}


def values(batch: int = 2, sequence: int = 5) -> dict[str, Array]:
    shapes = {"x": (batch, 2, sequence, 8), "f": (batch, sequence, 4), "g": (batch, sequence, 4)}
    return {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("y = Add(a, b)", "y = Add(b, a)"),
        ("b = Mul(turned, sines)", "b = Mul(sines, turned)"),
        ("a = Mul(x, cosines)", "a = Mul(cosines, x)"),
        ("cos = Cos(angles)", SCALED),
    ],
)
def test_a_rotation_is_fused(tmp_path: Path, old: str, new: str) -> None:
    model = make(ROTATION.replace(old, new), **BOUNDS, **SCALE)
    graph = open_graph(model, tmp_path)
    assert FuseRotary().apply(graph) == 1
    assert ops(graph)[-1] == "RotaryEmbedding"
    assert {"Neg", "Add"}.isdisjoint(ops(graph))
    feeds = values()
    assert_close(run(check(graph), feeds)[0], run(model, feeds)[0])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("angles = Concat<axis = -1>(f, f)", "angles = Concat<axis = -1>(f, g)"),
        ("turned = Concat<axis = -1>(negative, first)", "turned = Concat<axis = -1>(first, negative)"),
        ("y = Add(a, b)", "y = Sub(a, b)"),
        ("negative = Neg(second)", "negative = Abs(second)"),
        ("sin = Sin(angles)", "sin = Cos(angles)"),
        ("first = Slice(x, begin, middle, last)", "first = Slice(x, middle, end, last)"),
        ("second = Slice(x, middle, end, last)", "second = Slice(x, begin, middle, last)"),
        ("a = Mul(x, cosines)", "a = Mul(turned, cosines)"),
    ],
)
def test_what_is_no_rotation_stays(tmp_path: Path, old: str, new: str) -> None:
    graph = open_graph(make(ROTATION.replace(old, new), **BOUNDS), tmp_path)
    before = ops(graph)
    assert FuseRotary().apply(graph) == 0
    assert ops(graph) == before


def test_tables_for_one_row_stay(tmp_path: Path) -> None:
    """Their batch is not that of x, which the operator would refuse."""
    text = ROTATION.replace("float[batch, sequence, 4] f", "float[1, sequence, 4] f")
    assert FuseRotary().apply(open_graph(make(text, **BOUNDS), tmp_path)) == 0


def test_an_older_opset_stays(tmp_path: Path) -> None:
    assert FuseRotary().apply(open_graph(make(ROTATION, 20, **BOUNDS), tmp_path)) == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_models(name: str) -> None:
    """Two per layer, whose tables are halved once for all that read them; gpt_neox rotates a part of each head."""
    layers = exported(name).module.config.num_hidden_layers
    expected = run_text(graph_of(name), name)
    graph = graph_of(name)
    assert FuseRotary().apply(graph) == 2 * layers
    halved = [node for node in graph.nodes if node.name.endswith("/half")]
    assert len(halved) == (4 if name == "gemma3" else 2)
    for output, value in run_text(graph, name).items():
        assert_close(value, expected[output], 2e-6)


def test_a_model_without_rotary_embeddings() -> None:
    assert FuseRotary().apply(graph_of("gpt2")) == 0
