"""Activation quantizers: the nodes that turn x into INT8 and back, one set for all linears that read x alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..export.errors import BismoothError
from ._gs import Dim, Tensor, make_constant, shape_of
from .emit import INT8, INT64, Emitter
from .groups import members
from .spec import ActivationSpec, Groups, PerGroup, PerMagnitude, StaticActivation
from .static_ranges import StaticRanges
from .weights import LOW, QMAX

TINY = float(np.finfo(np.float32).tiny) * QMAX
"""Least row maximum: 127 times the smallest normal float32, so that t is normal as well."""


@dataclass(frozen=True)
class Quantized:
    """A quantized activation.

    Attributes:
        value: Dequantized with the constant scale 1: [.., K], or [G, T, size] in groups.
        scale: The run-time scale t, [.., 1] or [G, T, 1]; None if the scale is a constant.
    """

    value: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class _Part:
    """Channels of an activation that enter one product: all, all in groups along a new axis, or some."""

    name: str
    value: Tensor


class Quantizers:
    """Makes the quantizer of a value when it is first asked for."""

    def __init__(self, emitter: Emitter, ranges: StaticRanges) -> None:
        self._emit = emitter
        self._ranges = ranges
        self._made: dict[tuple[str, bool, Groups | None], list[Quantized]] = {}
        self._parts: dict[tuple[str, str], _Part] = {}

    def of(self, x: Tensor, spec: ActivationSpec, groups: Groups | None) -> list[Quantized]:
        """x as INT8, by what :meth:`parts` makes of it.

        Raises:
            BismoothError: the scale is constant and x has no range.
        """
        static = isinstance(spec, StaticActivation)
        key = (x.name, static, groups)
        if key not in self._made:
            parts = self._integer_parts(x, groups)
            scales = self._static_scales(x, groups) if static else [None] * len(parts)
            made: list[Quantized] = []
            for number, (part, scale) in enumerate(zip(parts, scales, strict=True)):
                two_digits = number > 0 and isinstance(groups, PerMagnitude) and groups.wall_bits == 16
                made += self._digits(part, scale, two_digits=two_digits)
            self._made[key] = made
        return self._made[key]

    def parts(self, x: Tensor, groups: Groups | None) -> list[Tensor]:
        """x [.., K] as float products read it: as it is; [G, T, size] in groups of a size; or x and walls, [.., k]."""
        match groups:
            case None:
                return [x]
            case PerGroup(size):
                return [self._cut(x, size).value]
            case PerMagnitude(walls=walls):
                return [x, *(self._walls(x, number, channels).value for number, channels in enumerate(walls))]

    def _integer_parts(self, x: Tensor, groups: Groups | None) -> list[_Part]:
        """The same, but with zeros in x in the place of the walls, so that these do not set the scale of the others."""
        match groups:
            case None:
                return [_Part(x.name, x)]
            case PerGroup(size):
                return [self._cut(x, size)]
            case PerMagnitude(walls=walls):
                rest = self._without_walls(x, groups)
                return [rest, *(self._walls(x, number, channels) for number, channels in enumerate(walls))]

    def _digits(self, part: _Part, static: Sequence[float] | None, *, two_digits: bool) -> list[Quantized]:
        """x in INT8; with two digits also what that leaves, in 254ths, beside the same first digit."""
        if static is None:
            base, (unit, scale) = f"{part.name}/per_token", self._per_token(part)
        else:
            base, unit, scale = f"{part.name}/per_tensor", self._static(part, static), None
        high = Quantized(self._round(unit, base), scale)
        return [high, Quantized(self._low(unit, base), scale)] if two_digits else [high]

    def _low(self, unit: Tensor, base: str) -> Tensor:
        emit, shape = self._emit, list(shape_of(unit) or ())
        wide: list[Dim] = [*shape[:-1], 2 * int(str(shape[-1]))]
        rounded = emit.node("Round", f"{base}/low/Round", [unit], shape)
        bounds = [emit.constant("least", -QMAX - 1.0), emit.constant("qmax", QMAX)]
        high = emit.node("Clip", f"{base}/low/Clip", [rounded, *bounds], shape)
        left = emit.node("Sub", f"{base}/low/Sub", [unit, high], shape)
        scaled = emit.node("Mul", f"{base}/low/Mul", [left, emit.constant("low", LOW)], shape)
        both = emit.node("Concat", f"{base}/low/Concat", [scaled, unit], wide, axis=-1)
        return self._round(both, f"{base}/low")

    def _per_token(self, part: _Part) -> tuple[Tensor, Tensor]:
        """x / t and t."""
        emit, x, base = self._emit, part.value, f"{part.name}/per_token"
        shape = list(shape_of(x) or ())
        row = [*shape[:-1], 1]
        magnitude = emit.node("Abs", f"{base}/Abs", [x], shape)
        peak = emit.node("ReduceMax", f"{base}/ReduceMax", [magnitude, emit.integers(-1)], row, keepdims=1)
        floored = emit.node("Max", f"{base}/Max", [peak, emit.constant("tiny", TINY)], row)
        scale = emit.node("Div", f"{base}/Div", [floored, emit.constant("qmax", QMAX)], row)
        return emit.node("Div", f"{base}/Div_1", [x, scale], shape), scale

    def _static_scales(self, x: Tensor, groups: Groups | None) -> list[Sequence[float]]:
        """The scales of each part: one, or one for each of the groups along the new axis."""
        limits = self._ranges.get((x.name, groups))
        if limits is None:
            raise BismoothError(
                f"{x.name}: has no range for its static scale. Expected one from calibration, got none. Run 'bismooth "
                "calibrate' on this artifact first."
            )
        scales = [static_scale(limit) for limit in limits]
        return [scales] if isinstance(groups, PerGroup) else [[scale] for scale in scales]

    def _static(self, part: _Part, scales: Sequence[float]) -> Tensor:
        """x / scale."""
        base, inverse = f"{part.name}/per_tensor", 1.0 / np.array(scales)
        stored = inverse[0] if len(inverse) == 1 else inverse[:, None, None]
        constant = make_constant(f"{base}/inverse_scale", stored.astype(np.float32))
        return self._emit.node("Mul", f"{base}/Mul", [part.value, constant], shape_of(part.value) or ())

    def _round(self, unit: Tensor, base: str) -> Tensor:
        emit, shape = self._emit, shape_of(unit) or ()
        one, zero = emit.constant("one", 1.0), emit.constant("zero", 0, INT8)
        quantized = emit.node("QuantizeLinear", f"{base}/QuantizeLinear", [unit, one, zero], shape, dtype=INT8)
        return emit.node("DequantizeLinear", f"{base}/DequantizeLinear", [quantized, one], shape)

    def _cut(self, x: Tensor, size: int) -> _Part:
        """x [.., K] as [G, T, size], the last group filled up with zeros."""

        def make(base: str) -> Tensor:
            emit, shape, part = self._emit, list(shape_of(x) or ()), x
            k, tokens = int(str(shape[-1])), "*".join(str(dim) for dim in shape[:-1])
            count = -(-k // size)
            if missing := count * size - k:
                pads = emit.integers(*[0] * (2 * len(shape) - 1), missing)
                part = emit.node("Pad", f"{base}/Pad", [part, pads], [*shape[:-1], count * size])
            cut: list[Dim] = [tokens, count, size]
            part = emit.node("Reshape", f"{base}/Reshape", [part, emit.integers(-1, count, size)], cut)
            return emit.node("Transpose", f"{base}/Transpose", [part], [count, tokens, size], perm=[1, 0, 2])

        return self._part(x, f"group{size}", make)

    def _without_walls(self, x: Tensor, groups: PerMagnitude) -> _Part:
        def make(base: str) -> Tensor:
            shape = list(shape_of(x) or ())
            kept = np.zeros(int(str(shape[-1])), np.float32)
            kept[members(groups, len(kept))[0]] = 1
            return self._emit.node("Mul", f"{base}/Mul", [x, make_constant(f"{base}/mask", kept)], shape)

        return self._part(x, "rest", make)

    def _walls(self, x: Tensor, number: int, channels: Sequence[int]) -> _Part:
        def make(base: str) -> Tensor:
            chosen = make_constant(f"{base}/channels", np.array(channels, INT64))
            shape: list[Dim] = [*(shape_of(x) or ())[:-1], len(channels)]
            return self._emit.node("Gather", f"{base}/Gather", [x, chosen], shape, axis=-1)

        return self._part(x, walls_name(number), make)

    def _part(self, x: Tensor, name: str, make: Callable[[str], Tensor]) -> _Part:
        """The part of x of this name, made if it is new; ``make`` gets the name that its nodes begin with."""
        if (x.name, name) not in self._parts:
            base = f"{x.name}/{name}"
            self._parts[x.name, name] = _Part(base, make(base))
        return self._parts[x.name, name]


def walls_name(number: int, digit: int = 0) -> str:
    """How the parts of a group of walls are named."""
    return f"walls{f'_{number}' if number else ''}{'_low' if digit else ''}"


def static_scale(limit: float) -> float:
    """The scale that maps a range of ±``limit`` to ±127."""
    return max(limit, TINY) / QMAX
