"""Bases of the residual stream: quiet and loud directions, and walls along them."""

import numpy as np
import pytest

from bismooth.passes.rotation import (
    Double,
    Float,
    Traffic,
    loud_directions,
    make_rotation,
    quiet_direction,
    second_moment,
    wall_heights,
)

D, T = 48, 400


def normal(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unit(seed: int) -> Double:
    v = normal(D, seed=seed).astype(np.float64)
    return v / np.linalg.norm(v)


def stream(loud: Double, silent: Double) -> Float:
    """Rows with a large part along ``loud`` and none along ``silent``."""
    rows = normal(T, D) + 20 * np.outer(1 + 0.1 * normal(T, seed=9), loud)
    return (rows - np.outer(rows @ silent, silent)).astype(np.float32)


def moment(rows: Float) -> Float:
    return second_moment(rows, 1e-5)


def test_second_moments_are_of_rows_of_unit_mean_square() -> None:
    rows = normal(T, D) * np.exp(normal(T, 1))
    assert np.trace(moment(rows)) == pytest.approx(D, rel=1e-3)
    np.testing.assert_allclose(second_moment(np.ones((3, D), np.float32), 3.0), np.full((D, D), 0.25), rtol=1e-6)


def test_the_quiet_direction_is_the_silent_one() -> None:
    loud, silent = unit(1), unit(2)
    traffic = [Traffic(moment(stream(loud, silent)), np.eye(D, dtype=np.float32)) for _ in range(2)]
    assert abs(quiet_direction(traffic) @ silent) == pytest.approx(1, abs=1e-5)


def test_the_quiet_direction_is_one_that_the_linears_do_not_use() -> None:
    """Twice as loud as any other one, and yet the one that matters least."""
    unused = unit(3)
    rows = normal(T, D) + np.outer(2 * normal(T, seed=8), unused).astype(np.float32)
    weight = normal(64, D, seed=4)
    weight -= np.outer(weight @ unused, unused).astype(np.float32)
    assert abs(quiet_direction([Traffic(moment(rows), weight.T @ weight)]) @ unused) == pytest.approx(1, abs=1e-3)


def test_loud_directions_leave_the_quiet_one_out() -> None:
    loud, silent = unit(1), unit(2)
    found = loud_directions([Traffic(moment(stream(loud, silent)), np.eye(D, dtype=np.float32))], silent, 3)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(found.T @ silent, 0, atol=1e-6)
    assert abs(found[:, 0] @ (loud - (loud @ silent) * silent)) > 0.95


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_a_basis_is_orthogonal_and_spreads_the_quiet_direction(count: int) -> None:
    span = np.linalg.qr(normal(D, count).astype(np.float64))[0]
    rotation = make_rotation(span[:, 0], span[:, 1:], np.random.default_rng(5))
    np.testing.assert_allclose(rotation.basis.T @ rotation.basis, np.eye(D), atol=1e-5)
    assert len(set(rotation.channels)) == count
    np.testing.assert_allclose(rotation.quiet @ rotation.basis, rotation.wall, atol=1e-6)
    np.testing.assert_allclose(rotation.wall[list(rotation.channels)], count**-0.5, rtol=1e-6)
    np.testing.assert_allclose(rotation.quiet @ rotation.silenced, 0, atol=1e-6)
    inside = rotation.basis[:, list(rotation.channels)]
    np.testing.assert_allclose(inside @ (inside.T @ span), span, atol=1e-5)


def test_walls_meet_outliers_and_change_nothing() -> None:
    loud, silent = unit(1), unit(2)
    rows, weight = stream(loud, silent), normal(64, D, seed=4)
    traffic = [Traffic(moment(rows), weight.T @ weight)]
    quiet = quiet_direction(traffic)
    rotation = make_rotation(quiet, loud_directions(traffic, quiet, 3), np.random.default_rng(0))
    heights = wall_heights(weight, 4, 30.0, np.random.default_rng(1))
    x, turned = rows @ rotation.silenced, weight @ rotation.basis + np.outer(heights, rotation.wall)
    exact = rows @ weight.T
    assert np.linalg.norm(x @ turned.T - exact) < 1e-4 * np.linalg.norm(exact)
    walls = np.isin(np.arange(D), rotation.channels)
    columns, peaks = np.abs(turned).max(axis=0), np.abs(x).max(axis=0)
    assert columns[walls].min() > 15 * columns[~walls].max()
    assert peaks[walls].min() > 2 * peaks[~walls].max()
    products = columns * peaks
    assert products[walls].min() > 30 * products[~walls].max(), "what a scale per channel does not change"


def test_walls_are_as_much_larger_as_asked() -> None:
    weight = normal(4000, D) * np.exp(normal(4000, 1))
    heights = wall_heights(weight, 4, 30.0, np.random.default_rng(1)) / 2
    ratio = heights / np.sqrt((weight**2).mean(axis=1))
    assert ratio.std() == pytest.approx(30, rel=0.05)
    assert abs(ratio.mean()) < 2
