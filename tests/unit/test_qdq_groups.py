"""Weights and tokens with a scale per group of input channels: one batched INT8 product and a sum."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines.linears import summarize
from bismooth.passes.graph import load
from bismooth.passes.lint import lint
from tests.graphs import Builder
from tests.quantizing import Array, Quantized, Seen, quantize, recipe, relative_error, w8a8, watch

N, T = 24, (2, 5)
GROUPED = {"dtype": "int8", "granularity": "per_group", "group_size": 16}
STATIC = {"granularity": "per_tensor", "range": "minmax"}


def grouped(**settings: Any) -> Any:
    return recipe({"match": "*", "weights": GROUPED}, **settings)


def linears(k: int, names: str = "a", *, flat: bool = False) -> tuple[Builder, Array]:
    """Linears on x [batch, sequence, K] or [tokens, K] with walls in W that groups keep to themselves."""
    b = Builder()
    x = b.input("x", "tokens", k) if flat else b.tokens("x", k)
    b.outputs += [b.linear(x, name, N, k, bias=True) for name in names]
    for name in names:
        b.initializers[f"{name}.weight"][:, 5] *= 100
    values = np.random.default_rng(1).standard_normal((10, k) if flat else (*T, k)).astype(np.float32)
    return b, values


def expected(x: Array, w: Array) -> Array:
    """Σ over groups of their own W8A8 product, arXiv 2408.15301 section 5."""
    return sum((w8a8(x[..., i : i + 16], w[:, i : i + 16]) for i in range(0, w.shape[1], 16)), np.zeros(()))


def run(made: Quantized, x: Array, **options: Any) -> list[Array]:
    return list(made.run({"x": x}, **options).values())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("k", [48, 40, 16, 10])
def test_per_token_and_group(tmp_path: Path, k: int, flat: bool) -> None:
    b, x = linears(k, "ab", flat=flat)
    made = quantize(b, tmp_path, grouped())
    for name, got in zip("ab", run(made, x), strict=True):
        exact = expected(x, b.initializers[f"{name}.weight"]) + b.initializers[f"{name}.bias"]
        assert got.shape == exact.shape
        assert relative_error(exact, got) <= 1e-6


def test_the_product_of_all_groups_keeps_the_name_of_the_node(tmp_path: Path) -> None:
    made = quantize(linears(40)[0], tmp_path, grouped())
    (linear,) = summarize(made.folder / "model.onnx").linears
    assert (linear.node, linear.quantized) == (made.result.linears[0].node, True)


def test_static_scales_are_one_for_each_group(tmp_path: Path) -> None:
    b, x = linears(40)
    x[..., 20] *= 50
    made = quantize(b, tmp_path, grouped(activations=STATIC), Seen({"x": x.reshape(-1, 40)}))
    scale = np.repeat([np.abs(x[..., i : i + 16]).max() / np.float32(127) for i in range(0, 40, 16)], 16)[:40]
    xq = np.rint(x / scale.astype(np.float32)).astype(np.float64) * scale
    exact = xq @ rounded(b.initializers["a.weight"]).T + b.initializers["a.bias"]
    assert relative_error(exact, run(made, x)[0]) <= 1e-6


def rounded(w: Array, size: int = 16) -> Array:
    """W as INT8 holds it, with scales per row and group."""
    n, k = w.shape
    groups = np.pad(w, ((0, 0), (0, -k % size))).reshape(n, -1, size)
    steps = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    return (np.rint(groups / steps) * steps.astype(np.float64)).reshape(n, -1)[:, :k]


def test_weight_only(tmp_path: Path) -> None:
    b, x = linears(40)
    made = quantize(b, tmp_path, grouped(activations=None))
    exact = x.astype(np.float64) @ rounded(b.initializers["a.weight"]).T + b.initializers["a.bias"]
    for mode in ("reference", "int8"):
        assert relative_error(exact, run(made, x, mode=mode)[0]) <= 1e-5
    assert not made.result.linears[0].int8


def test_linears_that_read_one_tensor_share_its_groups(tmp_path: Path) -> None:
    b, _ = linears(40, "abc")
    graph = load(quantize(b, tmp_path, grouped()).folder / "model.onnx")
    assert sorted(
        node.op for node in graph.nodes if node.op in ("Pad", "Transpose", "QuantizeLinear", "ReduceMax")
    ) == [
        "Pad",
        "QuantizeLinear",
        "ReduceMax",
        "Transpose",
    ]
    names = [node.name for node in graph.nodes]
    assert {"a/MatMul", "b/MatMul", "c/MatMul"} <= set(names)
    assert len(set(names)) == len(names)


def test_integer_kernels_equal_the_reference(tmp_path: Path) -> None:
    b, x = linears(40, "ab")
    made = quantize(b, tmp_path, grouped())
    for reference, got in zip(run(made, x), run(made, x, mode="int8"), strict=True):
        assert relative_error(reference, got) <= 1e-6


def test_the_float16_graph_is_clean_and_right(tmp_path: Path) -> None:
    b, x = linears(40, "ab")
    made = quantize(b, tmp_path, grouped(compute_dtype="float16"))
    for capability in (75, 89):
        assert lint(made.folder / "model.float16.onnx", target="tensorrt-rtx", capabilities=[capability]) == []
    assert lint(made.folder / "model.onnx", target="onnxruntime") == []
    for name, got in zip("ab", run(made, x, role="float16"), strict=True):
        exact = expected(x.astype(np.float16).astype(np.float32), b.initializers[f"{name}.weight"])
        assert relative_error(exact + b.initializers[f"{name}.bias"], got) < 2e-3


def test_some_linears_per_group_and_others_per_channel(tmp_path: Path) -> None:
    b, x = linears(48, "ab")
    made = quantize(b, tmp_path, recipe({"match": "a", "weights": GROUPED}))
    a, other = run(made, x)
    assert relative_error(expected(x, b.initializers["a.weight"]) + b.initializers["a.bias"], a) <= 1e-6
    assert relative_error(w8a8(x, b.initializers["b.weight"]) + b.initializers["b.bias"], other) <= 1e-6


def test_sites_with_groups_are_smoothed_by_the_grid_alone(tmp_path: Path) -> None:
    b = Builder()
    h = b.rms_norm(b.tokens("x", 48), "norm", 48)
    b.outputs.append(b.linear(h, "fc", N, 48))
    b.initializers["norm.weight"][7] /= 100
    b.initializers["fc.weight"][:, 7] *= 100
    x = np.random.default_rng(0).standard_normal((*T, 48)).astype(np.float32)
    seen = watch(b, tmp_path / "seen", {"x": x}, h)
    smooth = {"alphas": [0.4, 0.5, 0.6], "refine_steps": 20}
    made = quantize(b, tmp_path, grouped(smoothing=smooth), seen)
    (choice,) = made.result.choices
    assert choice.reason == "least output error on the grid"
    assert choice.error is not None and choice.unsmoothed is not None and choice.error < choice.unsmoothed / 2
