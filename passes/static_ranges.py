"""Static ranges: max|x| that a constant activation scale maps to 127, after smoothing."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from .fold import Factors
from .linears import Linear
from .sites import Site
from .spec import LinearSpec, StaticActivation

Float = NDArray[np.float32]


class Ranges(Protocol):
    """What calibration knows of the ranges of activations."""

    def limit(self, value: str, activation: StaticActivation, divisor: Float | None) -> float:
        """The range ±limit of a value for a static scale, after its channels were divided by ``divisor`` [K]."""
        ...


def static_ranges(
    linears: Sequence[Linear],
    specs: Mapping[str, LinearSpec],
    sites: Sequence[Site],
    factors: Factors,
    calibration: Ranges | None,
) -> dict[str, float]:
    """Ranges by value name, for the values that statically quantized linears read.

    Raises:
        BismoothError: there is no calibration, or two linears want different ranges of the same value.
    """
    divisors = _divisors(sites, factors)
    ranges: dict[str, float] = {}
    first: dict[str, tuple[Linear, StaticActivation]] = {}
    for linear in linears:
        activation = specs[linear.name].activations
        if not isinstance(activation, StaticActivation):
            continue
        if calibration is None:
            raise BismoothError(
                f"{linear.name}: its recipe has a static activation scale, which comes from calibration. Expected "
                "statistics, got none. Run 'bismooth calibrate' first, or choose a recipe with per-token activations."
            )
        other, chosen = first.setdefault(linear.x, (linear, activation))
        if chosen != activation:
            raise BismoothError(
                f"{linear.name}: reads the same tensor as {other.name}, with another range. Expected one range for "
                f"{linear.x}, got {activation.method} and {chosen.method}. Give both the same 'activations'."
            )
        if linear.x not in ranges:
            ranges[linear.x] = calibration.limit(linear.x, activation, divisors.get(linear.name))
    return ranges


def _divisors(sites: Sequence[Site], factors: Factors) -> dict[str, Float]:
    """By linear name, what its input channels were divided by."""
    divisors: dict[str, Float] = {}
    for site in sites:
        if site.name not in factors:
            continue
        for consumer in site.consumers:
            s = np.where(consumer.labels < 0, 1.0, factors[site.name][consumer.labels]).astype(np.float32)
            divisors[consumer.linear] = divisors.get(consumer.linear, np.float32(1)) * s
    return divisors
