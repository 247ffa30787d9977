"""What the bench by size found, as JSON and as the tables of docs/scale.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from .bench_scale_fit import MAX_PEAK, Estimate, Growth, between, fit, forecast, judge
from .bench_scale_rows import LARGE, MORE, NO_BUDGET, STEPS, STREAMED, WHOLE, Row
from .cli_options import parse_memory
from .large_model import LLAMA3_70B, LLAMA3_405B, Shape

MAX_KL_DIFFERENCE = 1e-4
"""Of the small model's figures, streamed from whole."""

MIN_CONVERSION = 0.6
"""Of the rate at which ``cp`` moves the same bytes, that of INT8 conversion."""

MAX_SMALL_PEAK = 700e6
"""Bytes, of the small model streamed."""

MODELS: Mapping[str, Shape] = {"LLaMA3-70B": LLAMA3_70B, "LLaMA3-405B": LLAMA3_405B}
"""What forecasts are for."""

TOKENS = 8 * 512
"""Of text that forecasts are for, beside what was measured: as many as ``calibrate`` reads by default."""

LEAST_MEMORY = "least_memory_bytes"
"""The figure of a model's export that says with which ``--memory`` its calibration runs."""

_FORMAT, _VERSION = "bismooth-scale", 1


@dataclass(frozen=True)
class Forecast:
    """Of a step on a target: seconds on the machine that was measured, for so many tokens."""

    model: str
    step: str
    tokens: int
    seconds: Estimate

    def to_json(self) -> dict[str, Any]:
        seconds = {"seconds": self.seconds.value, "standard_error": self.seconds.error}
        return {"model": self.model, "step": self.step, "tokens": self.tokens, **seconds}


@dataclass(frozen=True)
class Room:
    """Bytes that a target takes.

    Attributes:
        model: name.
        source: weights in 16 bits; the float artifact links them.
        statistics: of ``calibrate``.
        quantized: of ``quantize``.
        export: the row of its export, if that was measured.
        most_peak: the largest measured peak, all of it in proportion to a block's parameters.
    """

    model: str
    source: int
    statistics: int
    quantized: int
    most_peak: int
    export: Row | None

    @property
    def disk(self) -> int:
        """Bytes of all that lies on disk at the end."""
        return self.source + self.statistics + self.quantized


@dataclass(frozen=True)
class ScaleResult:
    """Rows, and what follows from them; ``shape`` is that of the large models, but for their blocks."""

    rows: tuple[Row, ...]
    shape: Shape
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def blocks(self) -> list[int]:
        """Sizes of the large models."""
        return sorted({row.blocks for row in self.rows if row.model == LARGE})

    def of(self, step: str) -> dict[int, Row]:
        """Blocks → row of a large model."""
        rows = {row.blocks: row for row in self.rows if (row.model, row.step) == (LARGE, step)}
        return dict(sorted(rows.items()))

    def growth(self) -> list[Growth]:
        """Time and memory of each step by the number of blocks."""
        return [
            judge(
                step,
                {blocks: row.seconds for blocks, row in rows.items()},
                {blocks: row.peak_bytes for blocks, row in rows.items()},
                self._budget if STEPS[step].has_budget else MAX_PEAK,
                flat=not step.endswith(MORE),
            )
            for step in STEPS
            if (rows := self.of(step))
        ]

    @property
    def _budget(self) -> float:
        """Bytes that a step may take that was given a budget, if there was one."""
        memory = self.settings["memory"]
        return MAX_PEAK if memory == NO_BUDGET else min(MAX_PEAK, parse_memory(memory) or MAX_PEAK)

    def forecasts(self) -> Iterator[Forecast]:
        """For targets, of steps that were measured with three sizes or more."""
        lines = {growth.step: growth.line for growth in self.growth() if growth.line}
        for model, target in MODELS.items():
            for name, line in lines.items():
                if name.endswith(MORE) or name == "export":  # which is measured
                    continue
                step, few = STEPS[name], forecast(line, self.shape, target)
                yield Forecast(model, name, step.tokens, few)
                if more := lines.get(name + MORE):
                    share = (TOKENS - step.tokens) / (STEPS[name + MORE].tokens - step.tokens)
                    yield Forecast(model, name, TOKENS, between(few, forecast(more, self.shape, target), share))

    def rooms(self) -> Iterator[Room]:
        """For targets, once calibration and quantization were measured with three sizes or more."""
        written = {
            step: fit(self.blocks, [row.written_bytes for row in self.of(step).values()])
            for step in ("calibrate", "quantize")
            if len(self.of(step)) == len(self.blocks) > 2
        }
        if len(written) < 2:
            return
        peak = max(row.peak_bytes for row in self.rows if row.model == LARGE)
        for model, target in MODELS.items():
            statistics = forecast(written["calibrate"], self.shape, target, by_channels=True)
            yield Room(
                model,
                2 * target.parameters,
                round(statistics.value),
                round(forecast(written["quantize"], self.shape, target).value),
                round(peak * target.block_parameters / self.shape.block_parameters),
                next((row for row in self.rows if (row.model, row.step) == (model, "export")), None),
            )

    def failures(self) -> list[str]:
        """What does not hold, a sentence each."""
        grown = (failure for growth in self.growth() for failure in growth.failures)
        return [*grown, *self._conversion_failures(), *self._small_failures()]

    def _conversion_failures(self) -> Iterator[str]:
        copied = self.of("cp")
        for blocks, row in self.of("convert").items():
            if blocks in copied and (rate := copied[blocks].seconds / row.seconds) < MIN_CONVERSION:
                yield (
                    f"convert: {blocks} blocks: at {rate:.0%} of the rate of cp, {MIN_CONVERSION:.0%} is the least "
                    "allowed."
                )

    def _small_failures(self) -> Iterator[str]:
        for row in self.rows:
            if row.model == STREAMED and row.peak_bytes > MAX_SMALL_PEAK:
                peak, limit = row.peak_bytes / 1e6, MAX_SMALL_PEAK / 1e6
                yield f"{row.model}: {row.step}: peak memory is {peak:.0f} MB, at most {limit:.0f} MB is allowed."
        whole, streamed = self._verified(WHOLE), self._verified(STREAMED)
        for name in ("kl", "int8_kl") if whole and streamed else ():
            off = abs(streamed[name] - whole[name])
            if off > MAX_KL_DIFFERENCE:
                limit = f"at most {MAX_KL_DIFFERENCE:g} is allowed"
                yield f"{STREAMED}: verify: {name} is {off:.2g} off that of the whole model, {limit}."

    def _verified(self, model: str) -> Mapping[str, float]:
        found = [row.figures for row in self.rows if (row.model, row.step) == (model, "verify")]
        return found[0] if found else {}

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "rows": [asdict(row) for row in self.rows],
            "growth": [growth.to_json() for growth in self.growth()],
            "forecasts": [item.to_json() for item in self.forecasts()],
            "rooms": [asdict(room) for room in self.rooms()],
            "failures": self.failures(),
        }

    def markdown(self) -> str:
        """Tables with a heading each, and what does not hold."""
        machine = self.machine
        where = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.1f} GB of memory"
        parts = [f"Measured on {where}, with `--memory {self.settings['memory']}`."]
        tables = {
            "Large models": self._measured(),
            "Growth": self._grown(),
            "SmolLM2-135M": self._small(),
            "Forecast: time": self._times(),
            "Forecast: space": self._spaces(),
        }
        parts += [f"### {title}\n\n{_markdown(rows)}" for title, rows in tables.items() if rows]
        parts += [f"**Does not hold.** {failure}" for failure in self.failures()]
        return "\n\n".join(parts) + "\n"

    def _measured(self) -> list[dict[str, str]]:
        return [self._step(blocks, name) for blocks in self.blocks for name in STEPS if blocks in self.of(name)]

    def _step(self, blocks: int, name: str) -> dict[str, str]:
        row, beside = self.of(name)[blocks], STEPS[name].beside
        same = self.of(beside).get(blocks) if beside else None
        return {
            "blocks": str(blocks),
            "weights, GB": _gb(2 * replace(self.shape, blocks=blocks).parameters, 1),
            "step": _title(name, STEPS[name].tokens),
            "s": f"{row.seconds:.1f}",
            "the same bytes": f"`{beside}` {same.seconds:.1f} s" if same else "",
            "ratio": f"{row.seconds / same.seconds:.2f}" if same else "",
            "peak memory, GB": _gb(row.peak_bytes),
            "written, GB": _gb(row.written_bytes),
        }

    def _grown(self) -> list[dict[str, str]]:
        rows: list[dict[str, str]] = []
        for growth in self.growth():
            line, (least, most) = growth.line, growth.peaks
            rows.append(
                {
                    "step": _title(growth.step, STEPS[growth.step].tokens),
                    "s per block": f"{line.per_block:.2f} ± {line.at(0, 1).error:.2f}" if line else "",
                    "s besides": f"{line.fixed:.1f} ± {line.at(1, 0).error:.1f}" if line else "",
                    "ns per parameter": f"{1e9 * line.per_block / self.shape.block_parameters:.3g}" if line else "",
                    "R²": f"{line.r2:.4f}" if line else "",
                    "largest deviation": f"{line.deviation:.1%}" if line else "",
                    "peak memory, GB": f"{_gb(least)} to {_gb(most)}",
                    "holds": "no" if growth.failures else "yes" if line else "memory does",
                }
            )
        return rows

    def _small(self) -> list[dict[str, str]]:
        return [
            {
                "SmolLM2-135M": row.model.rpartition(" ")[2],
                "step": f"`{row.step}`",
                "s": f"{row.seconds:.1f}",
                "peak memory, MB": f"{row.peak_bytes / 1e6:.0f}",
                **{name: _figure(row.figures.get(name)) for name in ("kl", "int8_kl", "top1", "perplexity_ratio")},
            }
            for row in self.rows
            if row.model in (WHOLE, STREAMED)
        ]

    def _times(self) -> list[dict[str, str]]:
        rows: dict[tuple[str, int], dict[str, str]] = {}
        for item in self.forecasts():
            row = rows.setdefault((item.step, item.tokens), {"step": _title(item.step, item.tokens)})
            row[item.model] = f"{_duration(item.seconds.value)} ± {_duration(item.seconds.error)}"
        return list(rows.values())

    def _spaces(self) -> list[dict[str, str]]:
        return [
            {
                "": room.model,
                "weights, GB": _gb(room.source, 0),
                "statistics, GB": _gb(room.statistics, 1),
                "quantized, GB": _gb(room.quantized, 0),
                "disk, GB": _gb(room.disk, 0),
                "`export`, measured": f"{row.seconds:.0f} s, {_gb(row.peak_bytes)} GB" if (row := room.export) else "",
                "`calibrate` runs with, GB": _gb(row.figures[LEAST_MEMORY]) if row else "",
                "other peaks at most, GB": _gb(room.most_peak, 1),
            }
            for room in self.rooms()
        ]


def _title(step: str, tokens: int) -> str:
    recipe = STEPS[step].recipe
    command = f"quantize --recipe {recipe}" if recipe else step.removesuffix(MORE)
    return f"`{command}`" + (f", {tokens} tokens" if tokens else "")


def _gb(count: float, digits: int = 2) -> str:
    return f"{count / 1e9:.{digits}f}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _duration(seconds: float) -> str:
    """Seconds below a minute, minutes below three hours, and hours."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    table = Table(box=MARKDOWN)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*row.values())
    console = Console(file=StringIO(), width=1000, color_system=None, markup=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip().splitlines())  # pyright: ignore
