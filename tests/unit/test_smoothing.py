"""The search for smoothing factors: what it chooses, why, and what it leaves alone."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.graph import load
from bismooth.passes.linears import Linear, find_linears
from bismooth.passes.output_error import Consumer, OutputError, relative, token_weights
from bismooth.passes.refine import expected_error
from bismooth.passes.sites import Site, find_sites
from bismooth.passes.smoothing import LARGEST, Choice, choose_factors, smoothing_factor, within_bounds
from bismooth.passes.spec import (
    ActivationSpec,
    DynamicActivation,
    LinearSpec,
    PerGroup,
    RangeMethod,
    SiteKind,
    SmoothSpec,
    StaticActivation,
    WeightSpec,
)
from tests.blocks import gated_mlp
from tests.graphs import Builder
from tests.quantizing import Array, Seen, per_channel, per_token, watch

K, N = 64, 96
_KEPT = {RangeMethod.MINMAX: 1.0, RangeMethod.MSE: 0.4}
GRID = SmoothSpec((0.3, 0.4, 0.5, 0.6, 0.7))
FREE = np.ones(K, np.bool_)


def _spec(smoothing: SmoothSpec | None = GRID) -> LinearSpec:
    return LinearSpec(WeightSpec(), DynamicActivation(), smoothing)


def _norm_and_linears(walls: Mapping[int, float], names: str = "a") -> Builder:
    """norm → linears, with channels whose activations are f times smaller and whose weights f times larger."""
    b = Builder()
    h = b.rms_norm(b.tokens("x", K), "norm", K)
    b.outputs += [b.linear(h, name, N, K) for name in names]
    for channel, f in walls.items():
        b.initializers["norm.weight"][channel] /= f
        for name in names:
            b.initializers[f"{name}.weight"][:, channel] *= f
    return b


def _choose(
    b: Builder,
    folder: Path,
    specs: Mapping[str, LinearSpec],
    *,
    data: bool = True,
    earlier: Mapping[str, Array] | None = None,
) -> tuple[dict[str, Array], dict[str, Choice], dict[str, Site]]:
    x = np.random.default_rng(5).standard_normal((4, 16, b.inputs[0].type.tensor_type.shape.dim[-1].dim_value))
    folder.mkdir(exist_ok=True)
    graph = load(b.save(folder))
    linears = {linear.name: linear for linear in find_linears(graph)}
    sites, _ = find_sites(graph, list(linears.values()))
    values = {linear.x for linear in linears.values()}
    seen = watch(b, folder / "seen", {"x": x.astype(np.float32)}, *sorted(values)) if data else None
    weights = {linear.name: b.initializers[linear.weight] for linear in linears.values()}
    done: list[str] = []
    blocks = partial(_blocks, weights)
    factors, choices = choose_factors(sites, linears, specs, blocks, seen, done.append, earlier)
    assert [choice.site for choice in choices] == [site.name for site in sites]
    widths = {site.name: max(linears[item.linear].k for item in site.consumers) for site in sites}
    assert done == sorted(widths, key=lambda name: -widths[name]), "the widest come first"
    return factors, {choice.site: choice for choice in choices}, {site.name: site for site in sites}


def _blocks(weights: Mapping[str, Array], linear: Linear) -> list[Array]:
    return np.array_split(weights[linear.name], 3)


def test_a_factor_that_was_chosen_before_is_a_candidate(tmp_path: Path) -> None:
    b, coarse = _norm_and_linears({3: 40.0}), {"a": _spec(SmoothSpec((0.0, 0.1)))}
    fine, before, _ = _choose(b, tmp_path / "fine", {"a": _spec()})
    kept, after, _ = _choose(b, tmp_path / "coarse", coarse, earlier=fine)
    np.testing.assert_array_equal(kept["norm"], fine["norm"])
    choice = after["norm"]
    assert (choice.alpha, choice.reason) == (None, "least output error, that of one scale per channel")
    assert choice.error == before["norm"].error
    _, other, _ = _choose(b, tmp_path / "worse", coarse, earlier={"norm": np.ones(K)})
    assert other["norm"].reason == "least output error on the grid"


@pytest.mark.parametrize("f", [40.0, 200.0])
def test_planted_walls_are_undone(tmp_path: Path, f: float) -> None:
    """Activations 1/f and weights f: s is below 1 by that factor, and the error is that of the healthy site."""
    walls = {3: f, 17: f, 40: 2 * f}
    healthy, before, _ = _choose(_norm_and_linears({}), tmp_path / "healthy", {"a": _spec()})
    factors, choices, _ = _choose(_norm_and_linears(walls), tmp_path / "walls", {"a": _spec()})
    others = np.setdiff1d(np.arange(K), list(walls))
    level = np.exp(np.log(factors["norm"][others] / healthy["norm"][others]).mean())
    for channel, factor in walls.items():
        assert factors["norm"][channel] * factor / level == pytest.approx(healthy["norm"][channel], rel=1e-4)
        assert factors["norm"][channel] < 0.1
    choice = choices["norm"]
    assert choice.unsmoothed is not None and choice.error is not None and before["norm"].error is not None
    assert choice.unsmoothed > 5 * choice.error
    assert choice.error == pytest.approx(before["norm"].error, rel=1e-3)
    assert choice.channels == K


def test_refinement_is_taken_when_it_measures_better(tmp_path: Path) -> None:
    b = _norm_and_linears({3: 50})
    _, plain, _ = _choose(b, tmp_path / "plain", {"a": _spec()})
    _, refined, _ = _choose(b, tmp_path / "refined", {"a": _spec(SmoothSpec(GRID.alphas, refine_steps=40))})
    assert plain["norm"].reason == "least output error on the grid"
    assert refined["norm"].reason == "least output error, refined"
    assert refined["norm"].error is not None and plain["norm"].error is not None
    assert refined["norm"].error < plain["norm"].error


def test_no_smoothing_is_chosen_where_it_is_best(tmp_path: Path) -> None:
    """All α of the grid make an outlier of a channel that was none."""
    b = _norm_and_linears({})
    b.initializers["norm.weight"][:] = 1
    b.initializers["a.weight"][:] = np.sign(b.initializers["a.weight"])
    b.initializers["a.weight"][1:, 5] = 0
    b.initializers["a.weight"][0, 5] = 1e-4
    factors, choices, _ = _choose(b, tmp_path, {"a": _spec(SmoothSpec((0.01, 0.02)))})
    assert factors == {}
    choice = choices["norm"]
    assert choice.reason == "no smoothing has the least output error"
    assert (choice.alpha, choice.channels) == (None, 0)
    assert choice.error == choice.unsmoothed


def test_a_fixed_alpha_is_used_as_it_is(tmp_path: Path) -> None:
    b = _norm_and_linears({})
    factors, choices, _ = _choose(b, tmp_path, {"a": _spec(SmoothSpec((0.01,)))})
    assert (choices["norm"].alpha, choices["norm"].reason) == (0.01, "fixed by the recipe")
    assert factors["norm"].shape == (K,)


def test_the_largest_weight_of_all_consumers_counts(tmp_path: Path) -> None:
    b = _norm_and_linears({}, "ab")
    b.initializers["b.weight"][:, 9] *= 1000
    factors, _, _ = _choose(b, tmp_path, {name: _spec(SmoothSpec((0.0,))) for name in "ab"})
    peaks = np.maximum(np.abs(b.initializers["a.weight"]).max(axis=0), np.abs(b.initializers["b.weight"]).max(axis=0))
    expected = (1 / peaks) / np.exp(np.log(1 / peaks).mean())
    np.testing.assert_allclose(factors["norm"], expected, rtol=1e-5)


def test_pinned_channels_stay_1(tmp_path: Path) -> None:
    """The first channels of the norm are also an output of the graph."""
    b = _norm_and_linears({20: 100, 30: 100})
    norm = next(node.output[0] for node in b.nodes if node.op_type == "RMSNormalization")
    b.outputs.append(b.op("Softplus", b.op("Slice", norm, b.ints(0), b.ints(10), b.ints(-1)), at="side"))
    refined = SmoothSpec(GRID.alphas, refine_steps=5)
    for folder, data in ((tmp_path / "data", True), (tmp_path / "none", False)):
        factors, _, sites = _choose(b, folder, {"a": _spec(refined)}, data=data)
        assert sites["norm"].free.tolist() == [False] * 10 + [True] * 54
        assert (factors["norm"][:10] == 1).all()
        assert factors["norm"][20] < 0.2


def test_without_data_only_walls_are_touched(tmp_path: Path) -> None:
    factors, choices, _ = _choose(_norm_and_linears({3: 100, 20: 60}), tmp_path / "a", {"a": _spec()}, data=False)
    assert np.flatnonzero(factors["norm"] != 1).tolist() == [3, 20]
    assert choices["norm"].reason == "channels that stand out in the weights"
    assert (choices["norm"].alpha, choices["norm"].error, choices["norm"].channels) == (None, None, 2)
    factors, choices, _ = _choose(_norm_and_linears({}), tmp_path / "b", {"a": _spec()}, data=False)
    assert factors == {}
    assert choices["norm"].reason == "no channel of the weights stands out, and there is no calibration data"


def test_kinds_that_the_recipe_leaves_out_are_left_alone(tmp_path: Path) -> None:
    only_norms = SmoothSpec(GRID.alphas, frozenset({SiteKind.NORM}))
    factors, choices, _ = _choose(gated_mlp(), tmp_path, {name: _spec(only_norms) for name in ("gate", "up", "down")})
    assert list(factors) == ["norm"]
    assert choices["up"].reason == "the recipe does not smooth gated_product sites"


@pytest.mark.parametrize("spec", [LinearSpec(), _spec(None)])
def test_float_linears_and_those_without_smoothing_ask_for_nothing(tmp_path: Path, spec: LinearSpec) -> None:
    factors, choices, _ = _choose(_norm_and_linears({3: 100}), tmp_path, {"a": spec})
    assert factors == {}
    assert choices["norm"].reason == "no linear behind it is quantized and smoothed by the recipe"


@pytest.mark.parametrize("other", [None, SmoothSpec((0.5,))])
def test_consumers_that_disagree_are_an_error(tmp_path: Path, other: SmoothSpec | None) -> None:
    specs = {"a": _spec(), "b": _spec(), "c": _spec(other)}
    message = (
        r"^norm: its consumers a and c disagree on smoothing\. Expected the same for all quantized linears that read"
    )
    with pytest.raises(BismoothError, match=message):
        _choose(_norm_and_linears({}, "abc"), tmp_path, specs)


def test_a_float_consumer_has_no_say(tmp_path: Path) -> None:
    factors, _, _ = _choose(_norm_and_linears({3: 100}, "ab"), tmp_path, {"a": _spec(), "b": LinearSpec()})
    assert factors["norm"][3] < 0.2


def test_the_formula_and_its_bounds() -> None:
    x, w = np.array([1.0, 4.0, 0.0, 1e9]), np.array([4.0, 1.0, 1.0, 0.0])
    free = np.array([True, True, True, False])
    s = smoothing_factor(x, w, 0.5, free)
    np.testing.assert_allclose(s, [0.5, 2.0, 1e-4, 1.0], rtol=1e-6)
    assert within_bounds(np.array([1e-30, 1e30, 1.0, 5.0]), free).tolist() == [1 / LARGEST, LARGEST, 1.0, 1.0]
    centred = within_bounds(np.array([1.0, 100.0]), np.ones(2, np.bool_))
    np.testing.assert_allclose(centred, [0.1, 10.0], rtol=1e-6)


def _consumer(x: Array, w: Array, spec: LinearSpec, row_share: float = 1.0) -> Consumer:
    return Consumer(
        labels=np.arange(K, dtype=np.int32),
        spec=spec,
        weight=w,
        row_share=row_share,
        column_peaks=np.abs(w).max(axis=0),
        column_power=(w**2).sum(axis=0),
        absmax=np.abs(x).max(axis=0),
        limit=lambda spec, columns, _: float(np.abs(x if columns is None else x / columns).max()) * _KEPT[spec.method],
        tokens=np.concatenate([x, np.zeros((4, K), np.float32)]),
        sampled=len(x),
    )


def _data() -> tuple[Array, Array, Array]:
    random = np.random.default_rng(0)
    x, w = random.standard_normal((40, K), np.float32), random.standard_normal((N, K), np.float32)
    return x, w, np.exp(random.standard_normal(K)).astype(np.float32).astype(np.float64)


def _mean_log(exact: Array, got: Array) -> float:
    return float(np.log(((exact - got) ** 2).sum(axis=1) / (exact**2).sum(axis=1)).mean())


def test_the_measured_error_is_that_of_the_quantized_linear() -> None:
    x, w, s = _data()
    (xq, t), (wq, scale) = per_token((x / s).astype(np.float32)), per_channel((w * s).astype(np.float32))
    exact = x.astype(np.float64) @ w.T
    expected = _mean_log(exact, (xq * t) @ (wq * scale).T)
    assert OutputError([_consumer(x, w, _spec())]).of(s) == pytest.approx(expected, abs=1e-4)
    assert relative(expected) == pytest.approx(np.exp(expected / 2))


def test_tokens_count_by_their_group_and_those_without_outputs_not_at_all() -> None:
    np.testing.assert_allclose(token_weights(np.array([1, 0, 5, 1, 1.0]), 3), np.array([0.5, 0, 0.5, 0.15, 0.15]) / 1.3)
    np.testing.assert_allclose(token_weights(np.array([1.0, 1, 0, 0]), 2), [0.5, 0.5, 0, 0])
    assert not token_weights(np.zeros(3), 2).any()
    x, w, s = _data()
    consumer = _consumer(x, w, _spec())
    outliers = replace(consumer, tokens=np.concatenate([x, 100 * x[:1]]))
    one = OutputError([replace(consumer, tokens=100 * x[:1], sampled=1)]).of(s)
    assert OutputError([outliers]).of(s) == pytest.approx((OutputError([consumer]).of(s) + 0.3 * one) / 1.3, rel=1e-6)
    assert OutputError([replace(consumer, tokens=np.zeros_like(x))]).of(s) == 0


def test_static_and_weight_only_linears_are_measured_as_such() -> None:
    x, w, s = _data()
    wq, scale = per_channel((w * s).astype(np.float32))
    exact, weight, moved = x.astype(np.float64) @ w.T, wq * scale, x / s
    step = np.abs(moved).max() / 127
    static = LinearSpec(WeightSpec(), StaticActivation(RangeMethod.MINMAX))
    expected = _mean_log(exact, (np.rint(moved / step) * step) @ weight.T)
    assert OutputError([_consumer(x, w, static)]).of(s) == pytest.approx(expected, abs=1e-3)
    assert OutputError([_consumer(x, w, LinearSpec(WeightSpec()))]).of(s) == pytest.approx(
        _mean_log(exact, moved @ weight.T), abs=1e-3
    )


@pytest.mark.parametrize(
    "activations", [None, DynamicActivation(), StaticActivation(RangeMethod.MINMAX)], ids=["none", "token", "tensor"]
)
def test_the_formula_predicts_the_measured_error(activations: ActivationSpec | None) -> None:
    x, w, s = _data()
    measure = OutputError([_consumer(x, w, LinearSpec(WeightSpec(), activations))])
    operands = measure.operands()
    assert operands is not None
    assert expected_error(s, operands) == pytest.approx(measure.of(s), abs=0.1)


def test_a_static_linear_is_measured_with_the_range_that_will_be_deployed() -> None:
    x, w, s = _data()
    wq, scale = per_channel((w * s).astype(np.float32))
    moved = x / s
    step = 0.4 * np.abs(moved).max() / 127
    expected = _mean_log(
        x.astype(np.float64) @ w.T, (np.clip(np.rint(moved / step), -128, 127) * step) @ (wq * scale).T
    )
    static = LinearSpec(WeightSpec(), StaticActivation(RangeMethod.MSE))
    assert OutputError([_consumer(x, w, static)]).of(s) == pytest.approx(expected, abs=1e-3)


def test_ranges_are_asked_for_once_per_tensor_and_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the divided channels, or None where nothing is divided, as when the chosen range is computed."""
    asked: list[Array | None] = []

    def limit(seen: Seen, value: str, activation: StaticActivation, divisor: Array | None, channels: None) -> float:
        asked.append(divisor)
        return float(np.abs(seen.values[value] / (1 if divisor is None else divisor)).max())

    monkeypatch.setattr(Seen, "limit", limit)
    static = LinearSpec(WeightSpec(), StaticActivation(RangeMethod.MSE), GRID)
    _choose(_norm_and_linears({3: 40}, "ab"), tmp_path, {"a": static, "b": static})
    assert len(asked) == 1 + len(GRID.alphas)
    assert [divisor is None for divisor in asked] == [True] + [False] * len(GRID.alphas)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("broken", [np.inf, -np.inf, np.nan])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, broken: float, data: bool) -> None:
    b = _norm_and_linears({}, "ab")
    b.initializers["b.weight"][7, 2] = broken
    with pytest.raises(BismoothError, match=r"^b\.weight: the weight holds NaN or infinity in row 7\. Expected finite"):
        _choose(b, tmp_path, {"a": _spec(), "b": _spec()}, data=data)


def test_a_linear_counts_by_the_rows_its_sample_stands_for() -> None:
    """A sample of a quarter of the rows, all alike, says what the whole would."""
    x, w, s = _data()
    other = w[:20] * np.float32(3)
    whole = OutputError([_consumer(x, np.tile(w, (4, 1)), _spec()), _consumer(x, other, _spec())]).of(s)
    sampled = OutputError([_consumer(x, w, _spec(), 4.0), _consumer(x, other, _spec())]).of(s)
    assert sampled == pytest.approx(whole, abs=1e-5)
    assert abs(OutputError([_consumer(x, w, _spec()), _consumer(x, other, _spec())]).of(s) - whole) > 1e-3


def test_linears_that_read_one_tensor_and_are_quantized_alike_count_as_one_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, s = _data()
    parts = [_consumer(x, w[:30], _spec()), _consumer(x, w[30:], _spec())]
    assert OutputError([_consumer(x, w, _spec())]).of(s) == pytest.approx(OutputError(parts).of(s), abs=1e-6)

    rows: list[list[int]] = []

    def measure(consumers: list[Consumer]) -> OutputError:
        rows.append([len(consumer.weight) for consumer in consumers])
        return OutputError(consumers)

    monkeypatch.setattr("bismooth.passes.smoothing.OutputError", measure)
    b = _norm_and_linears({3: 40}, "abc")
    static = LinearSpec(WeightSpec(), StaticActivation(RangeMethod.MINMAX), GRID)
    _, choices, _ = _choose(b, tmp_path / "sampled", {"a": _spec(), "b": _spec(), "c": static})
    assert rows == [[192, 96]]
    _, whole, _ = _choose(b, tmp_path / "whole", {"a": _spec(), "b": _spec(), "c": _spec()})
    assert rows[1:] == [[256]]
    assert whole["norm"].error == pytest.approx(choices["norm"].error, rel=0.2)


def test_groups_are_measured_as_such_and_not_refined() -> None:
    x, w, s = _data()
    spec = LinearSpec(WeightSpec(PerGroup(16)), DynamicActivation())
    total = np.zeros((40, N))
    for i in range(0, K, 16):
        (xq, t) = per_token((x / s).astype(np.float32)[:, i : i + 16])
        (wq, scale) = per_channel((w * s).astype(np.float32)[:, i : i + 16])
        total += (xq * t) @ (wq * scale).T
    measure = OutputError([_consumer(x, w, spec)])
    assert measure.of(s) == pytest.approx(_mean_log(x.astype(np.float64) @ w.T, total), abs=1e-3)
    assert measure.operands() is None


def test_tokens_without_output_do_not_count() -> None:
    x, w, s = _data()
    more = np.concatenate([x, np.zeros((5, K), np.float32)])
    measured = [OutputError([_consumer(rows, w, _spec())]).of(s) for rows in (x, more)]
    assert measured[0] == pytest.approx(measured[1], abs=1e-6)
    assert OutputError([_consumer(np.zeros_like(x), w, _spec())]).of(s) == 0
