"""Rounding weights and tokens to INT8."""

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.export.errors import BismoothError
from bismooth.passes.weights import (
    SCALE_FLOOR,
    QuantizedWeight,
    fake_quantize_rows,
    fake_quantize_with,
    quantize_weight,
    row_chunks,
    weight_error,
    weight_scale,
)

Float = NDArray[np.float32]
HALF, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def _weight(n: int = 24, k: int = 40, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal((n, k), np.float32)


def _error(result: QuantizedWeight) -> float:
    return weight_error(result.lost, result.power)


def _exact(weight: Float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    scale = np.abs(weight.astype(np.float64)).max(axis=1) / 127
    return np.rint(weight / scale[:, None]), scale


def test_values_and_scales_are_those_of_the_definition() -> None:
    weight = _weight()
    result, (values, scale) = quantize_weight(weight, "w"), _exact(weight)
    np.testing.assert_array_equal(result.values, values)
    np.testing.assert_allclose(result.scale, scale, rtol=1e-7)
    lost = np.linalg.norm(weight - values * scale[:, None]) / np.linalg.norm(weight.astype(np.float64))
    assert _error(result) == pytest.approx(lost, rel=1e-5)
    assert np.abs(result.values.astype(int)).max(axis=1).tolist() == [127] * 24


def test_the_most_negative_weight_sets_the_scale_too() -> None:
    result = quantize_weight(np.array([[-2.0, 1.0]], np.float32), "w")
    assert result.values.tolist() == [[-127, 64]]


def test_a_row_of_zeros_has_a_positive_scale_and_no_error() -> None:
    weight = _weight()
    weight[3] = 0
    result = quantize_weight(weight, "w")
    assert result.scale[3] == np.float32(SCALE_FLOOR)
    assert not result.values[3].any()
    assert _error(quantize_weight(np.zeros((2, 3), np.float32), "w")) == 0


@pytest.mark.parametrize("magnitude", [1e-25, 1e-12, 1.0, 1e12, 1e30])
def test_rows_of_any_magnitude_keep_their_resolution(magnitude: float) -> None:
    weight = _weight(n=4)
    weight[1] *= np.float32(magnitude)
    values, _ = _exact(weight)
    np.testing.assert_array_equal(quantize_weight(weight, "w").values, values)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", [None, 16])
def test_what_is_not_finite_is_named_with_its_row(broken: float, group: int | None) -> None:
    weight = _weight()
    weight[7, 39] = broken
    with pytest.raises(
        BismoothError, match=r"^fc\.weight: the weight holds NaN or infinity in row 7\. Expected finite"
    ):
        quantize_weight(weight, "fc.weight", group=group)


@pytest.mark.parametrize("storage", [HALF, BF16])
def test_a_stored_scale_keeps_its_precision_and_clips_nothing(storage: np.dtype[np.generic]) -> None:
    weight = _weight(n=200)
    weight[:3] *= np.array([[1e-6], [0], [1e3]], np.float32)
    result = quantize_weight(weight, "w", storage=storage)
    np.testing.assert_array_equal(result.scale, result.scale.astype(storage).astype(np.float32))
    smallest = 2.0**-16 if storage == HALF else 2.0**-128
    assert (result.scale >= smallest).all()
    assert (np.abs(weight).max(axis=1) <= 127 * result.scale * (1 + 1e-6)).all()
    fitting = weight_scale(weight) > smallest
    ulp = 2.0**-10 if storage == HALF else 2.0**-7
    assert (result.scale[fitting] <= weight_scale(weight)[fitting] * (1 + ulp)).all()
    assert _error(result) < 1.1 * _error(quantize_weight(weight, "w"))


def test_a_row_of_small_weights_keeps_its_levels_in_float16() -> None:
    """max|W| / 127 = 1.57e-5 is no normal float16."""
    weight = _weight(n=1, k=4000)
    weight *= np.float32(0.002) / np.abs(weight).max()
    stored, exact = quantize_weight(weight, "w", storage=HALF), quantize_weight(weight, "w")
    assert 2**-16 < stored.scale[0] < 2**-14
    assert exact.scale[0] <= stored.scale[0] <= exact.scale[0] * (1 + 2**-8)
    assert _error(stored) <= _error(exact) * (1 + 2**-7)
    assert np.abs(stored.values.astype(int)).max() == 127


def test_a_scale_that_overflows_its_type_is_an_error() -> None:
    weight = _weight()
    weight[0, 0] = 1e8
    with pytest.raises(
        BismoothError, match=r"^w: the scale of its largest row does not fit into float16\. Expected .*"
    ):
        quantize_weight(weight, "w", storage=HALF)
    assert quantize_weight(weight, "w", storage=BF16).values[0, 0] > 0


@pytest.mark.parametrize("k", [32, 40])
def test_groups_have_scales_of_their_own_and_zeros_at_the_end(k: int) -> None:
    weight = _weight(k=k)
    result = quantize_weight(weight, "w", group=16)
    count = -(-k // 16)
    assert result.values.shape == (24, count, 16)
    padded = np.pad(weight, ((0, 0), (0, 16 * count - k)))
    for group in range(count):
        values, scale = _exact(padded[:, 16 * group : 16 * group + 16])
        np.testing.assert_array_equal(result.values[:, group], values)
        np.testing.assert_allclose(result.scale[:, group], scale, rtol=1e-7)
    restored = (result.values * result.scale[..., None]).reshape(24, -1)[:, :k]
    assert _error(result) == pytest.approx(np.linalg.norm(weight - restored) / np.linalg.norm(weight), rel=1e-5)
    assert _error(result) < _error(quantize_weight(weight, "w"))


def test_tokens_are_rounded_with_one_scale_per_row_or_group() -> None:
    rows = _weight()
    values, scale = _exact(rows)
    np.testing.assert_allclose(fake_quantize_rows(rows), values * scale[:, None], rtol=1e-6)
    grouped = fake_quantize_rows(rows, 16)
    np.testing.assert_allclose(grouped[:, 16:32], fake_quantize_rows(rows[:, 16:32]), rtol=1e-6)
    np.testing.assert_allclose(grouped[:, 32:], fake_quantize_rows(rows[:, 32:]), rtol=1e-6)
    np.testing.assert_array_equal(fake_quantize_rows(rows, 64), fake_quantize_rows(rows))
    for group in (None, 16):
        expected, place = fake_quantize_rows(rows, group), rows.copy()
        assert fake_quantize_rows(place, group, out=place) is place
        np.testing.assert_array_equal(place, expected)
    assert not fake_quantize_rows(np.zeros((2, 4), np.float32)).any()


def test_a_constant_scale_clips() -> None:
    x = np.array([0.24, 0.26, 100.0, -100.0], np.float32)
    assert fake_quantize_with(x, np.array([0.5], np.float32)).tolist() == [0, 0.5, 63.5, -64]
    assert fake_quantize_with(x, np.array([1, 0.5, 1, 1], np.float32)).tolist() == [0, 0.5, 100, -100]


def test_chunks_cover_all_rows_once() -> None:
    assert [(s.start, s.stop) for s in row_chunks((10, 4), elements=12)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [(s.start, s.stop) for s in row_chunks((2, 100), elements=10)] == [(0, 1), (1, 2)]
