"""Static ranges: max|x| that a constant activation scale maps to 127, after smoothing, per group of channels."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from .fold import Factors
from .groups import members
from .linears import Linear
from .sites import Site
from .spec import Groups, LinearSpec, StaticActivation

Float = NDArray[np.float32]

StaticRanges: TypeAlias = Mapping[tuple[str, Groups | None], Sequence[float]]
"""The ranges ±limit of a value, one for each of its groups, by the value's name and how it is grouped."""

Limit: TypeAlias = Callable[[StaticActivation, Float | None, "NDArray[np.intp] | None"], float]
"""The range of a value: see :meth:`Ranges.limit`."""


class Ranges(Protocol):
    """What calibration knows of the ranges of activations."""

    def limit(
        self, value: str, activation: StaticActivation, divisor: Float | None, channels: NDArray[np.intp] | None = None
    ) -> float:
        """The range ±limit for a static scale of some ``channels`` of a value (None: all).

        All channels of the value were divided by ``divisor`` [K].
        """
        ...


def static_ranges(
    linears: Sequence[Linear],
    specs: Mapping[str, LinearSpec],
    sites: Sequence[Site],
    factors: Factors,
    calibration: Ranges | None,
) -> dict[tuple[str, Groups | None], list[float]]:
    """The ranges of the values that statically quantized linears read.

    Raises:
        BismoothError: there is no calibration, or two linears want different ranges of the same value.
    """
    divisors = _divisors(sites, factors)
    ranges: dict[tuple[str, Groups | None], list[float]] = {}
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
        groups = specs[linear.name].groups
        if (linear.x, groups) not in ranges:
            limit = partial(calibration.limit, linear.x)
            ranges[linear.x, groups] = limits(limit, activation, divisors.get(linear.name), groups, linear.k)
    return ranges


def limits(
    limit: Limit, activation: StaticActivation, divisor: Float | None, groups: Groups | None, k: int
) -> list[float]:
    """The range of each group of K channels."""
    parts = [None] if groups is None else members(groups, k)
    return [limit(activation, divisor, channels) for channels in parts]


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
