"""Walls in the weights: planted ones are found exactly, uneven healthy matrices have none."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.passes.walls import find_walls

Float = NDArray[np.float32]
C = 512
LABELS = np.arange(C, dtype=np.int32)
FREE = np.ones(C, np.bool_)


Weights = Sequence[tuple[Float, NDArray[np.int32]]]


def _find(weights: Weights, free: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weights come in three blocks of rows."""
    return find_walls([(partial(np.array_split, weight, 3), labels) for weight, labels in weights], free)


def _planted(seed: int, factor: float, count: int) -> tuple[Weights, NDArray[np.intp]]:
    """Three linears that read the same channels, some of which are ``factor`` times too large in all of them."""
    random = np.random.default_rng(seed)
    columns = np.exp(0.3 * random.standard_normal(C)).astype(np.float32)
    walls = np.sort(random.choice(C, count, replace=False))
    weights = [
        random.standard_normal((n, C), np.float32) * columns * scale for n, scale in ((256, 1), (64, 3), (64, 1))
    ]
    columns[walls] = np.median(columns)
    for weight in weights:
        weight[:, walls] = random.standard_normal((len(weight), count)) * np.median(columns) * factor
    return [(weight, LABELS) for weight in weights], walls


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("factor", [40, 100, 300])
def test_planted_walls_are_found_exactly_and_brought_to_the_level_of_the_others(
    seed: int, factor: float, count: int
) -> None:
    weights, walls = _planted(seed, factor, count)
    s = _find(weights, FREE)
    np.testing.assert_array_equal(np.flatnonzero(s != 1), walls)
    peaks = np.max([np.abs(weight * s).max(axis=0) for weight, _ in weights], axis=0)
    np.testing.assert_allclose(peaks[walls], np.median(np.delete(peaks, walls)), rtol=1e-5)


def test_walls_of_different_height_are_found_together() -> None:
    weights, _ = _planted(0, 1, 1)
    for weight, _labels in weights:
        weight[:, [3, 77, 500]] = np.random.default_rng(1).standard_normal((len(weight), 3)) * [40, 120, 300]
    assert np.flatnonzero(_find(weights, FREE) != 1).tolist() == [3, 77, 500]


def _healthy(kind: str, random: np.random.Generator) -> Float:
    shape = (256, C)
    if kind == "normal":
        return random.standard_normal(shape, np.float32)
    if kind.startswith("student"):
        return random.standard_t(float(kind.split()[1]), shape).astype(np.float32)
    ratio = float(kind.split()[1])
    columns = np.exp(random.standard_normal(C))
    spread = np.log(ratio) / np.log(columns.max() / np.median(columns))
    return random.standard_normal(shape, np.float32) * (columns**spread).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["normal", "student 2", "student 3", "student 5", "log-normal 6", "log-normal 12"])
def test_healthy_matrices_have_none(kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = [(_healthy(kind, random), LABELS) for _ in range(2)]
    assert (_find(weights, FREE) == 1).all()


def test_a_single_column_twelve_times_as_large_is_none() -> None:
    weight = np.random.default_rng(0).standard_normal((256, C), np.float32)
    weight[:, 9] *= 12
    assert (_find([(weight, LABELS)], FREE) == 1).all()


def test_single_huge_weights_are_none() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((256, C), np.float32)
    weight[random.choice(256, 20), random.choice(C, 20)] = 1e4
    assert (_find([(weight, LABELS)], FREE) == 1).all()


def test_an_uneven_matrix_has_none() -> None:
    """A quarter of the columns is large: these are no exceptions."""
    weight = np.random.default_rng(0).standard_normal((256, C), np.float32)
    weight[:, ::4] *= 100
    assert (_find([(weight, LABELS)], FREE) == 1).all()


def test_pinned_channels_and_columns_without_a_channel_are_left_alone() -> None:
    weights, walls = _planted(2, 100, 4)
    free = FREE.copy()
    free[walls[0]] = False
    s = _find(weights, free)
    assert s[walls[0]] == 1
    unlabelled = LABELS.copy()
    unlabelled[walls] = -1
    assert (_find([(weight, unlabelled) for weight, _ in weights], FREE) == 1).all()


def test_a_channel_that_several_columns_read_is_one_wall() -> None:
    """Grouped-query attention: channel c arrives at columns c and c + C."""
    random = np.random.default_rng(3)
    weight = random.standard_normal((256, 2 * C), np.float32)
    weight[:, [5, 5 + C]] *= 80
    s = _find([(weight, np.concatenate([LABELS, LABELS]))], FREE)
    assert np.flatnonzero(s != 1).tolist() == [5]


def test_a_weight_of_zeros_has_none() -> None:
    assert (_find([(np.zeros((4, 8), np.float32), np.arange(8, dtype=np.int32))], np.ones(8, np.bool_)) == 1).all()
