"""Channels whose weights stand out have scales of their own: a product without them, and one with only them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines.linears import summarize
from bismooth.passes._gs import dtype_of
from bismooth.passes.graph import load
from bismooth.passes.lint import lint
from tests.graphs import Builder
from tests.quantizing import Array, Quantized, Seen, quantize, recipe, relative_error, w8a8, watch

N, K, T = 24, 64, (2, 5)
WALLS = [5, 40]
STATIC = {"granularity": "per_tensor", "range": "minmax"}


def mixed(groups: int = 2, wall_bits: int = 16, **settings: Any) -> Any:
    weights = {"granularity": "per_magnitude", "groups": groups, "wall_bits": wall_bits}
    return recipe({"match": "@walls", "weights": weights}, **settings)


def linears(
    names: str = "a", *, flat: bool = False, factors: tuple[float, float] = (100, 100)
) -> tuple[Builder, Array]:
    """Linears on x [batch, sequence, K] or [tokens, K], with walls in W where x is large as well."""
    b = Builder()
    x = b.input("x", "tokens", K) if flat else b.tokens("x", K)
    b.outputs += [b.linear(x, name, N, K, bias=True) for name in names]
    values = np.random.default_rng(1).standard_normal((10, K) if flat else (*T, K)).astype(np.float32)
    values[..., WALLS] *= 30
    for name in names:
        b.initializers[f"{name}.weight"][:, WALLS] *= factors
    return b, values


def parts(*walls: list[int]) -> list[Array]:
    return [np.delete(np.arange(K), np.concatenate(walls)), *map(np.array, walls)]


def digits(values: Array, scale: Array) -> tuple[Array, Array]:
    """Two INT8 digits of values / scale, in the graph's float32 arithmetic: the second in 254ths."""
    ratio = (values / scale).astype(np.float32)
    high = np.clip(np.rint(ratio), -128, 127)
    low = np.clip(np.rint((ratio - high) * np.float32(254)), -128, 127)
    return high.astype(np.float64), low.astype(np.float64)


def in_16_bits(x: Array, w: Array, t: Array | None = None) -> Array:
    """x Wᵀ with two digits of both, but for the product of the low ones; t is a constant scale of x."""
    t = t if t is not None else np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    assert t is not None
    step = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
    (x1, x2), (w1, w2) = digits(x, t), digits(w, step)
    return (x1 @ w1.T + (x2 @ w1.T + x1 @ w2.T) / 254) * t.astype(np.float64) * step.T.astype(np.float64)


def expected(x: Array, w: Array, groups: list[Array], wall_bits: int = 16) -> Array:
    rest, *walls = groups
    product = in_16_bits if wall_bits == 16 else w8a8
    return w8a8(x[..., rest], w[:, rest]) + sum(product(x[..., part], w[:, part]) for part in walls)


def run(made: Quantized, x: Array, **options: Any) -> list[Array]:
    return list(made.run({"x": x}, **options).values())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_per_token(tmp_path: Path, flat: bool, bits: int) -> None:
    b, x = linears("ab", flat=flat)
    made = quantize(b, tmp_path, mixed(wall_bits=bits))
    for name, got in zip("ab", run(made, x), strict=True):
        exact = expected(x, b.initializers[f"{name}.weight"], parts(WALLS), bits) + b.initializers[f"{name}.bias"]
        assert got.shape == exact.shape
        assert relative_error(exact, got) <= 1e-6


def test_walls_in_16_bits_do_not_drown_the_others(tmp_path: Path) -> None:
    """Walls that cancel out: 8 bits of each leave an error that is larger than what is left of the sum."""
    b, x = linears()
    b.initializers["a.weight"][:, 40] = -b.initializers["a.weight"][:, 5] * (1 + 1e-3)
    x[..., 40] = x[..., 5]
    exact = x.astype(np.float64) @ b.initializers["a.weight"].T.astype(np.float64) + b.initializers["a.bias"]
    errors = [
        relative_error(exact, run(quantize(b, tmp_path / str(bits), mixed(wall_bits=bits)), x)[0]) for bits in (8, 16)
    ]
    assert errors[0] > 0.1
    assert errors[1] < 0.02


def test_walls_of_different_height_are_parted_into_groups(tmp_path: Path) -> None:
    b, x = linears(factors=(20, 2000))
    made = quantize(b, tmp_path, mixed(groups=3))
    exact = expected(x, b.initializers["a.weight"], parts([40], [5])) + b.initializers["a.bias"]
    assert relative_error(exact, run(made, x)[0]) <= 1e-6
    assert made.result.linears[0].walls == ((40,), (5,))
    nodes = [f"a/{name}/MatMul" for name in ("walls", "walls_low", "walls_1", "walls_1_low")]
    assert list(made.result.linears[0].wall_nodes) == nodes


def test_static_scales_are_one_for_each_group(tmp_path: Path) -> None:
    b, x = linears()
    made = quantize(b, tmp_path, mixed(activations=STATIC), Seen({"x": x.reshape(-1, K)}))
    rest, walls = parts(WALLS)
    x, w = x.copy(), b.initializers["a.weight"]
    scales = [np.abs(x[..., part]).max() / np.float32(127) for part in (rest, walls)]
    steps = np.abs(w[:, rest]).max(axis=1, keepdims=True) / np.float32(127)
    rounded = np.rint(w[:, rest] / steps) * steps.astype(float)
    exact = (np.rint(x[..., rest] / scales[0]) * float(scales[0])) @ rounded.T + b.initializers["a.bias"]
    exact += in_16_bits(x[..., walls], w[:, walls], scales[1])
    assert relative_error(exact, run(made, x)[0]) <= 1e-6


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_weight_only(tmp_path: Path, compute: str) -> None:
    b, x = linears()
    made = quantize(b, tmp_path, mixed(activations=None, compute_dtype=compute))
    if compute == "float16":  # scales are stored in it
        assert relative_error(run(made, x)[0], run(made, x, role="float16")[0]) < 2e-3
        return
    exact = b.initializers["a.bias"].astype(np.float64)
    for part in parts(WALLS):
        w = b.initializers["a.weight"][:, part]
        steps = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
        exact = exact + x[..., part].astype(float) @ (np.rint(w / steps) * steps.astype(float)).T
    for mode in ("reference", "int8"):
        assert relative_error(exact, run(made, x, mode=mode)[0]) <= 1e-5


def test_linears_that_read_one_tensor_share_its_groups(tmp_path: Path) -> None:
    b, x = linears("abc")
    b.initializers["b.weight"][:, 40] /= 100
    made = quantize(b, tmp_path, mixed())
    assert [linear.walls for linear in made.result.linears] == [((5, 40),)] * 3
    graph = load(made.folder / "model.onnx")
    assert [node.op for node in graph.nodes].count("QuantizeLinear") == 3
    assert [node.op for node in graph.nodes].count("Gather") == 1
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    exact = expected(x, b.initializers["b.weight"], parts(WALLS)) + b.initializers["b.bias"]
    assert relative_error(exact, run(made, x)[1]) <= 1e-6


def test_all_products_are_linears_for_the_audit(tmp_path: Path) -> None:
    made = quantize(linears()[0], tmp_path, mixed())
    found = summarize(made.folder / "model.onnx").linears
    assert [(linear.node, linear.macs, linear.quantized) for linear in found] == [
        ("a/MatMul", K * N, True),
        ("a/walls/MatMul", len(WALLS) * N, True),
        ("a/walls_low/MatMul", 2 * len(WALLS) * N, True),
    ]
    assert (made.result.linears[0].node, *made.result.linears[0].wall_nodes) == tuple(item.node for item in found)


def test_integer_kernels_equal_the_reference(tmp_path: Path) -> None:
    b, x = linears("ab")
    made = quantize(b, tmp_path, mixed())
    for reference, got in zip(run(made, x), run(made, x, mode="int8"), strict=True):
        assert relative_error(reference, got) <= 1e-6


def test_the_float16_graph_is_clean_and_right(tmp_path: Path) -> None:
    b, x = linears("ab")
    made = quantize(b, tmp_path, mixed(compute_dtype="float16"))
    for capability in (75, 89):
        assert lint(made.folder / "model.float16.onnx", target="tensorrt-rtx", capabilities=[capability]) == []
    assert lint(made.folder / "model.onnx", target="onnxruntime") == []
    for name, got in zip("ab", run(made, x, role="float16"), strict=True):
        half = x.astype(np.float16).astype(np.float32)
        exact = expected(half, b.initializers[f"{name}.weight"], parts(WALLS)) + b.initializers[f"{name}.bias"]
        assert relative_error(exact, got) < 2e-3


def test_sums_of_products_stay_in_float32(tmp_path: Path) -> None:
    b, x = linears()
    b.initializers["a.weight"][:] *= 300  # y is in float16's range, the product of the walls alone is not
    b.initializers["a.weight"][:, 40] = -b.initializers["a.weight"][:, 5]
    x[..., 40] = x[..., 5]
    made = quantize(b, tmp_path, mixed(compute_dtype="float16"))
    graph = load(made.folder / "model.float16.onnx")
    adds = [node for node in graph.nodes if node.name.startswith("a/walls/Add")]
    assert len(adds) == 2
    tensors = [tensor for node in adds for tensor in (*node.inputs, *node.outputs)]
    assert {dtype_of(tensor) for tensor in tensors} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("share", "grouped"), [(None, "abc"), (0.4, "bc"), (0.2, "c"), (0.1, "")])
def test_a_share_of_all_linears_caps_those_that_are_grouped(tmp_path: Path, share: float, grouped: str) -> None:
    """Three of five are broken; the worst come first."""
    made = quantize(five_linears(), tmp_path, mixed(max_share=share))
    assert "".join(linear.name for linear in made.result.linears if linear.walls) == grouped
    assert made.result.broken == ("c", "b", "a")


def test_linears_that_a_later_rule_takes_back_are_not_in_the_share(tmp_path: Path) -> None:
    weights = {"granularity": "per_magnitude"}
    rules = ({"match": "@walls", "weights": weights}, {"match": "c", "weights": {"granularity": "per_channel"}})
    made = quantize(five_linears(), tmp_path, recipe(*rules, max_share=0.2))
    assert [linear.name for linear in made.result.linears if linear.walls] == ["b"]


def five_linears() -> Builder:
    b = Builder()
    for name, factor in (("a", 30), ("b", 100), ("c", 300), ("d", 1), ("e", 1)):
        b.outputs.append(b.linear(b.tokens(f"x{name}", K), name, N, K))
        b.initializers[f"{name}.weight"][:, 5] *= factor
    return b


def test_healthy_linears_and_float_ones_are_left_as_they_are(tmp_path: Path) -> None:
    b, _ = linears("ab")
    b.initializers["a.weight"][:, WALLS] /= 100
    made = quantize(b, tmp_path, recipe({"match": "b", "weights": None}, *mixed().to_dict()["layers"][2:]))
    assert [(linear.name, linear.walls) for linear in made.result.linears] == [("a", ())]
    assert made.result.float_linears == ("b",)


def test_contiguous_groups_for_linears_with_walls_alone(tmp_path: Path) -> None:
    b, _ = linears("ab")
    b.initializers["a.weight"][:, WALLS] /= 100
    rule = {"match": "@walls", "weights": {"granularity": "per_group", "group_size": 24}}
    made = quantize(b, tmp_path, recipe(rule))
    assert [(linear.name, linear.group) for linear in made.result.linears] == [("a", None), ("b", 24)]


SMOOTH = {"alphas": [0.3, 0.5, 0.7], "refine_steps": 10}


def norm_and_linear(tmp_path: Path, x_factor: float, others: float) -> tuple[Builder, Seen]:
    """Walls ×200 in W where one token of the norm's output is × about 5 ``x_factor``, and the others × ``others``."""
    b = Builder()
    h = b.rms_norm(b.tokens("x", K), "norm", K)
    b.outputs.append(b.linear(h, "fc", N, K))
    b.initializers["norm.weight"][WALLS] *= x_factor
    b.initializers["fc.weight"][:, WALLS] *= 200
    x = np.random.default_rng(0).standard_normal((*T, K)).astype(np.float32)
    x[..., WALLS] *= others
    x[0, 0, WALLS] = 100
    return b, watch(b, tmp_path / "seen", {"x": x}, h)


def test_smoothing_comes_first_and_needs_no_groups_where_it_repairs(tmp_path: Path) -> None:
    b, seen = norm_and_linear(tmp_path, 1 / 200, 1)
    made = quantize(b, tmp_path, mixed(smoothing=SMOOTH), seen)
    assert (made.result.broken, made.result.linears[0].walls) == ((), ())


def test_what_smoothing_cannot_repair_gets_groups_and_is_smoothed_for_them(tmp_path: Path) -> None:
    """Walls meet an outlier in one token, and the activation's scale is constant."""
    b, seen = norm_and_linear(tmp_path, 20, 0)
    settings: dict[str, Any] = {"smoothing": SMOOTH, "activations": STATIC}
    made = quantize(b, tmp_path, mixed(**settings), seen)
    (choice,) = made.result.choices
    (alone,) = quantize(b, tmp_path / "smoothed", recipe(**settings), seen).result.choices
    assert made.result.linears[0].walls == ((5, 40),)
    assert choice.error is not None and alone.error is not None and choice.error < alone.error / 3


def test_a_site_is_smoothed_again_for_whatever_a_rule_for_walls_changes(tmp_path: Path) -> None:
    """norm → a with walls, b without: a in float leaves the factor to b, as if the rule named a."""
    b, seen = norm_and_linear(tmp_path, 20, 0)
    (h,) = seen.values
    b.outputs.append(b.linear(h, "b", N, K))
    factors: list[Any] = []
    for number, match in enumerate(("@walls", "fc")):
        chosen = recipe({"match": match, "weights": None}, smoothing=SMOOTH, activations=STATIC)
        made = quantize(b, tmp_path / str(number), chosen, seen)
        assert made.result.float_linears == ("fc",)
        factors.append(made.result.choices)
    assert factors[0] == factors[1]
