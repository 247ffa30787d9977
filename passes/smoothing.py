"""Bi-smoothing: choose, per fold site, the factor s that costs the linears behind it the least output error.

X' = X / s and W' = W · s with s = max|X|^α / max|W|^(1 − α) per channel (arXiv 2408.15301; the form of SmoothQuant,
arXiv 2211.10438 equation 4). s may be below 1: that shrinks a channel of the weights that stands out and moves it into
X. Without activations only such channels are touched, found from the weights alone.
"""

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from .executor import LOCAL, Executor, each
from .flow import Absorption
from .fold import Factor, Factors
from .linears import Linear
from .output_error import Consumer, OutputError, relative
from .refine import refine, sample
from .sites import Site
from .spec import LinearSpec, SiteKind, SmoothSpec
from .static_ranges import Ranges
from .walls import Blocks, find_walls
from .weights import require_finite

Float = NDArray[np.float32]

SAMPLED_OUTPUTS = 256
"""Rows that the search looks at, of all weights together that read one tensor."""

LARGEST = 2.0**24
"""Bound of s and 1/s. Gammas and scales are float32 in all graphs, so within it the folded ones stay normal numbers."""

_FLOOR = 1e-8


class Activations(Ranges, Protocol):
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


def choose_factors(
    sites: Sequence[Site],
    linears: Mapping[str, Linear],
    specs: Mapping[str, LinearSpec],
    blocks: Callable[[Linear], Iterable[Float]],
    activations: Activations | None,
    on_site: Callable[[str], None] = lambda _: None,
    earlier: Factors | None = None,
    *,
    step: str = "smooth",
    executor: Executor = LOCAL,
) -> tuple[dict[str, Factor], list[Choice]]:
    """A factor for each site that the recipe smooths and that gains by it.

    Args:
        sites: As ``find_sites`` gives them.
        linears: By name.
        specs: By linear name.
        blocks: Reads a linear's weight W [N, K], some rows at a time, as float32 [.., K].
        activations: Statistics, or None to smooth by the weights alone.
        on_site: Called with the name of each site that is done, the widest first.
        earlier: Factors that were chosen for other specifications: candidates too.
        step: Name of the step.
        executor: Does the work.

    Raises:
        BismoothError: the quantized linears behind a site disagree on smoothing, or a weight holds NaN or infinity.
    """
    task = ChooseFactor(step, linears, specs, blocks, activations, earlier or {})
    # The widest first: those that work at once are the same in a model of any size, and so is the peak memory.
    widest_first = sorted(sites, key=lambda site: -max((linears[item.linear].k for item in site.consumers), default=0))
    found = {site.name: chosen for site, chosen in each(executor, task, widest_first, on_site)}
    factors = {site.name: factor for site in sites if (factor := found[site.name].factor) is not None}
    return factors, [found[site.name].choice for site in sites]


@dataclass(frozen=True, eq=False)
class Chosen:
    """What was found for a site: the factor, None to leave it as it is, and why."""

    factor: Factor | None
    choice: Choice


@dataclass(frozen=True, eq=False)
class ChooseFactor:
    """The work on one site; for the attributes see :func:`choose_factors`."""

    step: str
    linears: Mapping[str, Linear]
    specs: Mapping[str, LinearSpec]
    blocks: Callable[[Linear], Iterable[Float]]
    activations: Activations | None
    earlier: Factors

    def __call__(self, site: Site) -> Chosen:
        """The factor for a site, and why."""
        return Chosen(*_choose(site, self.linears, self.specs, self.blocks, self.activations, self.earlier))

    def encode(self, result: Chosen) -> Any:
        """As JSON values: the factors in base64, as the float32 that they are."""
        factor = None if result.factor is None else b64encode(result.factor.astype("<f4").tobytes()).decode()
        return {"factor": factor, "choice": asdict(result.choice)}

    def decode(self, plain: Any) -> Chosen:
        """And back."""
        factor = None if plain["factor"] is None else np.frombuffer(b64decode(plain["factor"]), "<f4").astype(float)
        return Chosen(factor, Choice(**plain["choice"] | {"kind": SiteKind(plain["choice"]["kind"])}))


def _choose(
    site: Site,
    linears: Mapping[str, Linear],
    specs: Mapping[str, LinearSpec],
    blocks: Callable[[Linear], Iterable[Float]],
    activations: Activations | None,
    earlier: Factors,
) -> tuple[Factor | None, Choice]:
    quantized = [item for item in site.consumers if specs[item.linear].quantized]
    smoothing = _agreed(site, {item.linear: specs[item.linear].smoothing for item in quantized})
    if smoothing is None:
        return None, _left(site, "no linear behind it is quantized and smoothed by the recipe")
    if site.kind not in smoothing.kinds:
        return None, _left(site, f"the recipe does not smooth {site.kind} sites")
    if activations is None:
        return _from_weights(site, [(partial(_read, linears[item.linear], blocks), item.labels) for item in quantized])
    alike: dict[tuple[str, bytes, LinearSpec], list[Absorption]] = {}
    for item in quantized:
        alike.setdefault((linears[item.linear].x, item.labels.tobytes(), specs[item.linear]), []).append(item)
    consumers = [
        _consumer([linears[item.linear] for item in items], items[0].labels, spec, blocks, activations)
        for (_, _, spec), items in alike.items()
    ]
    return _search(site, consumers, smoothing, earlier.get(site.name))


def _agreed(site: Site, wanted: Mapping[str, SmoothSpec | None]) -> SmoothSpec | None:
    """The smoothing that all quantized linears behind a site ask for: they share its factor."""
    if len(set(wanted.values())) < 2:
        return next(iter(wanted.values()), None)
    names = list(wanted)
    other = next(name for name in names if wanted[name] != wanted[names[0]])
    raise BismoothError(
        f"{site.name}: its consumers {names[0]} and {other} disagree on smoothing. Expected the same for all quantized "
        "linears that read one tensor, since they share its factors. Give them the same 'smoothing' in the recipe, or "
        "leave one of them float (weights: null)."
    )


def _left(site: Site, reason: str) -> Choice:
    return Choice(site.name, site.kind, None, None, None, 0, reason)


def _consumer(
    linears: Sequence[Linear],
    labels: NDArray[np.int32],
    spec: LinearSpec,
    blocks: Callable[[Linear], Iterable[Float]],
    activations: Activations,
) -> Consumer:
    """All ``linears`` read one tensor; their weights pass through memory some rows at a time."""
    x, size = linears[0].x, len(labels)
    total = sum(linear.n for linear in linears)
    chosen, first = sample(total, SAMPLED_OUTPUTS), 0
    rows: list[Float] = []
    peaks, power = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for linear in linears:
        for block in _read(linear, blocks):
            rows.append(block[chosen[(chosen >= first) & (chosen < first + len(block))] - first])
            np.maximum(peaks, np.maximum(block.max(axis=0), -block.min(axis=0)), out=peaks)
            power += np.einsum("nk,nk->k", block, block)
            first += len(block)
    sampled = activations.rows(x)
    return Consumer(
        labels=labels,
        spec=spec,
        weight=np.concatenate(rows),
        row_share=total / len(chosen),
        column_peaks=peaks,
        column_power=power,
        absmax=activations.absmax(x),
        limit=partial(activations.limit, x),
        tokens=np.concatenate([sampled, activations.outliers(x)]),
        sampled=len(sampled),
    )


def _read(linear: Linear, blocks: Callable[[Linear], Iterable[Float]]) -> Iterator[Float]:
    first = 0
    for block in blocks(linear):
        require_finite(block, linear.weight, first)
        yield block
        first += len(block)


def _search(
    site: Site, consumers: Sequence[Consumer], smoothing: SmoothSpec, earlier: Factor | None
) -> tuple[Factor | None, Choice]:
    """The best of: no smoothing, each α of the grid, the best α refined, and ``earlier``; by measured output error."""
    peaks_x = _channel_max([(c.absmax, c.labels) for c in consumers], site.size)
    peaks_w = _channel_max([(c.column_peaks, c.labels) for c in consumers], site.size)
    measure = OutputError(consumers)
    unsmoothed = measure.of(np.ones(site.size))
    fixed = len(smoothing.alphas) == 1
    candidates = [(alpha, smoothing_factor(peaks_x, peaks_w, alpha, site.free)) for alpha in smoothing.alphas]
    errors = [measure.of(factor) for _, factor in candidates]
    best = int(np.argmin(errors))
    (alpha, factor), error = candidates[best], errors[best]
    reason = "fixed by the recipe" if fixed else "least output error on the grid"
    if smoothing.refine_steps and (operands := measure.operands()) is not None:
        refined = within_bounds(refine(factor, operands, site.free, smoothing.refine_steps), site.free)
        if (refined_error := measure.of(refined)) < error:
            factor, error, reason = refined, refined_error, "least output error, refined"
    if earlier is not None and not fixed and (kept := measure.of(earlier)) < error:
        factor, error, reason, alpha = earlier, kept, "least output error, that of one scale per channel", None
    if error >= unsmoothed and not fixed:
        reason = "no smoothing has the least output error"
        return None, Choice(site.name, site.kind, None, relative(unsmoothed), relative(unsmoothed), 0, reason)
    touched = int((factor != 1).sum())
    return factor, Choice(site.name, site.kind, alpha, relative(error), relative(unsmoothed), touched, reason)


def _from_weights(site: Site, weights: Sequence[tuple[Blocks, NDArray[np.int32]]]) -> tuple[Factor | None, Choice]:
    factor = find_walls(weights, site.free)
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
    """s as it may be folded: rounded to float32, within 1 / ``LARGEST`` … ``LARGEST``, and 1 on channels not free.

    Where all channels are free, s is scaled to a geometric mean of 1: a common factor changes no quantization error,
    and so the tensors keep their magnitude.
    """
    if free.all():
        s = s / np.exp(np.log(s).mean())
    return np.where(free, np.clip(s, 1 / LARGEST, LARGEST).astype(np.float32).astype(np.float64), 1.0)


def _channel_max(parts: Sequence[tuple[Float, NDArray[np.int32]]], size: int) -> NDArray[np.float64]:
    """Largest value per producer channel over all input columns that read it; 0 where none does."""
    result = np.zeros(size)
    for values, labels in parts:
        used = labels >= 0
        np.maximum.at(result, labels[used], values[used].astype(np.float64))
    return result
