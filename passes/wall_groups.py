"""Linears whose weights break with one scale per output channel, and the groups that their input channels then form.

The paper's remedy (arXiv 2408.15301, section 5) gives such linears, a few per cent of all, scales per group of input
channels. Groups by magnitude do with two what takes many groups along K: the channels that stand out, and the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .diagnosis import scaled_error
from .linears import Linear
from .parallel import ordered_map
from .refine import sample
from .spec import LinearSpec, PerMagnitude
from .walls import AT_RISK, SAMPLED_ROWS, walls_of_rows

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


def find_broken(
    linears: Sequence[Linear],
    blocks: Callable[[Linear], Iterable[Float]],
    on_linear: Callable[[str], None] = lambda _: None,
) -> list[Broken]:
    """The linears that break, as ``diagnose`` finds them, the largest error first.

    Args:
        linears: Those to look at.
        blocks: Reads the weight as it is to be quantized, some rows at a time: float32 [.., K].
        on_linear: Called with the name of each linear that is done.
    """
    found: list[Broken] = []
    for linear, broken in zip(linears, ordered_map(partial(_broken, blocks=blocks), linears), strict=True):
        found += [] if broken is None else [broken]
        on_linear(linear.name)
    return sorted(found, key=lambda item: -item.error)


def _broken(linear: Linear, blocks: Callable[[Linear], Iterable[Float]]) -> Broken | None:
    chosen, start = sample(linear.n, SAMPLED_ROWS), 0
    rows, peaks = np.empty((len(chosen), linear.k), np.float32), np.zeros(linear.k, np.float32)
    for block in blocks(linear):
        inside = slice(*np.searchsorted(chosen, (start, start + len(block))))
        rows[inside] = block[chosen[inside] - start]
        np.maximum(peaks, np.maximum(block.max(axis=0), -block.min(axis=0)), out=peaks)
        start += len(block)
    channels, _ = walls_of_rows(rows, peaks)
    if not channels.size:
        return None
    error = scaled_error(rows, channels.tolist(), np.ones(linear.k, np.float32))
    return Broken(linear.name, error, dict(zip(channels.tolist(), peaks[channels].tolist(), strict=True)))


def group_walls(
    specs: Mapping[str, LinearSpec], linears: Sequence[Linear], broken: Sequence[Broken]
) -> dict[str, LinearSpec]:
    """The specifications with the walls that were found, where groups are formed by magnitude.

    Linears that read one tensor share its groups, and so its quantizers: a channel that stands out in one of them is a
    wall in all.
    """
    walls: dict[tuple[str, int], dict[int, float]] = {}
    found = {item.name: item.walls for item in broken}
    asked = {linear.name: spec for linear in linears if (spec := _by_magnitude(specs[linear.name])) is not None}
    for linear in linears:
        if linear.name in asked:
            common = walls.setdefault((linear.x, asked[linear.name].groups), {})
            for channel, peak in found.get(linear.name, {}).items():
                common[channel] = max(peak, common.get(channel, 0.0))
    result = dict(specs)
    for linear in linears:
        spec, groups = specs[linear.name], asked.get(linear.name)
        if groups is None or not (parted := part(walls[linear.x, groups.groups], groups.groups - 1)):
            continue
        assert spec.weights is not None
        bits = groups.wall_bits if spec.activations else 8  # float activations are not in digits
        weights = replace(spec.weights, granularity=replace(groups, walls=parted, wall_bits=bits))
        result[linear.name] = replace(spec, weights=weights)
    return result


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
