"""The refinement of smoothing factors: its gradient, and what it gains."""

from dataclasses import replace

import numpy as np
import pytest

from bismooth.passes.recipe import Recipe
from bismooth.passes.refine import Operand, Tokens, expected_error, refine, sample, sampled_rows
from bismooth.passes.spec import SmoothSpec


def _operand(seed: int, *, static: bool = False, channels: int = 12) -> Operand:
    random = np.random.default_rng(seed)
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 3, -1], np.int32) % channels
    labels[-1] = -1
    x = random.normal(size=(20, labels.size)).astype(np.float32) * np.exp(random.normal(size=labels.size)).astype(
        np.float32
    )
    w = random.normal(size=(9, labels.size)).astype(np.float32) * np.exp(random.normal(size=labels.size)).astype(
        np.float32
    )
    power = ((x @ w.T) ** 2).sum(axis=1)
    tokens = Tokens(x**2, power.astype(np.float64), np.repeat([1 / 16, 0.3 / 4], [16, 4]))
    rows, share = sampled_rows(w)
    return Operand(labels, tokens, (w**2).sum(axis=0), rows, share, np.abs(x).max(axis=0) if static else None)


@pytest.mark.parametrize("static", [False, True])
def test_steps_descend_along_the_numerical_gradient(static: bool) -> None:
    operand, free = _operand(1, static=static), np.ones(12, np.bool_)
    start = np.exp(np.random.default_rng(2).normal(size=12) * 0.3)
    numerical = np.empty(12)
    for channel in range(12):
        up, down = start.copy(), start.copy()
        up[channel] *= np.exp(1e-3)
        down[channel] *= np.exp(-1e-3)
        numerical[channel] = expected_error(up, [operand]) - expected_error(down, [operand])
    # the first step of Adam is the sign of the gradient, at the full rate
    moved = np.log(refine(start, [operand], free, 1) / start)
    steep = np.abs(numerical) > 2e-5
    assert steep.sum() >= 6
    np.testing.assert_array_equal(np.sign(moved[steep]), -np.sign(numerical[steep]))


@pytest.mark.parametrize("static", [False, True])
def test_refinement_lowers_the_expected_error_and_leaves_pinned_channels_alone(static: bool) -> None:
    operands, free = [_operand(seed, static=static) for seed in (3, 4)], np.ones(12, np.bool_)
    free[5] = False
    start = np.ones(12)
    refined = refine(start, operands, free, 80)
    assert refined[5] == 1.0
    assert expected_error(refined, operands) < expected_error(start, operands) - 0.3


@pytest.mark.parametrize("static", [False, True])
def test_the_steps_of_the_built_in_recipe_descend(static: bool) -> None:
    """A rate that is too high for one constant scale, whose step a single column sets, ends above the start."""
    smoothing = Recipe.load("w8a8").settings.smoothing
    assert isinstance(smoothing, SmoothSpec)
    for seed in range(20):
        random = np.random.default_rng(seed)
        x = (random.standard_t(3, (64, 96)) * np.exp(random.normal(size=96))).astype(np.float32)
        w = random.standard_normal((128, 96), np.float32)
        power = np.square(x @ w.T, dtype=np.float64).sum(axis=1)
        rows, share = sampled_rows(w)
        operand = Operand(
            np.arange(96, dtype=np.int32),
            Tokens(x**2, power, np.full(64, 1 / 64)),
            (w**2).sum(axis=0),
            rows,
            share,
            np.abs(x).max(axis=0) if static else None,
        )
        start = np.sqrt(np.abs(x).max(axis=0).astype(np.float64) / np.abs(w).max(axis=0))
        refined = refine(start, [operand], np.ones(96, np.bool_), smoothing.refine_steps)
        assert expected_error(refined, [operand]) < expected_error(start, [operand])


def test_tokens_that_lose_next_to_nothing_count_a_finite_error() -> None:
    operand = _operand(5)
    tokens = replace(operand.tokens, squares=operand.tokens.squares * np.float32(1e-38))
    assert np.isfinite(expected_error(np.ones(12), [replace(operand, tokens=tokens)]))


def test_the_model_predicts_the_measured_error() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 96)).astype(np.float32)
    w = random.normal(size=(256, 96)).astype(np.float32)
    t = np.abs(x).max(axis=1, keepdims=True) / 127
    s = np.abs(w).max(axis=1, keepdims=True) / 127
    y, quantized = x @ w.T, (np.rint(x / t) * t) @ (np.rint(w / s) * s).T
    measured = np.log(((y - quantized) ** 2).sum(axis=1) / (y**2).sum(axis=1)).mean()
    rows, share = sampled_rows(w)
    tokens = Tokens(x**2, (y**2).sum(axis=1, dtype=np.float64), np.full(64, 1 / 64))
    operand = Operand(np.arange(96, dtype=np.int32), tokens, (w**2).sum(axis=0), rows, share, None)
    assert expected_error(np.ones(96), [operand]) == pytest.approx(measured, abs=0.1)


def test_sampled_rows_are_all_positions_of_the_heads() -> None:
    """Every 32nd of 8192 rows would be four positions of each head of 128."""
    rows = sample(8192, 256)
    assert len(set((rows % 128).tolist())) > 90
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, sample(8192, 256))
    assert sample(5, 8).tolist() == [0, 1, 2, 3, 4]
    squares, share = sampled_rows(np.full((768, 3), -2, np.float32))
    assert (squares.shape, share) == ((192, 3), 4.0)
    assert (squares == 4).all()
