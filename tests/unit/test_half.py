"""bfloat16 to float16, against the definition, for every bfloat16 number that there is."""

import ml_dtypes
import numpy as np
import pytest

from bismooth.passes.half import half_of

EVERY = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
EXACT = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)  # what bfloat16 is the upper half of
FITTING = np.abs(EXACT) < 65520  # not NaN; from here on the nearest float16 is infinity


def test_every_number_that_fits_is_rounded_to_nearest_even() -> None:
    values = EVERY[FITTING]
    got = half_of(values)
    assert got is not None
    expected = EXACT[FITTING].astype(np.float16)
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))  # signs of zeros too
    assert values.size > 1 << 15


def test_every_other_number_is_told() -> None:
    assert all(half_of(np.append(EVERY[:3], value)) is None for value in EVERY[~FITTING])


@pytest.mark.parametrize("shape", [(0,), (3, 5), (5, 3)])
def test_shapes_are_kept(shape: tuple[int, ...]) -> None:
    values = np.linspace(-1, 1, 15)[: np.prod(shape)].reshape(shape).astype(ml_dtypes.bfloat16)
    values = values.T if shape == (5, 3) else values
    got = half_of(values)
    assert got is not None
    np.testing.assert_array_equal(got, values.astype(np.float16))
