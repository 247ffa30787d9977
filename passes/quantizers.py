"""Activation quantizers: the nodes that turn x into INT8 and back, one set for all linears that read x alike."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..export.errors import BismoothError
from ._gs import Dim, Tensor, make_constant, shape_of
from .emit import INT8, Emitter
from .spec import ActivationSpec, StaticActivation
from .weights import QMAX

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


class Quantizers:
    """Makes the quantizer of a value when it is first asked for."""

    def __init__(self, emitter: Emitter, ranges: Mapping[str, float]) -> None:
        self._emit = emitter
        self._ranges = ranges
        self._made: dict[tuple[str, bool, int | None], Quantized] = {}
        self._groups: dict[tuple[str, int], Tensor] = {}

    def of(self, x: Tensor, spec: ActivationSpec, group: int | None) -> Quantized:
        """x as INT8.

        Args:
            x: float32 [.., K].
            spec: One scale per token, or a constant one.
            group: Cut x into groups of so many channels first.

        Raises:
            BismoothError: the scale is constant and x has no range.
        """
        static = isinstance(spec, StaticActivation)
        key = (x.name, static, group)
        if key not in self._made:
            base = f"{x.name}/per_tensor" if static else f"{x.name}/per_token"
            if group is not None:
                x, base = self._grouped(x, group), f"{base}_group{group}"
            self._made[key] = self._static(x, base, key[0]) if static else self._per_token(x, base)
        return self._made[key]

    def _per_token(self, x: Tensor, base: str) -> Quantized:
        emit, shape = self._emit, list(shape_of(x) or ())
        row = [*shape[:-1], 1]
        magnitude = emit.node("Abs", f"{base}/Abs", [x], shape)
        peak = emit.node("ReduceMax", f"{base}/ReduceMax", [magnitude, emit.integers(-1)], row, keepdims=1)
        floored = emit.node("Max", f"{base}/Max", [peak, emit.constant("tiny", TINY)], row)
        scale = emit.node("Div", f"{base}/Div", [floored, emit.constant("qmax", QMAX)], row)
        unit = emit.node("Div", f"{base}/Div_1", [x, scale], shape)
        return Quantized(self._round(unit, base), scale)

    def _static(self, x: Tensor, base: str, name: str) -> Quantized:
        limit = self._ranges.get(name)
        if limit is None:
            raise BismoothError(
                f"{name}: has no range for its static scale. Expected one from calibration, got none. Run 'bismooth "
                "calibrate' on this artifact first."
            )
        inverse = make_constant(f"{base}/inverse_scale", np.array(1.0 / static_scale(limit), np.float32))
        unit = self._emit.node("Mul", f"{base}/Mul", [x, inverse], shape_of(x) or ())
        return Quantized(self._round(unit, base), None)

    def _round(self, unit: Tensor, base: str) -> Tensor:
        emit, shape = self._emit, shape_of(unit) or ()
        one, zero = emit.constant("one", 1.0), emit.constant("zero", 0, INT8)
        quantized = emit.node("QuantizeLinear", f"{base}/QuantizeLinear", [unit, one, zero], shape, dtype=INT8)
        return emit.node("DequantizeLinear", f"{base}/DequantizeLinear", [quantized, one], shape)

    def _grouped(self, x: Tensor, group: int) -> Tensor:
        """x [.., K] as [G, T, group], the last group filled up with zeros."""
        if (x.name, group) not in self._groups:
            self._groups[x.name, group] = self._cut(x, group)
        return self._groups[x.name, group]

    def _cut(self, x: Tensor, group: int) -> Tensor:
        emit, shape, base = self._emit, list(shape_of(x) or ()), f"{x.name}/group{group}"
        k, tokens = int(str(shape[-1])), "*".join(str(dim) for dim in shape[:-1])
        count = -(-k // group)
        if missing := count * group - k:
            pads = emit.integers(*[0] * (2 * len(shape) - 1), missing)
            x = emit.node("Pad", f"{base}/Pad", [x, pads], [*shape[:-1], count * group])
        cut: list[Dim] = [tokens, count, group]
        x = emit.node("Reshape", f"{base}/Reshape", [x, emit.integers(-1, count, group)], cut)
        return emit.node("Transpose", f"{base}/Transpose", [x], [count, tokens, group], perm=[1, 0, 2])


def static_scale(limit: float) -> float:
    """The scale that maps a range of ±``limit`` to ±127."""
    return max(limit, TINY) / QMAX
