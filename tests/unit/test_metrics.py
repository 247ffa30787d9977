"""Metrics against direct float64 formulas, in any batching, and in bounded memory."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bismooth.export.errors import BismoothError, GateError
from bismooth.tools import metrics
from bismooth.tools.metrics import LogitComparison, LogitMetrics, Perplexity, Sqnr

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


def data(seed: int, shape: tuple[int, int, int], noise: float, scale: float = 4.0) -> tuple[Ids, Logits, Logits]:
    rng = np.random.default_rng(seed)
    reference = (rng.standard_normal(shape) * scale).astype(np.float32)
    candidate = (reference + rng.standard_normal(shape) * noise).astype(np.float32)
    return rng.integers(0, shape[2], shape[:2]), reference, candidate


def log_softmax(x: Logits) -> NDArray[np.float64]:
    y = x.astype(np.float64)
    return y - np.logaddexp.reduce(y, axis=-1, keepdims=True)


def direct(ids: Ids, reference: Logits, candidate: Logits) -> LogitMetrics:
    """The definitions, with everything in memory."""
    p, q = log_softmax(reference), log_softmax(candidate)
    nll_p, nll_q = (-np.take_along_axis(x[:, :-1], ids[:, 1:, None], axis=2).mean() for x in (p, q))
    kl = (np.exp(p) * (p - q)).sum(axis=-1).ravel()
    same = (reference.argmax(axis=-1) == candidate.argmax(axis=-1)).ravel()
    ordered = np.sort(np.exp(p), axis=-1)
    stable = (ordered[..., -1] - ordered[..., -2] > 0.1).ravel()
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    cosine = ((r * c).sum(-1) / np.sqrt((r * r).sum(-1) * (c * c).sum(-1))).ravel()
    return LogitMetrics(
        positions=kl.size,
        reference_perplexity=math.exp(nll_p),
        perplexity=math.exp(nll_q),
        perplexity_ratio=math.exp(nll_q) / math.exp(nll_p),
        log_perplexity=nll_q,
        kl_mean=kl.mean(),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=same.mean(),
        top1_stable=same[stable].mean() if stable.any() else None,
        stable_share=stable.mean(),
        cosine_p5=float(np.quantile(cosine, 0.05)),
        max_error=float(np.abs(c - r).max()),
        relative_error=float(np.abs(c - r).max() / np.abs(r).max()),
    )


def compared(ids: Ids, reference: Logits, candidate: Logits, batch: int = 1) -> LogitMetrics:
    comparison = LogitComparison()
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        comparison.update(ids[part], reference[part], candidate[part])
    return comparison.result()


def assert_equal(result: LogitMetrics, expected: LogitMetrics, rel: float = 1e-6) -> None:
    got, want = asdict(result), asdict(expected)
    for name, value in want.items():
        assert got[name] == (None if value is None else pytest.approx(value, rel=rel, abs=1e-12)), name


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.3, 3.0])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_against_the_definitions(noise: float, batch: int) -> None:
    arrays = data(1, (5, 17, 50), noise)
    assert_equal(compared(*arrays, batch), direct(*arrays))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(2, 40)),
    noise=st.sampled_from([1e-4, 0.1, 2.0]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    chunk=st.integers(1, 200),
)
def test_any_shape_in_any_chunks(
    seed: int, shape: tuple[int, int, int], noise: float, scale: float, chunk: int
) -> None:
    arrays = data(seed, shape, noise, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CHUNK", chunk)
        assert_equal(compared(*arrays), direct(*arrays))


def test_equal_logits() -> None:
    ids, logits, _ = data(2, (2, 8, 30), 0)
    result = compared(ids, logits, logits)
    assert (result.kl_mean, result.kl_p99, result.max_error, result.top1, result.perplexity_ratio) == (0, 0, 0, 1, 1)
    assert result.cosine_p5 == pytest.approx(1)


def test_small_divergences_are_resolved() -> None:
    ids, reference, _ = data(3, (1, 64, 1000), 0)
    shift = np.zeros_like(reference)
    shift[..., ::2] = 2.0**-12
    candidate = reference + shift
    p = np.exp(log_softmax(reference))
    share = p[..., ::2].sum(axis=-1)
    # KL of adding d to a share w of the distribution: d² w (1 - w) / 2 for small d
    expected = (2.0**-24 * share * (1 - share) / 2).mean()
    assert compared(ids, reference, candidate).kl_mean == pytest.approx(expected, rel=1e-2)


def test_constant_shift_changes_no_probability() -> None:
    ids, reference, _ = data(4, (1, 8, 30), 0)
    result = compared(ids, reference, reference + np.float32(64))
    assert result.kl_mean == pytest.approx(0, abs=1e-5)
    assert result.max_error == pytest.approx(64, rel=1e-5)


def test_no_stable_position() -> None:
    ids, reference, candidate = data(5, (1, 4, 100), 0.1, scale=1e-3)
    result = compared(ids, reference, candidate)
    assert (result.top1_stable, result.stable_share) == (None, 0)


def test_rows_of_zeros() -> None:
    ids = np.zeros((1, 4), np.int64)
    zeros, ones = np.zeros((1, 4, 8), np.float32), np.ones((1, 4, 8), np.float32)
    assert compared(ids, zeros, zeros).cosine_p5 == 1
    assert compared(ids, zeros, zeros).relative_error == 0
    assert compared(ids, zeros, ones).cosine_p5 == 0
    assert compared(ids, zeros, ones).relative_error == math.inf


def test_hopeless_candidate() -> None:
    ids, reference, _ = data(6, (1, 8, 30), 0)
    candidate = np.zeros_like(reference)
    candidate[..., 29] = 1e6
    result = compared(np.zeros_like(ids), reference, candidate)
    assert result.perplexity == result.perplexity_ratio == math.inf
    assert math.isfinite(result.kl_mean)


def test_perplexity_alone() -> None:
    ids, logits, _ = data(7, (3, 9, 40), 0)
    perplexity = Perplexity()
    for window in range(3):
        perplexity.update(ids[window : window + 1], logits[window : window + 1])
    assert perplexity.value == pytest.approx(direct(ids, logits, logits).perplexity)


def test_tokens_against_the_definitions() -> None:
    ids, reference, candidate = data(11, (5, 17, 50), 0.3)
    comparison = LogitComparison()
    for part in (slice(0, 2), slice(2, 5)):
        comparison.update(ids[part], reference[part], candidate[part])
    tokens = comparison.tokens()
    p, q = log_softmax(reference), log_softmax(candidate)
    np.testing.assert_allclose(tokens.kl, (np.exp(p) * (p - q)).sum(axis=-1), rtol=1e-9)
    np.testing.assert_array_equal(tokens.top1, reference.argmax(axis=-1) == candidate.argmax(axis=-1))
    for nll, log in ((tokens.nll, q), (tokens.reference_nll, p)):
        np.testing.assert_allclose(nll, -np.take_along_axis(log[:, :-1], ids[:, 1:, None], axis=2)[..., 0], rtol=1e-9)


def test_memory_is_bounded() -> None:
    ids, reference, candidate = data(8, (1, 64, 20_000), 0.1)  # 5 MB of logits each
    comparison = LogitComparison()
    comparison.update(ids, reference, candidate)
    tracemalloc.start()
    for _ in range(20):
        comparison.update(ids, reference, candidate)
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert current < 200_000
    assert peak < 20e6


@pytest.mark.parametrize("content", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(content: float) -> None:
    ids, reference, candidate = data(9, (1, 4, 10), 0.1)
    broken = reference.copy()
    broken[0, 2, 3] = content
    with pytest.raises(GateError, match=r"the logits of the candidate hold NaN or infinity"):
        compared(ids, reference, broken)
    with pytest.raises(BismoothError, match=r"the logits of the reference hold NaN or infinity") as caught:
        compared(ids, broken, candidate)
    assert not isinstance(caught.value, GateError)
    with pytest.raises(GateError, match=r"the logits of the model hold NaN"):
        Perplexity().update(ids, broken)


@pytest.mark.parametrize(
    ("ids", "logits", "message"),
    [
        ((1, 4), (1, 5, 10), r"got \[1, 4\] and \[1, 5, 10\]"),
        ((1, 4), (1, 10), r"Expected token ids \[B, S\] with S > 1 and logits \[B, S, V\]"),
        ((1, 1), (1, 1, 10), r"got \[1, 1\]"),
        ((0, 4), (0, 4, 10), r"got \[0, 4\]"),
    ],
)
def test_shapes_that_do_not_fit(ids: tuple[int, ...], logits: tuple[int, ...], message: str) -> None:
    with pytest.raises(BismoothError, match=message):
        Perplexity().update(np.zeros(ids, np.int64), np.zeros(logits, np.float32))


def test_two_vocabularies() -> None:
    ids, reference, candidate = data(10, (1, 4, 10), 0.1)
    with pytest.raises(BismoothError, match=r"one shape, got reference \[1, 4, 10\] and candidate \[1, 4, 9\]"):
        LogitComparison().update(ids, reference, candidate[..., :9])


def test_nothing_to_report() -> None:
    for empty in (LogitComparison().result, LogitComparison().tokens, lambda: Perplexity().value):
        with pytest.raises(BismoothError, match=r"metrics: Expected one or more windows, got none"):
            empty()


# --- SQNR -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), parts=st.integers(1, 5), chunk=st.integers(1, 300), noise=st.floats(1e-4, 10))
def test_sqnr_against_the_definition(seed: int, parts: int, chunk: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    r = rng.standard_normal((20, 13)).astype(np.float32)
    c = (r + rng.standard_normal(r.shape) * noise).astype(np.float32)
    sqnr = Sqnr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CHUNK", chunk)
        for rows in np.array_split(np.arange(20), parts):
            sqnr.update(r[rows], c[rows])
    r64, error = r.astype(np.float64), c.astype(np.float64) - r
    assert sqnr.decibels == pytest.approx(10 * math.log10((r64**2).sum() / (error**2).sum()))
    assert sqnr.relative_error == pytest.approx(np.abs(error).max() / np.abs(r64).max())


@pytest.mark.parametrize(
    ("reference", "candidate", "decibels", "relative"),
    [(1, 1, math.inf, 0), (0, 0, math.inf, 0), (0, 1, -math.inf, math.inf), (10, 11, 20, 0.1)],
)
def test_sqnr_limits(reference: float, candidate: float, decibels: float, relative: float) -> None:
    sqnr = Sqnr()
    sqnr.update(np.full((2, 3), reference, np.float32), np.full((2, 3), candidate, np.float32))
    assert sqnr.decibels == pytest.approx(decibels)
    assert sqnr.relative_error == pytest.approx(relative)


def test_sqnr_after_a_nan() -> None:
    sqnr = Sqnr()
    sqnr.update(np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32))
    sqnr.update(np.ones(3, np.float32), np.ones(3, np.float32))
    assert math.isnan(sqnr.decibels)
    assert math.isnan(sqnr.relative_error)


def test_sqnr_of_two_shapes() -> None:
    arrays: list[Any] = [np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)]
    with pytest.raises(BismoothError, match=r"tensors of one shape, got \[2, 3\] and \[3, 2\]"):
        Sqnr().update(*arrays)
