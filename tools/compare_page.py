"""The page of ``bismooth compare``: figures and differences with their intervals, and what the artifacts hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .bootstrap import CONFIDENCE
from .compared import SHOWN, CompareResult, Estimate
from .page import Figure, Page, Panel, Section, Table, View

_TITLES = {
    "kl": ("KL divergence", "mean KL from the reference, nats"),
    "kl_p99": ("KL divergence, worst tokens", "99th percentile of the KL, nats"),
    "perplexity_ratio": ("perplexity ratio", "perplexity over that of the reference"),
    "log_perplexity": ("log-perplexity", "log-perplexity, nats"),
    "top1": ("top-1 agreement", "share of tokens with the same most likely next one"),
    "cosine_p5": ("cosine", "5th percentile of the cosine"),
    "sqnr_db": ("signal to noise", "dB"),
}
_CLOSEST = {"kl": min, "sqnr_db": max}
_ROW = 34
_MARGIN = 96


def comparison_page(result: CompareResult) -> Page:
    """The page of a result."""
    facts = {"windows": str(result.windows), "tokens each": str(result.length)}
    if result.reference_perplexity is not None:
        facts["reference perplexity"] = f"{result.reference_perplexity:.4g}"
    title = f"Artifacts against the float graph of {result.reference}"
    sections = [_figures(result), _differences(result), _artifacts(result), _engines(result)]
    good = all(item.figures for item in result.artifacts)
    return Page(title, _verdict(result), good, facts, [section for section in sections if section is not None])


def _verdict(result: CompareResult) -> str:
    """The artifact that is closest to the reference, and the notes."""
    sentences: list[str] = []
    for name, best in _CLOSEST.items():
        if measured := [item for item in result.artifacts if name in item.figures]:
            closest = best(measured, key=lambda item: item.figures[name].value)
            figure = _text(closest.figures[name], SHOWN[name])
            sentences.append(f"Closest to the reference is {closest.artifact}: {_TITLES[name][0]} {figure}.")
    return " ".join([*sentences, *result.notes])


def _figures(result: CompareResult) -> Section | None:
    """A panel with a view per figure, and a table of all; None where no artifact has any."""
    measured = [item for item in result.artifacts if item.figures]
    if not measured:
        return None
    names = [name for name in SHOWN if name in measured[0].figures]
    views = [_view(name, {str(item.artifact): item.figures[name] for item in measured}) for name in names]
    columns = dict.fromkeys(["artifact", *(_TITLES[name][0] for name in names)], "")
    rows = [
        (str(item.artifact), *(_text(item.figures.get(name), SHOWN[name]) for name in names))
        for item in result.artifacts
    ]
    text = "Each artifact against the float reference, on the same windows."
    if result.windows > 1:
        text += f" Bars are {CONFIDENCE:.0%} intervals of a bootstrap over windows."
    return Section("Distance from the reference", text, [_panel("figures", views), Table(columns, rows)])


def _differences(result: CompareResult) -> Section | None:
    """A panel with a view per figure; None for a single artifact."""
    others = [item for item in result.artifacts if item.differences]
    if not others:
        return None
    first = result.artifacts[0].artifact
    views = [
        _view(name, {str(item.artifact): item.differences[name] for item in others}, f"less that of {first}")
        for name in others[0].differences
    ]
    text = f"Less the figure of {first}, on the same resamples: what makes a window hard for all cancels out. "
    text += "A bar that does not cross 0 is more than chance in the choice of windows."
    return Section("Differences from the first", text, [_panel("differences", views)])


def _panel(name: str, views: Sequence[View]) -> Panel:
    rows = max(len(view.figures[0].traces[0]["y"]) for view in views)
    return Panel(name, "Figure", views, _MARGIN + _ROW * rows)


def _view(name: str, estimates: Mapping[str, Estimate], less: str = "") -> View:
    """A point and a bar per artifact; ``less`` says of what they are differences."""
    title, axis = _TITLES[name]
    finite = {artifact: item for artifact, item in estimates.items() if math.isfinite(item.value)}
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": [item.value for item in finite.values()],
        "y": list(finite),
        "text": [_text(item, "#.3g" if less else SHOWN[name]) for item in finite.values()],
        "hovertemplate": "%{y}<br>%{text}<extra></extra>",
        "marker": {"color": "--second", "size": 10},
        "error_x": _bars(list(finite.values())),
    }
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": f"{title} {less}" if less else axis}},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "showlegend": False,
    }
    if less:
        layout["xaxis"] |= {"rangemode": "tozero", "zeroline": True, "zerolinewidth": 2}
    return View(title, [Figure(f"{title} of {len(finite)} artifacts {less}".rstrip(), [trace], layout)])


def _bars(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """The intervals, as lengths from the value; a side that is infinite is not drawn."""
    spans = [(item.value, item.interval.low, item.interval.high) for item in estimates if item.interval]
    up = [high - value if math.isfinite(high) else 0.0 for value, _, high in spans]
    down = [value - low if math.isfinite(low) else 0.0 for value, low, _ in spans]
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "color": "--second",
        "visible": bool(up),
    }


def _artifacts(result: CompareResult) -> Section:
    rows = [
        (
            str(item.artifact),
            item.recipe or "float",
            "–" if item.weights_bytes is None else f"{item.weights_bytes / 1e6:,.1f} MB",
        )
        for item in result.artifacts
    ]
    return Section("Artifacts", "", [Table({"artifact": "", "recipe": "", "quantized weights": ""}, rows)])


def _engines(result: CompareResult) -> Section | None:
    rows = [
        (
            row["artifact"],
            row["engine"],
            row["engine_bytes"] / 1e6,
            row["kernels"],
            row["int8_linears"],
            row["int8_mac_share"],
            "–" if row["build_seconds"] is None else f"{row['build_seconds']:.1f} s",
        )
        for item in result.artifacts
        for row in item.engine_rows()
    ]
    columns = {
        "artifact": "",
        "engine": "",
        "MB": ",.1f",
        "kernels": ",",
        "INT8 linears": ",",
        "INT8 share of MACs": ".2%",
        "built in": "",
    }
    return Section("Engines", "", [Table(columns, rows)]) if rows else None


def _text(item: Estimate | None, spec: str) -> str:
    if item is None:
        return "–"
    return f"{item.value:{spec}} ({item.bounds(spec)})" if item.interval else f"{item.value:{spec}}"
