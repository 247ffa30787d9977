"""Rounding to 16 bits: nearest even, and what does not fit."""

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bismooth.export.errors import BismoothError
from bismooth.passes.precision import narrow, narrow_pieces

F2, BF = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def test_narrow_rounds_to_nearest_even() -> None:
    rounded = narrow(np.array([1 + 2**-11, 1 + 3 * 2**-11, 65519], np.float32), F2, "w")
    assert rounded.tolist() == [1, 1 + 2**-9, 65504]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_narrow_is_numpy_or_an_error(value: float) -> None:
    if abs(value) < 65520:
        assert narrow(np.array([value], np.float32), F2, "w")[0] == np.float16(value)
    else:
        with pytest.raises(BismoothError, match="does not fit into float16"):
            narrow(np.array([value], np.float32), F2, "w")


@pytest.mark.parametrize(("value", "dtype"), [(65520, F2), (3.4e38, BF)])
def test_narrow_refuses_overflow(value: float, dtype: np.dtype[np.generic]) -> None:
    with pytest.raises(
        BismoothError, match=r"^head\.weight: does not fit into .*Compute in bfloat16 or float32 instead\.$"
    ):
        narrow(np.array([0, value], np.float32), dtype, "head.weight")


def test_narrow_refuses_nan() -> None:
    with pytest.raises(
        BismoothError, match=r"^w: the tensor is damaged\. Expected finite values, got NaN or infinity\."
    ):
        narrow(np.array([np.nan], np.float32), F2, "w")


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("dtype", [F2, BF])
def test_a_tensor_in_pieces_is_narrowed_like_the_whole(dtype: np.dtype[Any], size: int) -> None:
    values = np.random.default_rng(0).standard_normal(30).astype(np.float32)

    def pieces() -> list[Any]:
        return [values[start : start + size] for start in range(0, 30, size)]

    whole = narrow(values, dtype, "w")
    np.testing.assert_array_equal(np.concatenate(list(narrow_pieces(pieces(), dtype, "w"))), whole, strict=True)
    for changes in ({5: 3.39e38, 20: -3.4e38, 29: 3.395e38}, {5: 3.4e38, 29: np.nan}, {0: np.inf}):
        for place, value in changes.items():
            values[place] = value
        with pytest.raises(BismoothError) as expected:
            narrow(values, dtype, "w")
        with pytest.raises(BismoothError, match=f"^{re.escape(str(expected.value))}$"):
            list(narrow_pieces(pieces(), dtype, "w"))
