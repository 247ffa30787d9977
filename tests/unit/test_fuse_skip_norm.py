"""Residual sums with their norms: the same numbers, and sums that are needed before."""

from pathlib import Path

import numpy as np
import pytest

from bismooth.passes.fuse_skip_norm import FuseSkipNorm
from tests.lowered import assert_close, graph_of, run, run_text
from tests.models import exported
from tests.textgraphs import make, open_graph, ops

RNG = np.random.default_rng(0)
FUSED = "SkipSimplifiedLayerNormalization"
BLOCK = """(float[batch, sequence, 8] a, float[batch, sequence, 8] b) => (float[batch, sequence, 8] y) {
    sum = Add(a, b)
    normed = RMSNormalization<epsilon = 0.01>(sum, gamma)
    y = Mul(normed, sum)
}"""
GAMMA = RNG.standard_normal(8).astype(np.float32)
FEEDS = {name: RNG.standard_normal((2, 3, 8)).astype(np.float32) for name in "ab"}


def test_a_sum_that_others_read_too(tmp_path: Path) -> None:
    model = make(BLOCK, gamma=GAMMA)
    graph, same = (open_graph(model, tmp_path) for _ in range(2))
    assert FuseSkipNorm().apply(graph) == 1
    assert ops(graph) == [FUSED, "Mul"]
    assert_close(run(graph, FEEDS, tmp_path)["y"], run(same, FEEDS, tmp_path)["y"])


def test_a_sum_that_is_an_output(tmp_path: Path) -> None:
    text = BLOCK.replace("y) {", "y, float[batch, sequence, 8] sum) {")
    graph = open_graph(make(text, gamma=GAMMA), tmp_path)
    assert FuseSkipNorm().apply(graph) == 1
    outputs = run(graph, FEEDS, tmp_path)
    np.testing.assert_array_equal(outputs["sum"], FEEDS["a"] + FEEDS["b"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sum = Add(a, b)", "sum = Sub(a, b)"),
        ("epsilon = 0.01", "axis = 1"),
        ("float[batch, sequence, 8] b", "float[batch, 1, 8] b"),
        ("epsilon = 0.01", "stash_type = 16"),
        (
            "normed = RMSNormalization<epsilon = 0.01>(sum, gamma)",
            "early = Abs(sum) normed = RMSNormalization(sum, early)",
        ),
        ("float", "float16"),
    ],
)
def test_what_stays(tmp_path: Path, old: str, new: str) -> None:
    gamma = np.broadcast_to(GAMMA, (3, 8)) if "axis" in new else GAMMA
    text = BLOCK.replace("sequence", "3").replace(old.replace("sequence", "3"), new.replace("sequence", "3"))
    model = make(text, gamma=gamma.astype(np.float16) if new == "float16" else gamma)
    assert FuseSkipNorm().apply(open_graph(model, tmp_path)) == 0


def test_a_sum_that_is_read_before_the_norm_stays(tmp_path: Path) -> None:
    text = """(float[batch, sequence, 8] a, float[batch, sequence, 8] b) => (float[batch, sequence, 8] y) {
        sum = Add(a, b)
        before = Abs(sum)
        normed = RMSNormalization(sum, gamma)
        y = Mul(normed, before)
    }"""
    assert FuseSkipNorm().apply(open_graph(make(text, gamma=GAMMA), tmp_path)) == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_models(name: str) -> None:
    """Every norm behind a residual sum: two per layer, but for the first one, and the last of the model."""
    layers = exported(name).module.config.num_hidden_layers
    expected, graph = run_text(graph_of(name), name), graph_of(name)
    assert FuseSkipNorm().apply(graph) == 2 * layers
    assert ops(graph).count(FUSED) == 2 * layers
    for output, value in run_text(graph, name).items():
        assert_close(value, expected[output], 2e-6)
