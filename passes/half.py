"""bfloat16 to float16 by moving bits: an exponent of 8 bits to one of 5, and a mantissa of 7 bits to one of 10."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIGN, _MAGNITUDE = np.uint16(0x8000), np.uint16(0x7FFF)
_BIAS = np.uint16((127 - 15) << 7)
"""What the exponents of equal numbers differ by, in bfloat16's bits."""

_FIRST_NORMAL = np.uint16((127 - 14) << 7)
"""2⁻¹⁴: below, float16 has fewer bits than bfloat16."""

_TOO_LARGE = np.uint16((127 + 16) << 7)
"""2¹⁶: from here on, float16 has infinity alone."""


def half_of(values: NDArray[Any]) -> NDArray[np.float16] | None:
    """bfloat16 values as float16, rounded to nearest even where they are below 2⁻¹⁴ and exact from there on.

    None if one is infinity in float16, or not finite.
    """
    bits = np.ascontiguousarray(values).view(np.uint16)
    magnitude = bits & _MAGNITUDE
    if magnitude.max(initial=0) >= _TOO_LARGE:
        return None
    small = np.flatnonzero(magnitude < _FIRST_NORMAL)
    result = magnitude
    result -= _BIAS
    result <<= 3
    result |= bits & _SIGN
    half = result.view(np.float16)
    half.reshape(-1)[small] = values.reshape(-1)[small].astype(np.float16)
    return half
