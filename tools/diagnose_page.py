"""The page of ``bismooth diagnose``: where the walls are, how high they stand, and what remedies leave of the error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..passes.diagnosis import Diagnosis
from ..passes.weight_scan import WeightScan
from .page import Command, Figure, Page, Panel, Section, Table, View, rounded

if TYPE_CHECKING:
    from .diagnose import DiagnoseResult, Remedy

_SURFACES = 6
_COMPARED = 30
_EXACT, _POINTS = 64, 240
_SCALE = "Viridis"
_MAXIMA = "maxima"


@dataclass(frozen=True, eq=False)
class Picture:
    """What a page shows of one weight W [N, K].

    Attributes:
        ranks: From 1 on; the first ones all, then fewer and fewer.
        maxima: max|W| of the input channels of these ranks, falling.
        channels: Their numbers.
        outline: As of :class:`..passes.weight_scan.WeightScan`.
    """

    ranks: NDArray[np.intp]
    maxima: NDArray[np.float32]
    channels: NDArray[np.intp]
    outline: NDArray[np.float32]

    @staticmethod
    def of(seen: WeightScan) -> Picture:
        order = np.argsort(-seen.peaks, kind="stable")
        thinned = np.geomspace(min(_EXACT, order.size), order.size, _POINTS).round().astype(np.intp)
        ranks = np.unique(np.concatenate([np.arange(1, min(_EXACT, order.size) + 1), thinned]))
        channels = order[ranks - 1]
        return Picture(ranks, seen.peaks[channels], channels, seen.outline)


@dataclass(frozen=True)
class _Place:
    """Where a linear stands: ``model.layers.3.mlp.up_proj`` is ``mlp.up_proj`` in block 3 of ``model.layers``."""

    stack: str
    block: int
    matrix: str

    @staticmethod
    def of(name: str) -> _Place | None:
        match = re.match(r"(.*?)\.?\b(\d+)\.(.+)", name)
        return _Place(match[1], int(match[2]), match[3]) if match else None


def diagnosis_page(result: DiagnoseResult, pictures: Mapping[str, Picture]) -> Page:
    """The page of a result; ``pictures`` are by the linears' names."""
    bad = result.flagged
    parameters = sum(item.n * item.k for item in result.linears)
    facts = {
        "linears at risk": f"{len(bad)} of {len(result.linears)}",
        "of their parameters": f"{sum(item.n * item.k for item in bad) / max(parameters, 1):.2%}",
        "most lost bits": f"{max(item.lost_bits for item in result.linears):.2f}",
        "weights read": f"{result.bytes_read / 1e6:,.0f} MB",
    }
    sections = [
        _map(result.linears),
        _maxima(result.linears, pictures),
        _surfaces(result, pictures),
        _errors(result),
        _table(result),
        _remedies(result),
    ]
    title = f"Weights of {result.model} under per-channel INT8"
    return Page(title, result.verdict, not bad, facts, [section for section in sections if section is not None])


def _map(linears: Sequence[Diagnosis]) -> Section | None:
    """Blocks by matrices; None where names have no block numbers."""
    places = {item.name: place for item in linears if (place := _Place.of(item.name))}
    if not places:
        return None
    several = len({place.stack for place in places.values()}) > 1
    rows = {name: f"{place.stack}.*.{place.matrix}" if several else place.matrix for name, place in places.items()}
    known = [item for item in linears if item.name in places]
    matrices = list(dict.fromkeys(rows.values()))
    blocks = sorted({place.block for place in places.values()})
    cells = {(rows[item.name], places[item.name].block): item for item in known}
    grid = [[cells.get((matrix, block)) for block in blocks] for matrix in matrices]
    flagged = [(places[item.name].block, rows[item.name], item.name) for item in known if item.flagged]

    def figure(words: str, values: Callable[[Diagnosis], float], logarithmic: bool) -> Figure:
        numbers = [[None if item is None else values(item) for item in row] for row in grid]
        return _heat_map(words, blocks, matrices, numbers, grid, flagged, logarithmic)

    views = [
        View("largest weight, max |W|", [figure("max |W|", lambda item: item.absmax, True)]),
        View("largest channel over the median channel", [figure("ratio", lambda item: item.ratio, True)]),
        View("bits lost to the largest channels", [figure("lost bits", lambda item: item.lost_bits, False)]),
    ]
    marked = " Diamonds mark what per-channel INT8 breaks." if flagged else ""
    text = f"A column per block, a row per matrix.{marked} A click on a cell shows its channels below."
    return Section("Where", text, [Panel("map", "Colour shows", views, 110 + 30 * len(matrices), _MAXIMA)])


def _heat_map(
    words: str,
    blocks: Sequence[int],
    matrices: Sequence[str],
    values: Sequence[Sequence[float | None]],
    grid: Sequence[Sequence[Diagnosis | None]],
    flagged: Sequence[tuple[int, str, str]],
    logarithmic: bool,
) -> Figure:
    shown = [[None if value is None else _cell(value, logarithmic) for value in row] for row in values]
    seen = [value for row in shown for value in row if value is not None]
    bar: dict[str, Any] = {
        "title": {"text": words},
        "orientation": "h",
        "thickness": 10,
        "y": 1.02,
        "yanchor": "bottom",
    }
    if logarithmic:
        bar |= _log_ticks(min(seen), max(seen))
    heat = {
        "type": "heatmap",
        "x": blocks,
        "y": matrices,
        "z": shown,
        "customdata": [[item and item.name for item in row] for row in grid],
        "text": [["" if value is None else _three(value) for value in row] for row in values],
        "hovertemplate": f"%{{customdata}}<br>{words} %{{text}}<extra></extra>",
        "colorscale": _SCALE,
        "colorbar": bar,
        "xgap": 1,
        "ygap": 1,
    }
    marks = {
        "type": "scatter",
        "mode": "markers",
        "x": [block for block, _, _ in flagged],
        "y": [matrix for _, matrix, _ in flagged],
        "customdata": [name for _, _, name in flagged],
        "hovertemplate": "%{customdata}<br>at risk<extra></extra>",
        "marker": {"symbol": "diamond", "size": 8, "color": "--bad", "line": {"color": "--mark", "width": 1.5}},
    }
    layout = {
        "xaxis": {
            "title": {"text": "block"},
            "range": [blocks[0] - 0.5, blocks[-1] + 0.5],
            "showgrid": False,
            "zeroline": False,
            "tickangle": 0,
            **({"dtick": 1} if len(blocks) < 6 else {}),  # else plotly finds whole numbers by itself
        },
        "yaxis": {"range": [len(matrices) - 0.5, -0.5], "showgrid": False, "type": "category"},
    }
    return Figure(f"Heat map of {words} over {len(blocks)} blocks and {len(matrices)} matrices", [heat, marks], layout)


def _maxima(linears: Sequence[Diagnosis], pictures: Mapping[str, Picture]) -> Section:
    ordered = sorted(linears, key=lambda item: (not item.flagged, item.flagged and -item.lost_bits))
    views = [
        View(item.name, [_curve(item, pictures[item.name])], _described(item), "at risk" if item.flagged else "healthy")
        for item in ordered
    ]
    text = "The largest weight of each input channel, sorted. In a healthy matrix the curve falls gently; walls stand "
    text += "far above the dotted median."
    return Section("Input channels", text, [Panel(_MAXIMA, "Layer", views)])


def _curve(item: Diagnosis, picture: Picture) -> Figure:
    positive = picture.maxima > 0  # a logarithmic axis has no 0
    ranks, maxima, channels = (values[positive] for values in (picture.ranks, picture.maxima, picture.channels))
    walls = np.isin(channels, item.channels)
    traces = [
        {
            "type": "scatter",
            "mode": "markers" if is_wall else "lines",
            "name": "walls" if is_wall else "channels",
            "x": ranks[chosen].tolist(),
            "y": rounded(maxima[chosen].tolist()),
            "text": [str(channel) for channel in channels[chosen].tolist()],
            "hovertemplate": "channel %{text}<br>max|W| %{y:.3g}<extra></extra>",
            "marker": {"color": "--bad", "size": 9},
            "line": {"color": "--second", "width": 2},
        }
        for is_wall, chosen in ((False, slice(None)), (True, walls))
    ]
    median = item.absmax / item.ratio if item.ratio else 0.0
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": median, "y1": median}
    layout = {
        "xaxis": {"title": {"text": f"rank of the input channel, of {item.k}"}, "type": "log", "dtick": 1},
        "yaxis": {"title": {"text": "max |W|"}, "type": "log", "tickformat": "~g", "dtick": "D2"},
        "showlegend": False,
        "shapes": [line | {"line": {"color": "--plain", "dash": "dot", "width": 1}}] if median else [],
    }
    return Figure(f"Sorted maxima of the input channels of {item.name}", traces, layout)


def _described(item: Diagnosis) -> str:
    shape = f"{item.k} inputs, {item.n} outputs; largest channel {item.ratio:.3g} times the median one; "
    if not item.flagged:
        return f"{shape}{item.lost_bits:.2f} bits lost."
    listed = ", ".join(map(str, item.channels[:12])) + (" …" if len(item.channels) > 12 else "")
    return f"{shape}{item.lost_bits:.2f} bits lost to channels {listed}."


def _surfaces(result: DiagnoseResult, pictures: Mapping[str, Picture]) -> Section:
    worst = sorted(result.flagged, key=lambda item: -item.rest_errors["per_channel"])[:_SURFACES]
    most_uneven = max(result.linears, key=lambda item: item.lost_bits)
    views: list[View] = []
    for item in worst or [most_uneven]:
        partner = _healthy(item, result.linears) if item.flagged else None
        shown = [item] if partner is None else [item, partner]
        beside = "" if partner is None else f"At the right {partner.name}, a healthy one of the same kind."
        views.append(View(item.name, [_surface(each, pictures[each.name].outline) for each in shown], beside))
    text = "max |W| over cells of the matrix, drawn as in arXiv 2408.15301: walls run through all outputs. "
    text += "Heights are linear, each figure on its own scale; colours are logarithmic."
    return Section("The matrix", text, [Panel("surface", "Layer", views, 440)])


def _healthy(item: Diagnosis, linears: Sequence[Diagnosis]) -> Diagnosis | None:
    """The nearest healthy linear of the same kind."""
    here = _Place.of(item.name)
    places = ((other, _Place.of(other.name)) for other in linears if not other.flagged)
    alike = [
        (abs(place.block - here.block), other)
        for other, place in places
        if here and place and (place.stack, place.matrix) == (here.stack, here.matrix)
    ]
    return min(alike, key=lambda pair: pair[0])[1] if alike else None


def _surface(item: Diagnosis, outline: NDArray[np.float32]) -> Figure:
    heights = outline.tolist()
    positive = outline[outline > 0]
    floor = float(positive.min()) if positive.size else 1.0
    shades = np.log10(np.maximum(outline, floor))
    step_n, step_k = (-(-size // cells) for size, cells in zip((item.n, item.k), outline.shape, strict=True))
    surface = {
        "type": "surface",
        "x": [step_k * cell for cell in range(outline.shape[1])],
        "y": [step_n * cell for cell in range(outline.shape[0])],
        "z": [rounded(row, 3) for row in heights],
        "surfacecolor": [rounded(row, 3) for row in shades.tolist()],
        "colorscale": _SCALE,
        "showscale": False,
        "hovertemplate": "input %{x}<br>output %{y}<br>max|W| %{z:.3g}<extra></extra>",
    }
    layout = {
        "title": {"text": item.name, "font": {"size": 14}, "y": 0.98, "yanchor": "top"},
        "scene": {
            "xaxis": {"title": {"text": "input channel"}},
            "yaxis": {"title": {"text": "output channel"}},
            "zaxis": {"title": {"text": "|W|"}, "rangemode": "tozero"},
            "camera": {"eye": {"x": -1.55, "y": -1.75, "z": 0.95}, "center": {"x": 0, "y": 0, "z": -0.12}},
            "aspectmode": "cube",
        },
    }
    return Figure(f"Surface of the weights of {item.name}: at most {_three(item.absmax)}", [surface], layout)


def _errors(result: DiagnoseResult) -> Section | None:
    """Errors before and after each remedy; None where nothing is to be repaired."""
    items = sorted(result.flagged, key=lambda item: -item.rest_errors["per_channel"])[:_COMPARED]
    if not items:
        return None
    series = {
        "per-channel INT8": ({item.name: item.rest_errors["per_channel"] for item in items}, "--bad", "circle"),
        **{remedy.name: (remedy.errors, *style) for remedy, style in zip(result.remedies, _STYLES, strict=False)},
    }
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": rounded(errors[item.name] for item in items if item.name in errors),
            "y": [_short(item.name) for item in items if item.name in errors],
            "text": [item.name for item in items if item.name in errors],
            "marker": {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2, "color": colour}},
            "hovertemplate": f"%{{text}}<br>{name} %{{x:.2%}}<extra></extra>",
        }
        for name, (errors, colour, symbol) in series.items()
    ]
    layout = {
        "xaxis": {
            "title": {"text": "relative error"},
            "type": "log",
            "tickformat": "~%",
            "dtick": "D2",
        },
        "yaxis": {"autorange": "reversed", "type": "category"},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    }
    figure = Figure("Relative error of the flagged linears before and after each remedy", [*traces], layout)
    text = "‖W − Ŵ‖ / ‖W‖ over the channels that are no walls: what per-channel INT8 leaves of them, and each remedy."
    if len(items) < len(result.flagged):
        text += f" The {len(items)} worst."
    return Section("Before and after", text, [Panel("errors", "", [View("", [figure])], 130 + 26 * len(items))])


_STYLES = (("--good", "diamond"), ("--second", "square-open"), ("--third", "cross"), ("--plain", "x"))


def _table(result: DiagnoseResult) -> Section:
    shown = result.shown()
    rows = [
        (
            item.name,
            ", ".join(map(str, item.channels)) or "none",
            f"{item.n} × {item.k}",
            item.lost_bits,
            *(item.rest_errors[scheme] for scheme in ("per_channel", "bismoothed")),
            *(item.output_errors or {}).values(),
        )
        for item in shown
    ]
    errors = ["error per channel", "error bi-smoothed"]
    errors += [f"output error {name.replace('_', ' ')}" for name in shown[0].output_errors or {}]
    columns = {"linear": "", "walls": "", "outputs × inputs": "", "lost bits": ".2f"} | dict.fromkeys(errors, ".2%")
    title = "Linears at risk" if result.flagged else "The most uneven linears"
    text = "Errors are of the channels that are no walls."
    if shown[0].output_errors:
        text += " Output errors are of what the linear computes, activations in INT8 too."
    return Section(title, text, [Table(columns, rows)])


def _outputs(remedy: Remedy) -> str:
    if remedy.outputs is None:
        return ""
    after, before = map(_percent, remedy.outputs)
    return f", that of their outputs from {before} to {after}"


def _remedies(result: DiagnoseResult) -> Section | None:
    if not result.remedies:
        return None
    commands = [
        Command(
            f"{remedy.name}: for {remedy.linears} linears. The error of their weights falls from "
            f"{_percent(remedy.before)} to {_percent(remedy.error)}{_outputs(remedy)} (root mean square). Cost at run "
            f"time: {remedy.cost}.",
            remedy.command,
        )
        for remedy in result.remedies
    ]
    return Section("Remedies", "", commands)


def _short(name: str) -> str:
    """``model.layers.3.mlp.up_proj`` as ``3.mlp.up_proj``."""
    place = _Place.of(name)
    return f"{place.block}.{place.matrix}" if place else name


def _cell(value: float, logarithmic: bool) -> float | None:
    if logarithmic:
        return float(f"{np.log10(value):.4g}") if value > 0 else None
    return float(f"{value:.4g}")


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks at 1, 2, 5, 10 … for a colour bar of logarithms."""
    digits = (1.0, 2.0, 5.0) if high - low < 2 else (1.0,)
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    seen = [tick for tick in ticks if low <= np.log10(tick) <= high] or [10**low, 10**high]
    return {"tickvals": [float(np.log10(tick)) for tick in seen], "ticktext": [_three(tick) for tick in seen]}


def _three(value: float) -> str:
    """With three digits."""
    return f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{share:.2%}"
