"""The output error of the linears behind a site, measured on token rows with weights and activations quantized."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .fold import Factor
from .quantizers import static_scale
from .refine import Operand, Tokens, sampled_rows
from .spec import LinearSpec, StaticActivation
from .weights import fake_quantize_rows, fake_quantize_tensor

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
        limit: The range ±limit that a static scale will have after division by a factor per column, None for no factor.
        tokens: The groups of tokens that ``GROUP_WEIGHTS`` weighs, float32 [T, K] each.
    """

    labels: NDArray[np.int32]
    spec: LinearSpec
    weight: Float
    row_share: float
    column_peaks: Float
    column_power: Float
    absmax: Float
    limit: Callable[[StaticActivation, Float | None], float]
    tokens: tuple[Float, Float]

    def spread(self, s: Factor) -> Float:
        """s per input column, float32 [K]."""
        return np.where(self.labels < 0, 1.0, s[self.labels]).astype(np.float32)

    def quantized(self, columns: Float) -> Iterator[Float]:
        """Per group of tokens X / s as its quantizer leaves it; ``columns`` is s per input column."""
        activations = self.spec.activations
        static = isinstance(activations, StaticActivation)
        scale = static_scale(self.limit(activations, None if (columns == 1).all() else columns)) if static else 0.0
        for tokens in self.tokens:
            x = tokens / columns
            if static:
                yield fake_quantize_tensor(x, scale)
            else:
                yield x if activations is None else fake_quantize_rows(x, self.spec.group)


class OutputError:
    """Measures factors for the linears behind one site."""

    def __init__(self, consumers: Sequence[Consumer]) -> None:
        self._consumers = consumers
        self._outputs = [[tokens @ c.weight.T for tokens in c.tokens] for c in consumers]
        self._power = [
            [c.row_share * np.einsum("tn,tn->t", y, y) for y in outputs]
            for c, outputs in zip(consumers, self._outputs, strict=True)
        ]

    def of(self, s: Factor) -> float:
        """Mean over tokens of log(‖y − ŷ‖² / ‖y‖²), y being the outputs of all linears side by side.

        Each W counts by all its rows, not by those sampled. A weighted mean of the groups' means; the logarithm keeps
        single tokens from deciding for all others.
        """
        lost = [np.zeros(len(tokens)) for tokens in self._consumers[0].tokens]
        for consumer, outputs in zip(self._consumers, self._outputs, strict=True):
            columns = consumer.spread(s)
            weight = fake_quantize_rows(consumer.weight * columns, consumer.spec.group)
            for group, (x, output) in enumerate(zip(consumer.quantized(columns), outputs, strict=True)):
                difference = x @ weight.T
                difference -= output
                lost[group] += consumer.row_share * np.einsum("tn,tn->t", difference, difference)
        return _mean_of_groups(lost, [np.sum(power, axis=0) for power in zip(*self._power, strict=True)])

    def operands(self) -> list[Operand] | None:
        """What the refinement needs of the linears; None if one has a scale per group: there is no formula for that."""
        if any(consumer.spec.group is not None for consumer in self._consumers):
            return None
        return [_operand(c, power) for c, power in zip(self._consumers, self._power, strict=True)]


def relative(error: float) -> float:
    """A mean logarithm as the relative error ‖y − ŷ‖ / ‖y‖."""
    return float(np.exp(error / 2))


def _mean_of_groups(lost: Sequence[NDArray[np.float64]], total: Sequence[NDArray[np.float64]]) -> float:
    result = weights = 0.0
    for weight, a, b in zip(GROUP_WEIGHTS, lost, total, strict=True):
        if (seen := b > 0).any():
            result += weight * float(np.log(np.maximum(a[seen] / b[seen], 1e-30)).mean())
            weights += weight
    return result / weights if weights else 0.0


def _operand(consumer: Consumer, power: Sequence[Float]) -> Operand:
    groups = [
        Tokens(np.square(tokens[p > 0]), p[p > 0], weight)
        for tokens, p, weight in zip(consumer.tokens, power, GROUP_WEIGHTS, strict=True)
        if (p > 0).any()
    ]
    rows, share = sampled_rows(consumer.weight)
    static = isinstance(consumer.spec.activations, StaticActivation)
    peaks = consumer.absmax if static else None
    return Operand(consumer.labels, groups, consumer.column_power, rows, share * consumer.row_share, peaks)
