"""The output error of the linears behind a site, measured on token rows with weights and activations quantized."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .fold import Factor
from .groups import fake_quantize, fake_quantize_static
from .quantizers import static_scale
from .refine import Operand, Tokens, sampled_rows
from .spec import DynamicActivation, LinearSpec, StaticActivation
from .static_ranges import Limit, limits

Float = NDArray[np.float32]

GROUP_WEIGHTS = (1.0, 0.3)
"""Weight of the sampled tokens, and of those with the largest activations. The latter are few, and a plain sample
misses them, but attention to them carries their error to all tokens."""


@dataclass(frozen=True, eq=False)
class Consumer:
    """Linears behind a site that read one tensor and are quantized alike, and what that tensor was seen to be.

    Their weights count as one W, with the rows of all of them.

    Attributes:
        labels: int32 [K], which channel of the site each input column reads, −1 for none.
        spec: How each of them is quantized.
        weight: Sampled rows of W, float32 [R, K].
        row_share: How many rows of W each sampled row stands for.
        column_peaks: maxₙ|W[n,k]| over all rows, [K].
        column_power: Σₙ W[n,k]² over all rows, [K].
        absmax: maxₜ|x[t,k]|, [K].
        limit: The range that a static scale will have, see :meth:`.static_ranges.Ranges.limit`.
        tokens: Sampled tokens, and then those with the largest activations, float32 [T, K].
        sampled: How many tokens are sampled.
    """

    labels: NDArray[np.int32]
    spec: LinearSpec
    weight: Float
    row_share: float
    column_peaks: Float
    column_power: Float
    absmax: Float
    limit: Limit
    tokens: Float
    sampled: int

    def spread(self, s: Factor) -> Float:
        """s per input column, float32 [K]."""
        return np.where(self.labels < 0, 1.0, s[self.labels]).astype(np.float32)

    def quantized(self, columns: Float, out: Float) -> Float:
        """X / s as its quantizer leaves it, in ``out``; ``columns`` is s per input column."""
        activations = self.spec.activations
        x = np.divide(self.tokens, columns, out=out)
        if activations is None:
            return x
        groups, k = self.spec.groups, x.shape[1]
        if isinstance(activations, StaticActivation):
            ranges = limits(self.limit, activations, None if (columns == 1).all() else columns, groups, k)
            return fake_quantize_static(x, [static_scale(limit) for limit in ranges], groups)
        return fake_quantize(x, groups, out=x)


class OutputError:
    """Measures factors for the linears behind one site."""

    def __init__(self, consumers: Sequence[Consumer]) -> None:
        self._consumers = [_Measured.of(consumer) for consumer in consumers]
        power = np.sum([measured.power for measured in self._consumers], axis=0)
        weights = token_weights(power, consumers[0].sampled)
        self._seen = np.flatnonzero(weights)
        self._weights, self._power = weights[self._seen], power[self._seen]

    def of(self, s: Factor) -> float:
        """Mean over tokens of log(‖y − ŷ‖² / ‖y‖²), y being the outputs of all linears side by side.

        Each W counts by all its rows, not by those sampled. Tokens count by ``token_weights``; the logarithm keeps
        single ones from deciding for all others.
        """
        lost = np.sum([measured.lost(s) for measured in self._consumers], axis=0)[self._seen]
        return float(self._weights @ np.log(np.maximum(lost / self._power, 1e-30)))

    def operands(self) -> list[Operand] | None:
        """What the refinement needs of the linears; None if one has a scale per group: there is no formula for that."""
        if any(measured.consumer.spec.groups is not None for measured in self._consumers):
            return None
        return [_operand(measured) for measured in self._consumers]


@dataclass(frozen=True, eq=False)
class _Measured:
    """A consumer, its outputs y [T, R] and ‖y‖² [T] of all rows of W, and room for X / s, W · s and ŷ − y."""

    consumer: Consumer
    outputs: Float
    power: NDArray[np.float64]
    room: tuple[Float, Float, Float]

    @staticmethod
    def of(consumer: Consumer) -> "_Measured":
        y = consumer.tokens @ consumer.weight.T
        power = consumer.row_share * np.einsum("tn,tn->t", y, y).astype(np.float64)
        room = (np.empty_like(consumer.tokens), np.empty_like(consumer.weight), np.empty_like(y))
        return _Measured(consumer, y, power, room)

    def lost(self, s: Factor) -> NDArray[np.float64]:
        """‖y − ŷ‖² of each token, over all rows of W: [T]."""
        consumer, (x, weight, difference) = self.consumer, self.room
        columns = consumer.spread(s)
        np.multiply(consumer.weight, columns, out=weight)
        fake_quantize(weight, consumer.spec.groups, out=weight)
        np.matmul(consumer.quantized(columns, x), weight.T, out=difference)
        difference -= self.outputs
        return consumer.row_share * np.einsum("tn,tn->t", difference, difference).astype(np.float64)


def token_weights(power: NDArray[np.float64], sampled: int) -> NDArray[np.float64]:
    """How much each token counts, [T], 1 in sum: those of a group alike, groups by ``GROUP_WEIGHTS``.

    Args:
        power: ‖y‖² of each token; those without outputs count nothing.
        sampled: How many tokens the first group has.
    """
    seen = power > 0
    weights = np.zeros(len(power))
    for weight, group in zip(GROUP_WEIGHTS, (slice(sampled), slice(sampled, None)), strict=True):
        if count := np.count_nonzero(seen[group]):
            weights[group] = seen[group] * (weight / count)
    return weights / (weights.sum() or 1.0)


def relative(error: float) -> float:
    """A mean logarithm as the relative error ‖y − ŷ‖ / ‖y‖."""
    return float(np.exp(error / 2))


def _operand(measured: _Measured) -> Operand:
    consumer = measured.consumer
    weights = token_weights(measured.power, consumer.sampled)
    seen = weights > 0
    chosen = consumer.tokens[seen]  # a copy
    tokens = Tokens(np.square(chosen, out=chosen), measured.power[seen], weights[seen])
    rows, share = sampled_rows(consumer.weight)
    return Operand(consumer.labels, tokens, consumer.column_power, rows, share * consumer.row_share, _peaks(consumer))


def _peaks(consumer: Consumer) -> Float | None:
    """What sets the step of the activation, as :class:`Operand` wants it."""
    match consumer.spec.activations:
        case DynamicActivation():
            return None
        case StaticActivation():
            return consumer.absmax
        case None:
            return np.zeros_like(consumer.absmax)
