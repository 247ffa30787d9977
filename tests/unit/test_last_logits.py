"""Logits of the last position: the same numbers, and heads that are computed otherwise."""

from pathlib import Path

import numpy as np
import pytest

from bismooth.passes._gs import shape_of
from bismooth.passes.last_logits import LastLogits
from tests.lowered import assert_close, graph_of, run, run_text
from tests.models import exported
from tests.textgraphs import make, open_graph

RNG = np.random.default_rng(0)
HEAD = """(float[batch, sequence, 8] x) => (float[batch, sequence, 6] logits) {
    hidden = Tanh(x)
    sum = Add(hidden, x)
    normed = RMSNormalization(sum, gamma)
    product = MatMul(normed, w)
    logits = Add(product, bias)
}"""
CONSTANTS = {
    name: RNG.standard_normal(shape).astype(np.float32) for name, shape in {"gamma": 8, "w": (8, 6), "bias": 6}.items()
}
X = RNG.standard_normal((2, 5, 8)).astype(np.float32)


def test_the_norm_and_all_behind_it_see_the_last_position(tmp_path: Path) -> None:
    model = make(HEAD, **CONSTANTS)
    graph, same = (open_graph(model, tmp_path) for _ in range(2))
    assert LastLogits().apply(graph) == 1
    assert [(node.op, shape_of(node.outputs[0])) for node in graph.nodes] == [
        ("Tanh", ("batch", "sequence", 8)),
        ("Add", ("batch", "sequence", 8)),
        ("Slice", ("batch", 1, 8)),
        ("RMSNormalization", ("batch", 1, 8)),
        ("MatMul", ("batch", 1, 6)),
        ("Add", ("batch", 1, 6)),
    ]
    got, expected = (run(item, {"x": X}, tmp_path)["logits"] for item in (graph, same))
    assert_close(got, expected[:, -1:])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("logits = Add(product, bias)", "logits = Softmax<axis = 1>(product)"),
        (
            "product = MatMul(normed, w)",
            "other = Transpose<perm = [1, 0]>(w) product = Einsum<equation = 'bsk,nk->bsn'>(normed, other)",
        ),
        ("(float[batch, sequence, 6] logits)", "(float[batch, sequence, 6] logits, float[batch, sequence, 6] product)"),
        ("logits", "scores"),
    ],
)
def test_what_stays(tmp_path: Path, old: str, new: str) -> None:
    graph = open_graph(make(HEAD.replace(old, new.replace("'", '"')), **CONSTANTS), tmp_path)
    before = [(node.op, shape_of(node.outputs[0])) for node in graph.nodes]
    assert LastLogits().apply(graph) == 0
    assert [(node.op, shape_of(node.outputs[0])) for node in graph.nodes] == before


@pytest.mark.parametrize(("name", "kept"), [("llama", 1), ("gemma2", 1), ("gpt2", "sequence"), ("opt", 1)])
def test_models(name: str, kept: int | str) -> None:
    """In gemma2 it is before the soft cap; in gpt2 a Reshape hides the norm, and the head alone is computed once."""
    expected, graph = run_text(graph_of(name), name), graph_of(name)
    assert LastLogits().apply(graph) == 1
    outputs = run_text(graph, name)
    assert_close(outputs["logits"], expected["logits"][:, -1:])
    for output in outputs.keys() - {"logits"}:
        np.testing.assert_array_equal(outputs[output], expected[output])
    norms = [shape_of(node.outputs[0]) for node in graph.nodes if node.op in ("RMSNormalization", "LayerNormalization")]
    assert norms[-1] == ("batch", kept, exported(name).module.config.hidden_size)
