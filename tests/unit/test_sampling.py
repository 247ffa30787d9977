"""Tokens from logits, against definitions in float64 and against transformers."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bismooth.engines.sampling import Sampler, Sampling, probabilities
from bismooth.export.errors import BismoothError

Logits = NDArray[np.float32]


def logit_lists(min_size: int = 2) -> Any:
    """Rows of logits; few distinct values, so that ties are frequent."""
    values = st.one_of(st.integers(-4, 4).map(float), st.floats(-30, 30, width=32), st.just(-math.inf))
    rows = st.lists(values, min_size=min_size, max_size=12).filter(lambda row: max(row) > -math.inf)
    return rows.map(lambda row: np.array(row, np.float32))


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "sampling: temperature is -0.5. Expected a finite number of 0 or more."),
        ({"temperature": math.inf}, "sampling: temperature is inf. Expected a finite number of 0 or more."),
        ({"temperature": math.nan}, "sampling: temperature is nan."),
        ({"top_k": 0}, "sampling: top_k is 0. Expected 1 or more."),
        ({"top_p": 0.0}, "sampling: top_p is 0.0. Expected more than 0 and at most 1."),
        ({"top_p": 1.5}, "sampling: top_p is 1.5."),
        ({"min_p": 1.5}, "sampling: min_p is 1.5. Expected 0 to 1."),
        ({"seed": -1}, "sampling: seed is -1. Expected 0 or more."),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BismoothError, match=re.escape(message)):
        Sampling(**settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [[math.nan, 1], [math.inf, 1], [-math.inf, -math.inf]])
def test_logits_that_are_not_finite_are_refused(broken: list[float], temperature: float) -> None:
    logits = np.array([[0, 1], broken], np.float32)
    with pytest.raises(BismoothError, match=r"sampling: the largest logit of row 1 is -?(nan|inf)\. Expected a finite"):
        Sampler(Sampling(temperature), 2)(logits)


def test_greedy_takes_the_likeliest_and_of_equal_ones_the_first() -> None:
    logits = np.array([[1, 3, 2], [5, 0, 5]], np.float32)
    assert Sampler(Sampling(), 2)(logits).tolist() == [1, 0]


@given(logit_lists(), st.floats(0.05, 20))
def test_temperature_divides_the_logits(logits: Logits, temperature: float) -> None:
    expected = softmax(logits.astype(np.float64) / temperature)
    np.testing.assert_allclose(probabilities(logits, Sampling(temperature)), expected, rtol=1e-12, atol=1e-300)


@given(logit_lists(), st.sampled_from([1e-6, 1e-30, 1e-300, 5e-324]))
def test_a_temperature_near_zero_is_greedy(logits: Logits, temperature: float) -> None:
    logits[int(logits.argmax())] += 1  # the only one
    tokens = Sampler(Sampling(temperature), 1)(logits[None])
    assert tokens.tolist() == Sampler(Sampling(), 1)(logits[None]).tolist()


@given(logit_lists(), st.integers(1, 15))
def test_top_k_keeps_k_and_ties_with_the_last(logits: Logits, k: int) -> None:
    kept = probabilities(logits, Sampling(1.0, top_k=k)) > 0
    threshold = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    np.testing.assert_array_equal(kept, (logits >= threshold) & (logits > -math.inf))


@given(logit_lists(), st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_whose_mass_reaches_p(logits: Logits, p: float) -> None:
    shares = softmax(logits.astype(np.float64))
    kept = probabilities(logits, Sampling(1.0, top_p=p)) > 0
    assert shares[kept].sum() >= p - 1e-12
    without_last = shares[kept].sum() - shares[kept].min()
    assert kept.sum() == 1 or without_last < p + 1e-12
    assert shares[kept].min() >= shares[~kept].max(initial=0)


def test_of_equally_likely_tokens_top_p_keeps_the_first() -> None:
    kept = probabilities(np.zeros(4, np.float32), Sampling(1.0, top_p=0.5))
    assert kept.tolist() == [0.5, 0.5, 0, 0]
    assert probabilities(np.zeros(4, np.float32), Sampling(1.0, top_p=0.51)).tolist() == [1 / 3, 1 / 3, 1 / 3, 0]


def test_top_p_takes_its_mass_from_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    kept = probabilities(logits, Sampling(1.0, top_k=2, top_p=0.5))
    np.testing.assert_allclose(kept, [1, 0, 0, 0])  # 0.4 / 0.7 is more than a half
    np.testing.assert_allclose(probabilities(logits, Sampling(1.0, top_p=0.5)), [4 / 7, 3 / 7, 0, 0], rtol=1e-6)


@given(
    logit_lists(),
    st.floats(0.1, 5),
    st.none() | st.integers(1, 15),
    st.just(1.0) | st.floats(0.05, 0.95),
    st.just(0.0) | st.floats(0.01, 0.9),
)
def test_probabilities_are_those_of_transformers(
    logits: Logits, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch: Any = pytest.importorskip("torch")
    steps: list[Any] = [TemperatureLogitsWarper(temperature)]
    steps += [] if top_k is None else [TopKLogitsWarper(top_k)]
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [MinPLogitsWarper(min_p)] if min_p > 0 else []
    scores = torch.tensor(logits[None].astype(np.float64))
    for step in steps:
        scores = step(None, scores)
    expected = np.sort(torch.softmax(scores, -1).numpy()[0])  # which of equal ones are kept is left to the sort there
    found = np.sort(probabilities(logits, Sampling(temperature, top_k, top_p, min_p)))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2, 1e-9]], np.float32))
    sampler = Sampler(Sampling(1.0), 1)
    counts = np.bincount([int(sampler(logits)[0]) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2, 0], atol=0.03)  # four standard deviations


def test_the_seed_decides() -> None:
    def draw(seed: int, rows: int = 1) -> list[list[int]]:
        sampler = Sampler(Sampling(1.0, seed=seed), rows)
        return [sampler(np.zeros((rows, 1000), np.float32)).tolist() for _ in range(5)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


@given(st.integers(0, 2**70), st.integers(2, 4), st.integers(0, 5))
def test_rows_do_not_depend_on_each_other(seed: int, rows: int, change: int) -> None:
    logits = np.random.default_rng(0).standard_normal((rows, 50)).astype(np.float32)
    other = logits.copy()
    other[1:] += change * np.arange(50, dtype=np.float32)
    together, changed = Sampler(Sampling(1.0, seed=seed), rows), Sampler(Sampling(1.0, seed=seed), rows)
    alone = Sampler(Sampling(1.0, seed=seed), 1)
    for _ in range(3):
        first = int(alone(logits[:1])[0])
        assert first == together(logits)[0] == changed(other)[0]


def test_rows_with_equal_logits_draw_different_tokens() -> None:
    tokens = Sampler(Sampling(1.0), 8)(np.zeros((8, 1000), np.float32))
    assert len(set(tokens.tolist())) > 1
