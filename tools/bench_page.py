"""The page of ``bismooth bench``: latency and throughput over batch and length, ratios, and rooflines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bench_result import BenchResult, Latency, Measured
from .bootstrap import CONFIDENCE
from .page import Figure, Page, Panel, Section, Table, View
from .roofline import ESTIMATE, Bound, Gpu

_COLOURS = ("--plain", "--second", "--third", "--good", "--bad")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
_MARGIN, _ROW = 96, 34
_SPAN = 10.0
"""How far the rooflines reach beyond the points, as a factor."""


def bench_page(result: BenchResult) -> Page:
    """The page of a result."""
    names = [str(engine.subject.path) for engine in result.engines]
    title = f"Latency of {', '.join(names)}" if result.measured else f"Bounds of {', '.join(names)}"
    facts = {key: str(value) for key, value in result.machine.items()}
    if result.measured:
        facts |= {"new tokens": str(result.settings["new_tokens"]), "prompts": result.settings["prompts"]}
    parts = [*_measured(result), *_bounded(result), _engines(result)]
    return Page(title, _verdict(result), not result.interrupted, facts, parts)


def _verdict(result: BenchResult) -> str:
    """The largest speedup of decoding, or that there is none, and the notes."""
    sentences = ["Interrupted: this is what was measured until then."] if result.interrupted else []
    compared = [item for item in result.measured if item.first is not None]
    if compared:
        best = max(compared, key=lambda item: item.speedups["decode"].value)
        ratio = best.speedups["decode"]
        sentences.append(
            f"{best.subject.path} decodes {best.case} tokens {ratio.value:.2f} times as fast as "
            f"{result.measured[0].subject.path} ({ratio.bounds('.2f') or 'one round'})."
        )
    if not result.measured:
        sentences.append("Nothing was measured: these are bounds from published figures.")
    return " ".join([*sentences, *result.notes])


def _measured(result: BenchResult) -> list[Section]:
    if not result.measured:
        return []
    items = result.measured
    text = "Medians; bars reach from the 5 % to the 95 % quantile. " + (
        f"Engines took turns, {min(len(item.rounds) for item in items)} rounds or more for each batch and length."
    )
    panels = [
        Panel("token", "Per new token", [*_over(items, "token")]),
        Panel("prefill", "Per prompt", [*_over(items, "prefill")]),
    ]
    sections = [Section("Latency", text, [*panels, _latency_table(items)])]
    rates = [View(name, [_rates(items, name)]) for name in ("new tokens", "tokens of prompts")]
    sections.append(Section("Throughput", "Tokens per second of all rows: medians of the rounds.", [
        Panel("throughput", "Rate of", rates, _MARGIN + _ROW * len(items))
    ]))  # fmt: skip
    compared = [item for item in items if item.first is not None]
    if compared:
        first = items[0].subject.path
        text = (
            f"Times as fast as {first}: medians of the ratios within rounds. Bars are {CONFIDENCE:.0%} intervals of a "
        )
        text += "bootstrap over rounds; one that does not cross 1 is more than the noise between rounds."
        views = [View(name, [_ratios(compared, name)]) for name in ("decode", "prefill")]
        sections.append(Section("Ratios", text, [Panel("ratios", "Step", views, _MARGIN + _ROW * len(compared))]))
    return sections


def _over(items: Sequence[Measured], step: str) -> list[View]:
    """A view over the length per batch, and one over the batch per length, where there are several."""
    batches = list(dict.fromkeys(item.case.batch for item in items))
    lengths = list(dict.fromkeys(item.case.prompt_length for item in items))
    views: list[View] = []
    for batch in batches:
        chosen = [item for item in items if item.case.batch == batch]
        views.append(_lines(chosen, step, "tokens of the prompt", f"batch {batch}"))
    for length in lengths if len(batches) > 1 else []:
        chosen = [item for item in items if item.case.prompt_length == length]
        views.append(_lines(chosen, step, "batch", f"prompts of {length}"))
    return views


def _lines(items: Sequence[Measured], step: str, axis: str, name: str) -> View:
    traces: list[dict[str, Any]] = []
    for place, engine in enumerate(dict.fromkeys(str(item.subject.path) for item in items)):
        own = [item for item in items if str(item.subject.path) == engine]
        times: list[Latency] = [item.token if step == "token" else item.prefill for item in own]
        colour = _COLOURS[place % len(_COLOURS)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": engine,
                "x": [item.case.batch if axis == "batch" else item.case.prompt_length for item in own],
                "y": [1e3 * time.p50 for time in times],
                "marker": {"color": colour, "size": 9, "symbol": _SYMBOLS[place % len(_SYMBOLS)]},
                "line": {"color": colour, "width": 2},
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [1e3 * (time.p95 - time.p50) for time in times],
                    "arrayminus": [1e3 * (time.p50 - time.p5) for time in times],
                    "color": colour,
                },
            }
        )
    layout = {
        "xaxis": {"title": {"text": axis}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": f"ms per {'new token' if step == 'token' else 'prompt'}"}, "rangemode": "tozero"},
        "legend": {"orientation": "h", "y": -0.25},
        "showlegend": True,
    }
    return View(name, [Figure(f"Latency of {len(traces)} engines over the {axis}, {name}", traces, layout)])


def _latency_table(items: Sequence[Measured]) -> Table:
    columns = {
        "engine": "",
        "batch × prompt": "",
        "prefill, ms": "",
        "first token, ms": "",
        "token, ms": "",
        "p90": ",.4g",
        "p99": ",.4g",
        "tokens/s": ",.4g",
        "weights and caches read, GB/s": "",
    }
    rows = [
        (
            str(item.subject.path),
            str(item.case),
            _in_ms(item.prefill),
            _in_ms(item.first_token),
            _in_ms(item.token),
            1e3 * item.token.p90,
            1e3 * item.token.p99,
            item.decode_rate,
            "–" if item.read_rate is None else f"{item.read_rate / 1e9:.3g}",
        )
        for item in items
    ]
    return Table(columns, rows)


def _in_ms(latency: Latency) -> str:
    median, span = latency.in_ms()
    return f"{median} ({span})"


def _rates(items: Sequence[Measured], name: str) -> Figure:
    rates = [item.decode_rate if name == "new tokens" else item.prefill_rate for item in items]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": rates,
        "y": _labels(items),
        "marker": {"color": "--second"},
        "hovertemplate": "%{y}<br>%{x:,.4g} tokens/s<extra></extra>",
    }
    return Figure(f"Rates of {len(items)} engines and cases", [trace], _by_label("tokens per second"))


def _ratios(items: Sequence[Measured], step: str) -> Figure:
    found = [item.speedups[step] for item in items]
    bars = [ratio.interval for ratio in found if ratio.interval]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [ratio.value for ratio in found],
        "y": _labels(items),
        "marker": {"color": "--second", "size": 10},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [bar.high - ratio.value for bar, ratio in zip(bars, found, strict=False)],
            "arrayminus": [ratio.value - bar.low for bar, ratio in zip(bars, found, strict=False)],
            "color": "--second",
            "visible": bool(bars),
        },
    }
    one = {
        "type": "line",
        "x0": 1,
        "x1": 1,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": "--plain", "width": 2},
    }
    layout = _by_label("times as fast") | {"shapes": [one]}
    return Figure(f"Ratios of {len(items)} engines and cases", [trace], layout)


def _labels(items: Sequence[Measured]) -> list[str]:
    return [f"{item.subject.path}, {item.case}" for item in items]


def _by_label(axis: str) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": axis}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "showlegend": False,
    }


def _bounded(result: BenchResult) -> list[Section]:
    if not result.bounds:
        return []
    gpus = list(dict.fromkeys(bound.gpu for _, bound in result.bounds))
    views = [_roofline(gpu, result) for gpu in gpus]
    columns = {
        "engine": "",
        "GPU": "",
        "step": "",
        "batch × positions": "",
        "at least, ms": ",.4g",
        "at most, tokens/s": ",.4g",
        "limit": "",
    }
    rows = [tuple(result.bound_row(*item).values()) for item in result.bounds]
    published = [
        (gpu.name, f"SM{gpu.capability}", gpu.gb_per_second, gpu.float16_tops, gpu.int8_tops, _origin(gpu))
        for gpu in gpus
    ]
    figures = {"GPU": "", "capability": "", "GB/s": ",g", "float16 TOPS": ",g", "INT8 TOPS": ",g", "published at": ""}
    text = f"{ESTIMATE} Points are steps: as many operations per second as their bytes and operations allow at most."
    return [
        Section(
            "Rooflines (estimates)",
            text,
            [Panel("roofline", "GPU", views, 420), Table(columns, rows), Table(figures, published)],
        )
    ]


def _origin(gpu: Gpu) -> str:
    return f"{gpu.source} ({gpu.note})" if gpu.note else gpu.source


def _roofline(gpu: Gpu, result: BenchResult) -> View:
    """Both roofs, and a point per engine and step."""
    own = [(engine, bound) for engine, bound in result.bounds if bound.gpu == gpu]
    intensities = [bound.cost.operations / bound.cost.bytes for _, bound in own]
    ridge = gpu.int8_tops * 1e12 / (gpu.gb_per_second * 1e9)
    low, high = min([*intensities, ridge]) / _SPAN, max([*intensities, ridge]) * _SPAN
    traces: list[dict[str, Any]] = [
        _roof(gpu, f"{name} roof", rate, low, high, dash)
        for name, rate, dash in (("INT8", gpu.int8_tops, "solid"), ("float16", gpu.float16_tops, "dot"))
    ]
    for place in dict.fromkeys(engine for engine, _ in own):
        traces += [_points(place, phase, own, result) for phase in ("prefill", "decode")]
    layout = {
        "xaxis": {"title": {"text": "operations per byte"}, "type": "log", "dtick": 1},
        "yaxis": {"title": {"text": "operations per second"}, "type": "log", "dtick": 1, "exponentformat": "power"},
        "legend": {"orientation": "h", "y": -0.25},
        "showlegend": True,
    }
    text = f"{gpu.name}: {gpu.gb_per_second:g} GB/s. Not measured."
    return View(gpu.name, [Figure(f"Roofline of {gpu.name} with {len(own)} steps", traces, layout)], text)


def _roof(gpu: Gpu, name: str, tops: float, low: float, high: float, dash: str) -> dict[str, Any]:
    ridge = tops * 1e12 / (gpu.gb_per_second * 1e9)
    xs = [low, ridge, high]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": xs,
        "y": [min(x * gpu.gb_per_second * 1e9, tops * 1e12) for x in xs],
        "line": {"color": "--plain", "width": 2, "dash": dash},
        "hoverinfo": "skip",
    }


def _points(place: int, phase: str, own: Sequence[tuple[int, Bound]], result: BenchResult) -> dict[str, Any]:
    steps = [bound for engine, bound in own if engine == place and bound.phase == phase]
    colour = _COLOURS[place % len(_COLOURS)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{result.engines[place].subject.path}, {phase}",
        "x": [bound.cost.operations / bound.cost.bytes for bound in steps],
        "y": [bound.cost.operations / bound.seconds for bound in steps],
        "text": [
            f"{bound.batch} × {bound.positions}: at least {1e3 * bound.seconds:.4g} ms, {bound.limit}"
            for bound in steps
        ],
        "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
        "marker": {"color": colour, "size": 11, "symbol": "circle" if phase == "decode" else "diamond"},
    }


def _engines(result: BenchResult) -> Section:
    columns = {"engine": "", "runtime": "", "recipe": "", "MB": ",.1f", "loaded in": "", "peak memory": ""}
    rows = [
        (
            row["engine"],
            row["runtime"],
            row["recipe"],
            row["engine_bytes"] / 1e6,
            f"{row['load_seconds']:.2f} s" if "load_seconds" in row else "–",
            f"{row['peak_rss_bytes'] / 1e6:,.0f} MB" if row.get("peak_rss_bytes") else "–",
        )
        for row in (engine.to_row() for engine in result.engines)
    ]
    return Section("Engines", "", [Table(columns, rows)])
