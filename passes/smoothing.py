"""Bi-smoothing: choose, per fold site, the factor s that costs the linears behind it the least output error.

X' = X / s and W' = W · s with s = max|X|^α / max|W|^(1 − α) per channel (arXiv 2408.15301; the form of SmoothQuant, arXiv
2211.10438 equation 4). s may be below 1: that shrinks a channel of the weights that stands out and moves it into X.
Without activations only such channels are touched, found from the weights alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .fold import Factor
from .linears import Linear
from .refine import Operand, Tokens, refine, sampled_rows
from .sites import Site
from .spec import LinearSpec, SiteKind, SmoothSpec, StaticActivation
from .walls import find_walls
from .weights import QMAX, fake_quantize_rows, fake_quantize_tensor, weight_scale

Float = NDArray[np.float32]

SAMPLED_OUTPUTS = 256
"""Rows of a weight that the search looks at; the error of the others is alike."""

OUTLIER_WEIGHT = 0.3
"""Weight of the tokens with the largest activations, beside 1 for the sampled ones. They are few, and a plain sample misses
them, but attention to them carries their error to all tokens."""

_FLOOR = 1e-8


class Activations(Protocol):
    """What calibration knows of the activations, by value name."""

    def absmax(self, value: str) -> Float:
        """max|x| per channel: [K]."""
        ...

    def rows(self, value: str) -> Float:
        """A sample of token rows: [R, K]."""
        ...

    def outliers(self, value: str) -> Float:
        """The token rows with the largest |x|: [R', K]."""
        ...


@dataclass(frozen=True)
class Choice:
    """What was chosen for a site.

    Attributes:
        site: Its name.
        kind: Its kind.
        alpha: The exponent, None if the site is not smoothed or was smoothed without data.
        error: Relative output error of its linears with the factor, geometric mean over tokens; None without data.
        unsmoothed: The same without smoothing.
        channels: How many channels have a factor other than 1.
        reason: Why the site is as it is.
    """

    site: str
    kind: SiteKind
    alpha: float | None
    error: float | None
    unsmoothed: float | None
    channels: int
    reason: str


@dataclass(frozen=True, eq=False)
class _Consumer:
    """A quantized linear behind a site.

    Attributes:
        weight: Sampled rows of W, or all of them without data.
        column_power: ‖W[:,k]‖² of the whole weight.
        row_share: How many rows of W each sampled row stands for.
        tokens: Sampled tokens and outliers, [T, K] each; empty without data.
        absmax: max|x| per input column, empty without data.
        labels: Which channel of the site each input column reads, −1 for none.
        spec: How the linear is quantized.
    """

    weight: Float
    column_power: Float
    row_share: float
    tokens: tuple[Float, ...]
    absmax: Float
    labels: NDArray[np.int32]
    spec: LinearSpec

    def spread(self, s: Factor) -> Float:
        return np.where(self.labels < 0, 1.0, s[self.labels]).astype(np.float32)


def choose_factors(
    sites: Sequence[Site],
    linears: Mapping[str, Linear],
    specs: Mapping[str, LinearSpec],
    weight: Callable[[Linear], Float],
    activations: Activations | None,
    on_site: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Factor], list[Choice]]:
    """A factor for each site that the recipe smooths and that gains by it.

    Args:
        sites: As ``find_sites`` gives them.
        linears: By name.
        specs: By linear name. The linears behind a site must agree on smoothing.
        weight: Reads a linear's weight as float32 [N, K].
        activations: Statistics, or None to smooth by the weights alone.
        on_site: Called with the name of each site that is done.
    """
    factors: dict[str, Factor] = {}
    choices: list[Choice] = []
    for site in sites:
        factor, choice = _choose(site, linears, specs, weight, activations)
        choices.append(choice)
        if factor is not None:
            factors[site.name] = factor
        on_site(site.name)
    return factors, choices


def _choose(
    site: Site,
    linears: Mapping[str, Linear],
    specs: Mapping[str, LinearSpec],
    weight: Callable[[Linear], Float],
    activations: Activations | None,
) -> tuple[Factor | None, Choice]:
    quantized = [consumer for consumer in site.consumers if specs[consumer.linear].quantized]
    settings = {specs[consumer.linear].smoothing for consumer in quantized} - {None}
    if not quantized or not settings:
        return None, _left(site, "no linear behind it is quantized and smoothed by the recipe")
    smoothing = next(iter(settings))
    assert smoothing is not None
    if site.kind not in smoothing.kinds:
        return None, _left(site, f"the recipe does not smooth {site.kind} sites")
    consumers = [
        _consumer(linears[item.linear], item.labels, specs[item.linear], weight, activations) for item in quantized
    ]
    if activations is None:
        return _from_weights(site, consumers)
    return _search(site, consumers, smoothing)


def _left(site: Site, reason: str) -> Choice:
    return Choice(site.name, site.kind, None, None, None, 0, reason)


def _consumer(
    linear: Linear,
    labels: NDArray[np.int32],
    spec: LinearSpec,
    weight: Callable[[Linear], Float],
    activations: Activations | None,
) -> _Consumer:
    full = weight(linear)
    if activations is None:
        return _Consumer(full, np.empty(0, np.float32), 1.0, (), np.empty(0, np.float32), labels, spec)
    step = max(1, full.shape[0] // SAMPLED_OUTPUTS)
    rows = full[::step].copy()
    return _Consumer(
        rows,
        np.einsum("nk,nk->k", full, full),
        full.shape[0] / rows.shape[0],
        (activations.rows(linear.x), activations.outliers(linear.x)),
        activations.absmax(linear.x),
        labels,
        spec,
    )


def _search(site: Site, consumers: list[_Consumer], smoothing: SmoothSpec) -> tuple[Factor | None, Choice]:
    """The best of: no smoothing, each α of the grid, and the best α refined; by measured output error."""
    peaks_x = _channel_max([(c.absmax, c.labels) for c in consumers], site.size)
    peaks_w = _channel_max([(np.abs(c.weight).max(axis=0), c.labels) for c in consumers], site.size)
    measure = _Measure(consumers)
    ones = np.ones(site.size)
    unsmoothed = measure.error(ones)
    fixed = len(smoothing.alphas) == 1
    candidates = [(alpha, smoothing_factor(peaks_x, peaks_w, alpha, site.free)) for alpha in smoothing.alphas]
    errors = [measure.error(factor) for _, factor in candidates]
    best = int(np.argmin(errors))
    (alpha, factor), error = candidates[best], errors[best]
    reason = "fixed by the recipe" if fixed else "least output error on the grid"
    if smoothing.refine_steps:
        refined = within_bounds(refine(factor, measure.operands(), site.free, smoothing.refine_steps), site.free)
        if (refined_error := measure.error(refined)) < error:
            factor, error, reason = refined, refined_error, "least output error, refined"
    if error >= unsmoothed and not fixed:
        reason = "no smoothing has the least output error"
        return None, Choice(site.name, site.kind, None, _relative(unsmoothed), _relative(unsmoothed), 0, reason)
    touched = int((factor != 1).sum())
    return factor, Choice(site.name, site.kind, alpha, _relative(error), _relative(unsmoothed), touched, reason)


def _from_weights(site: Site, consumers: list[_Consumer]) -> tuple[Factor | None, Choice]:
    factor = find_walls([(c.weight, c.labels) for c in consumers], site.free)
    touched = int((factor != 1).sum())
    if not touched:
        return None, _left(site, "no channel of the weights stands out, and there is no calibration data")
    return factor, Choice(site.name, site.kind, None, None, None, touched, "channels that stand out in the weights")


def smoothing_factor(
    peaks_x: NDArray[np.float64], peaks_w: NDArray[np.float64], alpha: float, free: NDArray[np.bool_]
) -> Factor:
    """s = max|X|^α / max|W|^(1 − α) per channel, float64 [C]; 1 on channels that are not free."""
    s = np.maximum(peaks_x, _FLOOR) ** alpha / np.maximum(peaks_w, _FLOOR) ** (1 - alpha)
    return within_bounds(s, free)


def within_bounds(s: Factor, free: NDArray[np.bool_]) -> Factor:
    """s as it may be folded: rounded to float32, within 2⁻²⁴ … 2²⁴, and 1 on channels that are not free.

    Where all channels are free, s is scaled to a geometric mean of 1: a common factor changes no quantization error, and
    so the tensors keep their magnitude. Gammas and scales are float32 in all graphs, so within these bounds the folded ones
    stay normal numbers.
    """
    if free.all():
        s = s / np.exp(np.log(s).mean())
    return np.where(free, np.clip(s, 2.0**-24, 2.0**24).astype(np.float32).astype(np.float64), 1.0)


def _channel_max(parts: Sequence[tuple[Float, NDArray[np.int32]]], size: int) -> NDArray[np.float64]:
    """Largest value per producer channel over all input columns that read it; 0 where none does."""
    result = np.zeros(size)
    for values, labels in parts:
        used = labels >= 0
        np.maximum.at(result, labels[used], values[used].astype(np.float64))
    return result


class _Measure:
    """The output error of the linears behind a site, measured on token rows with both sides quantized."""

    def __init__(self, consumers: Sequence[_Consumer]) -> None:
        self._consumers = consumers
        self._outputs = [[tokens @ c.weight.T for tokens in c.tokens] for c in consumers]

    def error(self, s: Factor) -> float:
        """Mean of log(‖y − ŷ‖² / ‖y‖²) over the sampled tokens, plus the weighted mean over the outliers.

        The logarithm keeps single tokens from deciding for all others.
        """
        groups = range(len(self._consumers[0].tokens))
        lost = [np.zeros(len(self._consumers[0].tokens[group])) for group in groups]
        total = [np.zeros(len(self._consumers[0].tokens[group])) for group in groups]
        for consumer, outputs in zip(self._consumers, self._outputs, strict=True):
            columns = consumer.spread(s)
            weight = consumer.weight * columns
            scale = weight_scale(weight)[:, None]
            weight /= scale
            np.rint(weight, out=weight)
            weight *= scale
            for group, (tokens, output) in enumerate(zip(consumer.tokens, outputs, strict=True)):
                difference = _quantized(tokens / columns, consumer, columns) @ weight.T - output
                lost[group] += np.einsum("tn,tn->t", difference, difference)
                total[group] += np.einsum("tn,tn->t", output, output)
        return sum(weight * _mean_log(a, b) for weight, a, b in zip((1.0, OUTLIER_WEIGHT), lost, total, strict=True))

    def operands(self) -> list[Operand]:
        """What the refinement needs of the linears."""
        return [self._operand(c, outputs) for c, outputs in zip(self._consumers, self._outputs, strict=True)]

    @staticmethod
    def _operand(consumer: _Consumer, outputs: Sequence[Float]) -> Operand:
        power = [np.einsum("tn,tn->t", output, output) * consumer.row_share for output in outputs]
        groups = [
            Tokens(np.abs(tokens[p > 0]), p[p > 0], weight)
            for tokens, p, weight in zip(consumer.tokens, power, (1.0, OUTLIER_WEIGHT), strict=True)
            if (p > 0).any()
        ]
        rows, share = sampled_rows(consumer.weight)
        static = isinstance(consumer.spec.activations, StaticActivation)
        peaks = consumer.absmax if static else None
        return Operand(consumer.labels, groups, consumer.column_power, rows, share * consumer.row_share, peaks)


def _mean_log(lost: NDArray[np.float64], total: NDArray[np.float64]) -> float:
    seen = total > 0
    return float(np.log(np.maximum(lost[seen] / total[seen], 1e-30)).mean()) if seen.any() else 0.0


def _relative(error: float) -> float:
    """The measure as a relative error ‖y − ŷ‖ / ‖y‖."""
    return float(np.exp(error / 2 / (1 + OUTLIER_WEIGHT)))


def _quantized(x: Float, consumer: _Consumer, columns: Float) -> Float:
    if consumer.spec.activations is None:
        return x
    if isinstance(consumer.spec.activations, StaticActivation):
        return fake_quantize_tensor(x, max(float((consumer.absmax / columns).max()), _FLOOR) / QMAX)
    return fake_quantize_rows(x)
