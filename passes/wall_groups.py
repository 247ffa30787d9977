"""Linears whose weights break with one scale per output channel, and the groups that their input channels then form.

The paper's remedy (arXiv 2408.15301, section 5) gives such linears, a few per cent of all, scales per group of input
channels. Groups by magnitude do with two what takes many groups along K: the channels that stand out, and the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from .diagnosis import scaled_error
from .executor import LOCAL, Executor, each
from .linears import Linear
from .spec import LinearSpec, PerChannel, PerGroup, PerMagnitude
from .walls import AT_RISK, walls_of_rows
from .weight_scan import scan

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Broken:
    """A linear whose weight breaks.

    Attributes:
        name: The module's path.
        error: Relative error ‖W − Ŵ‖ / ‖W‖ of its other channels, with one scale per output channel.
        walls: The channels that stand out, and max|W| of each.
    """

    name: str
    error: float
    walls: dict[int, float]


Blocks: TypeAlias = Callable[[Linear, int], Iterable[Float]]
"""Reads the weight of a linear as it is to be quantized, so many elements in whole rows at a time: float32 [.., K]."""


def find_broken(
    linears: Sequence[Linear],
    blocks: Blocks,
    on_linear: Callable[[str], None] = lambda _: None,
    executor: Executor = LOCAL,
) -> list[Broken]:
    """The linears that break, as ``diagnose`` finds them, the largest error first.

    Args:
        linears: Those to look at.
        blocks: Reads their weights.
        on_linear: Called with the name of each linear that is done.
        executor: Does the work.

    Raises:
        BismoothError: a weight holds NaN or infinity.
    """
    found = [broken for _, broken in each(executor, LookForWalls(blocks), linears, on_linear) if broken is not None]
    return sorted(found, key=lambda item: -item.error)


@dataclass(frozen=True, eq=False)
class LookForWalls:
    """The work on one linear: what breaks in its weight, or None."""

    blocks: Blocks

    @property
    def step(self) -> str:
        """Name of the step."""
        return "look for walls"

    def __call__(self, linear: Linear) -> Broken | None:
        """What breaks."""
        return _broken(linear, self.blocks)

    def encode(self, result: Broken | None) -> Any:
        """As JSON values."""
        return None if result is None else asdict(result) | {"walls": list(result.walls.items())}

    def decode(self, plain: Any) -> Broken | None:
        """And back."""
        return None if plain is None else Broken(**plain | {"walls": dict(plain["walls"])})


def _broken(linear: Linear, blocks: Blocks) -> Broken | None:
    seen = scan(replace(linear, layout="NK"), partial(blocks, linear))
    channels, _ = walls_of_rows(seen.rows, seen.peaks)
    if not channels.size:
        return None
    error = scaled_error(seen.rows, channels.tolist(), np.ones(linear.k, np.float32))
    return Broken(linear.name, error, dict(zip(channels.tolist(), seen.peaks[channels].tolist(), strict=True)))


def fitting(specs: Mapping[str, LinearSpec], linears: Sequence[Linear]) -> dict[str, LinearSpec]:
    """The specifications with one scale per row where a group would hold all input channels."""
    result = dict(specs)
    for linear in linears:
        spec = specs[linear.name]
        if spec.weights and isinstance(spec.groups, PerGroup) and spec.groups.size >= linear.k:
            result[linear.name] = replace(spec, weights=replace(spec.weights, granularity=PerChannel()))
    return result


def group_walls(
    specs: Mapping[str, LinearSpec], linears: Sequence[Linear], broken: Sequence[Broken]
) -> dict[str, LinearSpec]:
    """The specifications with the walls that were found, where groups are formed by magnitude.

    Linears that read one tensor share its groups, and so its quantizers: a channel that stands out in one of them is a
    wall in all. Without quantized activations a wall has one digit, as all weights.

    Raises:
        BismoothError: linears that read one tensor ask for different groups.
    """
    peaks = {item.name: item.walls for item in broken}
    asked: dict[str, list[tuple[Linear, PerMagnitude]]] = {}
    for linear in linears:
        if (groups := _by_magnitude(specs[linear.name])) is not None:
            asked.setdefault(linear.x, []).append((linear, groups))
    result = dict(specs)
    for value, readers in asked.items():
        first, groups = readers[0]
        walls: dict[int, float] = {}
        for linear, other in readers:
            if other != groups:
                raise BismoothError(
                    f"{linear.name}: reads the same tensor as {first.name}, with other groups. Expected the same for "
                    f"{value}, got {_words(other)} and {_words(groups)}. Give both the same 'weights'."
                )
            for channel, peak in peaks.get(linear.name, {}).items():
                walls[channel] = max(peak, walls.get(channel, 0.0))
        if not 0 < len(walls) < first.k:
            continue
        parted = part(walls, groups.groups - 1)
        for linear, _ in readers:
            spec = specs[linear.name]
            bits = groups.wall_bits if spec.activations else 8
            assert spec.weights is not None
            weights = replace(spec.weights, granularity=replace(groups, walls=parted, wall_bits=bits))
            result[linear.name] = replace(spec, weights=weights)
    return result


def _words(groups: PerMagnitude) -> str:
    return f"groups: {groups.groups}, wall_bits: {groups.wall_bits}"


def part(walls: Mapping[int, float], most: int) -> tuple[tuple[int, ...], ...]:
    """Walls, with the maximum of each, in up to ``most`` groups: parted where they lie furthest apart.

    And by :data:`.walls.AT_RISK` bits at least, since the higher ones of a group take no less from the lower.
    """
    ranked = sorted(walls, key=lambda channel: (-walls[channel], channel))
    gaps = np.diff(-np.log2([walls[channel] for channel in ranked]))
    widest = np.argsort(-gaps, kind="stable")[: most - 1]
    cuts = sorted(int(place) + 1 for place in widest if gaps[place] >= AT_RISK)
    parts = [ranked[start:end] for start, end in zip([0, *cuts], [*cuts, len(ranked)], strict=True)]
    return tuple(tuple(sorted(channels)) for channels in parts if channels)


def _by_magnitude(spec: LinearSpec) -> PerMagnitude | None:
    granularity = spec.weights.granularity if spec.weights else None
    return granularity if isinstance(granularity, PerMagnitude) else None
