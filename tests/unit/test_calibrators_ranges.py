"""Ranges from histograms against the same definitions on the raw samples in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bismooth.calibrators.histogram import BINS, BINS_PER_OCTAVE, EDGES, Histogram
from bismooth.calibrators.ranges import entropy, minmax, mse, percentile, threshold
from bismooth.export.errors import BismoothError
from bismooth.passes.spec import RangeMethod, StaticActivation

Samples = NDArray[np.float64]
BIN = 2 ** (1 / BINS_PER_OCTAVE)
TRIED = np.exp2(-np.arange(12 * 64) / 64)


def normal(seed: int) -> Samples:
    return np.random.default_rng(seed).standard_normal(40_000)


def laplace(seed: int) -> Samples:
    return np.random.default_rng(seed).laplace(scale=3e-3, size=40_000)


def with_outliers(seed: int) -> Samples:
    x = normal(seed)
    x[:4] *= 3000
    return x


def sparse(seed: int) -> Samples:
    return np.maximum(normal(seed), 0)


SAMPLES = pytest.mark.parametrize("make", [normal, laplace, with_outliers, sparse])


def quantization_error(x: Samples, t: float) -> float:
    step = t / 127
    return float(((x - step * np.clip(np.rint(x / step), -127, 127)) ** 2).mean())


def divergence(x: Samples, t: float) -> float:
    """KL between |x| on 128 · 16 bins over [0, t], outliers in the last one, and its merged form; 1e-4 added in all."""
    inside = np.histogram(np.abs(x), bins=2048, range=(0, t))[0].astype(float)
    p = inside.copy()
    p[-1] += x.size - inside.sum()
    q = np.zeros_like(p)
    for start in range(0, 2048, 16):
        block = slice(start, start + 16)
        filled = inside[block] > 0
        q[block][filled] = inside[block].sum() / max(filled.sum(), 1)
    shares = [counts / counts.sum() + 1e-4 / 2048 for counts in (p, q)]
    p, q = (share / share.sum() for share in shares)
    return float((p * np.log(p / q)).sum())


@SAMPLES
@pytest.mark.parametrize("percent", [50, 90, 99, 99.9, 99.99, 100])
def test_percentile(make: Callable[[int], Samples], percent: float) -> None:
    x = make(1)
    exact = np.quantile(np.abs(x), percent / 100, method="inverted_cdf")
    result = percentile(Histogram.of(x), percent)
    assert exact / BIN <= result <= exact * BIN or result <= EDGES[0] > exact


@SAMPLES
def test_mse_is_as_good_as_the_best_threshold_on_the_samples(make: Callable[[int], Samples]) -> None:
    x = make(2)
    best = min(quantization_error(x, t) for t in np.abs(x).max() * TRIED)
    assert quantization_error(x, mse(Histogram.of(x))) <= 1.02 * best


@SAMPLES
def test_entropy_is_as_good_as_the_best_threshold_on_the_samples(make: Callable[[int], Samples]) -> None:
    x = make(3)
    divergences = [divergence(x, t) for t in np.abs(x).max() * TRIED[::4]]
    assert divergence(x, entropy(Histogram.of(x))) <= 1.1 * min(divergences) + 1e-3


def test_minmax_is_exact() -> None:
    x = with_outliers(4)
    assert minmax(Histogram.of(x)) == np.abs(x).max()


def test_outliers_are_clipped_only_where_it_pays() -> None:
    outliers, clean = Histogram.of(with_outliers(5)), Histogram.of(np.random.default_rng(5).uniform(-1, 1, 10_000))
    assert entropy(outliers) < 20
    assert mse(clean) > 0.98
    assert mse(outliers) > 1000  # four values of about 3000 weigh more than all others


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=200))
def test_any_samples(values: list[float]) -> None:
    h = Histogram.of(np.array(values))
    for t in (minmax(h), percentile(h, 99), entropy(h), mse(h)):
        assert 0 <= t <= h.absmax
    below = h.below(np.array([0.0, h.absmax, np.inf]))
    assert below[0] >= 0
    assert below[1] == below[2] == len(values)
    assert (np.diff(h.below(np.sort(np.abs(values)))) >= 0).all()


def test_bins_hold_what_their_edges_say() -> None:
    x = np.array([0, 2.0**-25, EDGES[0], EDGES[5] * 1.001, -EDGES[5], 2.0**16, 1e9])
    h = Histogram.of(x)
    assert np.flatnonzero(h.counts).tolist() == [0, 1, 6, BINS - 1]
    assert h.counts[h.counts > 0].tolist() == [2, 1, 2, 2]
    assert h.lower[6] == EDGES[5] and h.upper[6] == EDGES[6]
    assert (h.lower[-1], h.upper[-1]) == (2.0**16, 1e9)


def test_all_zero() -> None:
    h = Histogram.of(np.zeros(10))
    assert [minmax(h), percentile(h, 99), entropy(h), mse(h)] == [0, 0, 0, 0]


@pytest.mark.parametrize("method", list(RangeMethod))
def test_threshold_follows_the_recipe(method: RangeMethod) -> None:
    h = Histogram.of(normal(6))
    share = 99.0 if method is RangeMethod.PERCENTILE else None
    expected = {"minmax": minmax(h), "percentile": percentile(h, 99), "entropy": entropy(h), "mse": mse(h)}
    assert threshold(h, StaticActivation(method, share)) == expected[method.value]


@pytest.mark.parametrize("percent", [0, -1, 100.5])
def test_bad_percentile(percent: float) -> None:
    with pytest.raises(BismoothError, match=rf"percentile: Expected a value above 0 and up to 100, got {percent}"):
        percentile(Histogram.of(normal(7)), percent)
