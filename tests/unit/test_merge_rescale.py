"""Rescales as scales of weights: the same bits, one kernel, and products that keep theirs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines.onnxruntime import Mode
from bismooth.passes.graph import load, save
from bismooth.passes.merge_rescale import MergeRescale
from tests.graphs import Builder
from tests.lowered import assert_close, run
from tests.quantizing import Quantized, quantize, recipe
from tests.textgraphs import ops
from tests.unit.test_qdq import optimized

K, N = 48, 24
X = np.random.default_rng(0).standard_normal((2, 5, K)).astype(np.float32)


def linears(folder: Path, *rules: Any, names: str = "qkv") -> Quantized:
    """Linears on one tensor."""
    b = Builder()
    x = b.tokens("x", K)
    b.outputs += [b.linear(x, name, N, K, bias=name == "k") for name in names]
    return quantize(b, folder, recipe(*rules))


@pytest.mark.parametrize(("mode", "tolerance"), [("int8", 0), ("reference", 1e-6)])
def test_the_numbers_are_the_same(tmp_path: Path, mode: Mode, tolerance: float) -> None:
    """To the last bit from INT8 kernels; where floats are multiplied, the weights are rounded otherwise."""
    made = linears(tmp_path)
    graph = load(made.folder / "model.onnx")
    before = ops(graph).count("Mul")
    assert MergeRescale().apply(graph) == 3
    assert ops(graph).count("Mul") == before - 3
    expected = made.run({"x": X}, mode=mode)
    for name, value in run(graph, {"x": X}, made.folder, mode).items():
        assert_close(value, expected[name], tolerance)


def test_kernels(tmp_path: Path) -> None:
    made = linears(tmp_path)
    graph = load(made.folder / "model.onnx")
    MergeRescale().apply(graph)
    save(graph, made.folder / "merged.onnx")
    kernels = optimized(made.folder / "merged.onnx", tmp_path)
    assert kernels["MatMulIntegerToFloat"] == 3
    assert kernels["Mul"] == 3, "by t"
    assert not kernels.keys() & {"MatMul", "DequantizeLinear"}


@pytest.mark.parametrize(
    "rule",
    [
        {"match": "*", "weights": {"granularity": "per_group", "group_size": 16}},
        {"match": "*", "activations": None},
    ],
)
def test_groups_and_float_activations_stay(tmp_path: Path, rule: Any) -> None:
    graph = load(linears(tmp_path, rule).folder / "model.onnx")
    before = ops(graph)
    assert MergeRescale().apply(graph) == 0
    assert ops(graph) == before


def test_an_activation_that_another_node_reads_stays(tmp_path: Path) -> None:
    made = linears(tmp_path)
    graph = load(made.folder / "model.onnx")
    activation = next(node for node in graph.nodes if node.name.endswith("per_token/DequantizeLinear"))
    product = next(node for node in graph.nodes if node.name == "v/MatMul")
    product.op = "FusedMatMul"
    assert activation.outputs[0] in product.inputs
    assert MergeRescale().apply(graph) == 0
