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
from .sites import Site
from .spec import LinearSpec, SiteKind, SmoothSpec, StaticActivation
from .walls import find_walls
from .weights import fake_quantize_rows, fake_quantize_tensor, row_chunks, weight_scale

Float = NDArray[np.float32]

SAMPLED_OUTPUTS = 512
"""Rows of a weight that the search looks at; the error of the others is alike."""

_FLOOR = 1e-8


class Activations(Protocol):
    """What calibration knows of the activations, by value name."""

    def absmax(self, value: str) -> Float:
        """max|x| per channel: [K]."""
        ...

    def rows(self, value: str) -> Float:
        """A sample of token rows: [R, K]."""
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
    """A quantized linear behind a site: its sampled weight rows, tokens, and which channel each input column reads."""

    weight: Float
    x: Float | None
    absmax: Float | None
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
        return _Consumer(full, None, None, labels, spec)
    step = max(1, full.shape[0] // SAMPLED_OUTPUTS)
    return _Consumer(full[::step].copy(), activations.rows(linear.x), activations.absmax(linear.x), labels, spec)


def _search(site: Site, consumers: list[_Consumer], smoothing: SmoothSpec) -> tuple[Factor | None, Choice]:
    peaks_x = _channel_max([(c.absmax, c.labels) for c in consumers if c.absmax is not None], site.size)
    peaks_w = _channel_max([(np.abs(c.weight).max(axis=0), c.labels) for c in consumers], site.size)
    references = [c.x @ c.weight.T for c in consumers if c.x is not None]
    ones = np.ones(site.size)
    unsmoothed = _output_error(consumers, references, ones)
    best: tuple[float, float | None, Factor] = (unsmoothed, None, ones)
    for alpha in smoothing.alphas:
        factor = smoothing_factor(peaks_x, peaks_w, alpha, site.free)
        error = _output_error(consumers, references, factor)
        if error < best[0] or len(smoothing.alphas) == 1:
            best = (error, alpha, factor)
    error, alpha, factor = best
    if alpha is None:
        return None, Choice(site.name, site.kind, None, error, unsmoothed, 0, "no smoothing has the least output error")
    reason = "fixed by the recipe" if len(smoothing.alphas) == 1 else "least output error"
    touched = int((factor != 1).sum())
    return factor, Choice(site.name, site.kind, alpha, error, unsmoothed, touched, reason)


def _from_weights(site: Site, consumers: list[_Consumer]) -> tuple[Factor | None, Choice]:
    factor = find_walls([(c.weight, c.labels) for c in consumers], site.free)
    touched = int((factor != 1).sum())
    if not touched:
        return None, _left(site, "no channel of the weights stands out, and there is no calibration data")
    return factor, Choice(site.name, site.kind, None, None, None, touched, "channels that stand out in the weights")


def smoothing_factor(
    peaks_x: NDArray[np.float64], peaks_w: NDArray[np.float64], alpha: float, free: NDArray[np.bool_]
) -> Factor:
    """s = max|X|^α / max|W|^(1 − α) per channel, float64 [C]; 1 on channels that are not free.

    Where all channels are free, s is scaled to a geometric mean of 1: a common factor changes no quantization error, and
    so the tensors keep their magnitude. s keeps at least 2⁻²⁴ and at most 2²⁴ of it.
    """
    s = np.maximum(peaks_x, _FLOOR) ** alpha / np.maximum(peaks_w, _FLOOR) ** (1 - alpha)
    if free.all():
        s /= np.exp(np.log(s).mean())
    s = np.clip(s, 2.0**-24, 2.0**24)
    return np.where(free, s.astype(np.float32).astype(np.float64), 1.0)


def _channel_max(parts: Sequence[tuple[Float, NDArray[np.int32]]], size: int) -> NDArray[np.float64]:
    """Largest value per producer channel over all input columns that read it; 0 where none does."""
    result = np.zeros(size)
    for values, labels in parts:
        used = labels >= 0
        np.maximum.at(result, labels[used], values[used].astype(np.float64))
    return result


def _output_error(consumers: Sequence[_Consumer], references: Sequence[Float], s: Factor) -> float:
    """Relative output error ‖Y − Ŷ‖ / ‖Y‖ with both sides quantized, geometric mean over the sampled tokens.

    The mean over logarithms keeps a few tokens with huge activations from deciding for all others.
    """
    lost = np.zeros(references[0].shape[0])
    total = np.zeros(references[0].shape[0])
    for consumer, reference in zip(consumers, references, strict=True):
        assert consumer.x is not None
        columns = consumer.spread(s)
        x = _quantized(consumer.x / columns, consumer.spec)
        for rows in row_chunks(consumer.weight.shape):
            weight = consumer.weight[rows] * columns
            scale = weight_scale(weight)[:, None]
            weight = np.rint(weight / scale) * scale
            difference = x @ weight.T - reference[:, rows]
            lost += np.einsum("tn,tn->t", difference, difference)
        total += np.einsum("tn,tn->t", reference, reference)
    ratio = lost / np.maximum(total, np.finfo(np.float64).tiny)
    seen = total > 0
    return float(np.exp(0.5 * np.log(np.maximum(ratio[seen], 1e-30)).mean())) if seen.any() else 0.0


def _quantized(x: Float, spec: LinearSpec) -> Float:
    if spec.activations is None:
        return x
    if isinstance(spec.activations, StaticActivation):
        return fake_quantize_tensor(x, max(float(np.abs(x).max()), _FLOOR) / 127)
    return fake_quantize_rows(x)
