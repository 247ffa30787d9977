"""Bootstrap intervals against a loop in float64, and against what is known of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bismooth.tools import bootstrap
from bismooth.tools.bootstrap import Interval, Resampling, difference, interval
from bismooth.tools.comparison import Comparison, Features, Logits

Array = NDArray[Any]


@given(seed=st.integers(0, 100), windows=st.integers(2, 6), tokens=st.integers(1, 9), chunk=st.integers(1, 500))
def test_against_a_loop_over_resamples(seed: int, windows: int, tokens: int, chunk: int) -> None:
    values = np.random.default_rng(seed).gamma(0.3, size=(windows, tokens))
    resampling = Resampling(windows, resamples=40, seed=seed)
    assert resampling.draws.shape == (40, windows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "_CHUNK", chunk)
        means, quantiles = resampling.mean(values), resampling.quantile(values, 0.9)
    for number, draw in enumerate(resampling.draws):
        drawn = np.concatenate([values[window] for window in draw])
        assert means[number] == pytest.approx(math.fsum(drawn) / drawn.size, rel=1e-12)
        assert quantiles[number] == pytest.approx(np.quantile(drawn, 0.9), rel=1e-12)
    np.testing.assert_allclose(resampling.mean(values[:, 0]), values[resampling.draws, 0].mean(axis=1), rtol=1e-12)


def test_the_draws_are_the_same_each_time() -> None:
    np.testing.assert_array_equal(Resampling(16).draws, Resampling(16).draws)
    assert Resampling(16).draws.shape == (10_000, 16)
    assert len(np.unique(Resampling(16).draws)) == 16


def test_the_interval_leaves_a_fortieth_on_both_sides() -> None:
    ordered = np.random.default_rng(0).permutation(np.arange(10_000.0))
    assert interval(ordered) == Interval(250, 9749)


def test_infinities() -> None:
    infinite = np.full(100, np.inf)
    assert interval(infinite) == Interval(math.inf, math.inf)
    np.testing.assert_array_equal(difference(infinite, infinite), np.zeros(100))
    assert difference(-math.inf, 1.0) == -math.inf
    assert difference(3.0, 1.0) == 2.0


@pytest.mark.parametrize(("low", "high", "excludes"), [(-1, 1, False), (0, 1, False), (0.1, 1, True), (-1, -0.1, True)])
def test_an_interval_excludes_what_is_outside(low: float, high: float, excludes: bool) -> None:
    assert Interval(low, high).excludes(0.0) is excludes


def test_equal_values_differ_by_exactly_nothing() -> None:
    values = np.random.default_rng(0).normal(size=(9, 50))
    resampling = Resampling(9)
    for replicates in (resampling.mean(values), resampling.quantile(values, 0.99)):
        assert interval(difference(replicates, replicates.copy())) == Interval(0, 0)


def test_the_normal_interval_of_many_windows() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=(400, 5))
    found = interval(Resampling(400).mean(values))
    half_width = 1.96 * values.mean(axis=1).std() / 20
    assert found.low == pytest.approx(values.mean() - half_width, abs=0.05 * half_width)
    assert found.high == pytest.approx(values.mean() + half_width, abs=0.05 * half_width)


def test_the_window_is_the_unit() -> None:
    """Tokens that say the same as each other make no interval narrower."""
    windows = np.random.default_rng(0).normal(size=(12, 1))
    resampling = Resampling(12)
    one, many = interval(resampling.mean(windows)), interval(resampling.mean(np.repeat(windows, 500, axis=1)))
    assert (many.low, many.high) == pytest.approx((one.low, one.high), rel=1e-9)


def test_coverage() -> None:
    """Tokens share an effect of their window: 95 % intervals hold the truth about that often, of 30 windows."""
    rng, trials = np.random.default_rng(0), 400
    resampling = Resampling(30, resamples=1000)
    held = 0
    for _ in range(trials):
        values = 2 + rng.normal(size=(30, 1)) + rng.normal(size=(30, 8))
        held += not interval(resampling.mean(values)).excludes(2.0)
    assert 0.90 <= held / trials <= 0.97


def test_pairing_resolves_what_the_intervals_themselves_do_not() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(16, 1))
    first, second = (hard + shift + 0.1 * rng.normal(size=(16, 64)) for shift in (0.0, 0.05))
    resampling = Resampling(16)
    a, b = resampling.mean(first), resampling.mean(second)
    assert interval(a).high > interval(b).low
    assert interval(difference(b, a)).excludes(0.0)


def logits(windows: int) -> tuple[Comparison, int]:
    comparison, rng = Logits(), np.random.default_rng(0)
    for _ in range(windows):
        reference = rng.normal(0, 3, (7, 20)).astype(np.float32)
        candidate = reference + rng.normal(0, 0.3, reference.shape).astype(np.float32)
        comparison.update(rng.integers(0, 20, 7), reference, candidate)
    return comparison, 6


def features(windows: int) -> tuple[Comparison, int]:
    comparison, rng = Features(), np.random.default_rng(0)
    for _ in range(windows):
        reference = rng.normal(0, 3, (7, 20)).astype(np.float32)
        comparison.update(np.arange(7), reference, reference + rng.normal(0, 0.3, (7, 20)).astype(np.float32))
    return comparison, 2


@pytest.mark.parametrize("make", [logits, features])
def test_all_windows_once_give_the_figures_themselves(make: Any) -> None:
    comparison, count = make(5)
    resampling = Resampling(5, resamples=2)
    resampling.draws = np.array([np.arange(5), np.arange(5)[::-1]])
    figures, replicates = comparison.figures(), comparison.resampled(resampling)
    assert len(replicates) == count
    for name, values in replicates.items():
        assert values == pytest.approx([figures[name]] * 2, rel=1e-12), name


def test_features_without_noise() -> None:
    features = Features()
    for _ in range(3):
        features.update(np.arange(4), np.ones((4, 5), np.float32), np.ones((4, 5), np.float32))
    replicates = features.resampled(Resampling(3, resamples=50))
    assert (replicates["sqnr_db"] == np.inf).all()
    assert replicates["cosine_p5"] == pytest.approx(1)


def test_a_hopeless_candidate() -> None:
    comparison, reference = Logits(), np.zeros((4, 30), np.float32)
    candidate = reference.copy()
    candidate[:, 29] = 1e6
    for _ in range(3):
        comparison.update(np.zeros(4, np.int64), reference, candidate)
    replicates = comparison.resampled(Resampling(3, resamples=50))
    assert (replicates["perplexity"] == np.inf).all()
    assert replicates["log_perplexity"] == pytest.approx(1e6)
