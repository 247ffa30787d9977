"""What ``bench`` returns: latencies of engines by case, how they compare with the first, and bounds of GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .bench_subject import Case, Subject
from .bench_timing import Timing
from .bootstrap import CONFIDENCE, RESAMPLES, SEED, Resampling, interval
from .compared import Estimate
from .roofline import ESTIMATE, Bound

FORMAT, FORMAT_VERSION = "bismooth-bench", 1

_QUANTILES = (5, 50, 90, 95, 99)


@dataclass(frozen=True)
class Latency:
    """Quantiles of so many times, in seconds."""

    count: int
    p5: float
    p50: float
    p90: float
    p95: float
    p99: float

    @staticmethod
    def of(times: Sequence[float]) -> Latency:
        return Latency(len(times), *np.percentile(times, _QUANTILES).tolist())

    def in_ms(self) -> tuple[str, str]:
        """The median, and the span from the 5 % to the 95 % quantile."""
        return f"{1e3 * self.p50:.4g}", f"{1e3 * self.p5:.4g}…{1e3 * self.p95:.4g}"


@dataclass(frozen=True)
class Measured:
    """One engine in one case.

    Attributes:
        rounds: One prompt and the tokens that follow each.
        first: The rounds of the first engine; None for that engine itself.
    """

    subject: Subject
    case: Case
    rounds: tuple[Timing, ...]
    first: tuple[Timing, ...] | None

    @property
    def prefill(self) -> Latency:
        return Latency.of([timing.prefill for timing in self.rounds])

    @property
    def first_token(self) -> Latency:
        return Latency.of([timing.first_token for timing in self.rounds])

    @property
    def token(self) -> Latency:
        """Of all new tokens but the first of each round."""
        return Latency.of([seconds for timing in self.rounds for seconds in timing.tokens])

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompts per second, of all rows: median of the rounds."""
        tokens = self.case.batch * self.case.prompt_length
        return float(np.median([tokens / timing.prefill for timing in self.rounds]))

    @property
    def decode_rate(self) -> float:
        """New tokens per second, of all rows: median of the rounds."""
        return float(np.median([self.case.batch * len(timing.tokens) / timing.decode for timing in self.rounds]))

    @property
    def read_rate(self) -> float | None:
        """Bytes per second that decoding must have read, of weights and caches."""
        if self.subject.cost is None:
            return None
        context = self.case.prompt_length + self.case.new_tokens // 2
        return self.subject.cost.decode(self.case.batch, context).bytes * self.decode_rate / self.case.batch

    @property
    def speedups(self) -> dict[str, Estimate]:
        """How many times faster than the first engine: medians of the ratios within rounds."""
        if self.first is None:
            return {}
        pairs = list(zip(self.first, self.rounds, strict=True))
        return {
            "prefill": _ratio([first.prefill / timing.prefill for first, timing in pairs]),
            "decode": _ratio([first.decode / timing.decode for first, timing in pairs]),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": str(self.subject.path),
            "batch": self.case.batch,
            "prompt_length": self.case.prompt_length,
            "prefill": vars(self.prefill),
            "first_token": vars(self.first_token),
            "token": vars(self.token),
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
            "decode_read_bytes_per_second": self.read_rate,
            "speedup": {name: ratio.to_json() for name, ratio in self.speedups.items()} or None,
            "rounds": [{"prefill": timing.prefill, "decode": timing.decode} for timing in self.rounds],
        }

    def to_row(self) -> dict[str, Any]:
        ratios = {
            f"{name}_speedup": f"{ratio.value:.2f}\n{ratio.bounds('.2f')}".rstrip()
            for name, ratio in self.speedups.items()
        }
        return {
            "engine": str(self.subject.path),
            "batch_×_prompt": str(self.case),
            "prefill_ms": "\n".join(self.prefill.in_ms()),
            "first_token_ms": f"{1e3 * self.first_token.p50:.4g}",
            "token_ms": "\n".join(self.token.in_ms()),
            "tokens/s": self.decode_rate,
            **ratios,
        }


@dataclass(frozen=True)
class Benched:
    """An engine, and what it took to open and hold it.

    Attributes:
        load_seconds: of each time that it was opened, imports of its runtime included.
        peak_rss: resident memory of its process in bytes; None if not told.
        reason: why it was not measured, if so.
    """

    subject: Subject
    load_seconds: tuple[float, ...] = ()
    peak_rss: int | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        subject, cost = self.subject, self.subject.cost
        return {
            "engine": str(subject.path),
            "runtime": subject.runtime,
            "recipe": subject.recipe,
            "capabilities": list(subject.record.capabilities),
            "engine_bytes": subject.record.bytes,
            "weight_bytes": cost and cost.weight_bytes,
            "cache_bytes_per_position": cost and cost.cache_bytes,
            "measured": self.reason is None,
            "reason": self.reason,
            "load_seconds": list(self.load_seconds),
            "peak_rss_bytes": self.peak_rss,
        }

    def to_row(self) -> dict[str, Any]:
        row = {
            "engine": str(self.subject.path),
            "runtime": self.subject.runtime,
            "recipe": self.subject.recipe or "float",
            "engine_bytes": self.subject.record.bytes,
        }
        if self.load_seconds:
            row |= {"load_seconds": float(np.median(self.load_seconds)), "peak_rss_bytes": self.peak_rss}
        return row


@dataclass(frozen=True)
class BenchResult:
    """Engines side by side.

    Attributes:
        engines: In the order in which they were given.
        measured: By case, then by engine.
        bounds: Of the engines, by their place in ``engines``.
        settings: What was asked for.
        machine: What it was measured on; empty if nothing was.
        notes: What to know when reading the figures, a sentence each.
        interrupted: Ctrl-C ended the measurement: there are the rounds that all engines had done.
        tools: Versions.
    """

    engines: tuple[Benched, ...]
    measured: tuple[Measured, ...]
    bounds: tuple[tuple[int, Bound], ...]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    tools: Mapping[str, str] = field(default_factory=dict[str, str])

    def brief(self) -> dict[str, Any]:
        """What fits a terminal."""
        text: dict[str, Any] = {}
        if self.measured:
            text["prompts"] = self.settings["prompts"]
            rounds, new_tokens = min(len(item.rounds) for item in self.measured), self.settings["new_tokens"]
            text["rounds"] = f"{rounds}, {new_tokens} new tokens. Below medians: 5 % and 95 % quantiles"
            text["machine"] = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        if self.interrupted:
            text["interrupted"] = True
        if self.notes:
            text["notes"] = "\n".join(self.notes)
        text["engines"] = [engine.to_row() for engine in self.engines]
        if self.measured:
            text["measured"] = [item.to_row() for item in self.measured]
        if self.bounds:
            text |= {"estimates": ESTIMATE, "estimated_on_GPUs": [self.bound_row(*item) for item in self.bounds]}
        return text

    def bound_row(self, engine: int, bound: Bound) -> dict[str, Any]:
        return {
            "engine": str(self.engines[engine].subject.path),
            "gpu": bound.gpu.name,
            "step": bound.phase,
            "batch_×_positions": f"{bound.batch} × {bound.positions}",
            "at_least_ms": 1e3 * bound.seconds,
            "at_most_tokens/s": bound.tokens / bound.seconds,
            "limit": bound.limit,
        }

    def to_json(self) -> dict[str, Any]:
        gpus = dict.fromkeys(bound.gpu for _, bound in self.bounds)
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            **self.settings,
            "interrupted": self.interrupted,
            "machine": dict(self.machine),
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "engines": [engine.to_json() for engine in self.engines],
            "measured": [item.to_json() for item in self.measured],
            "estimates": {
                "what": ESTIMATE,
                "gpus": [gpu.to_json() for gpu in gpus],
                "steps": [
                    {"engine": str(self.engines[engine].subject.path), **bound.to_json()}
                    for engine, bound in self.bounds
                ],
            }
            if self.bounds
            else None,
            "notes": list(self.notes),
            "tools": dict(self.tools),
        }


def _ratio(ratios: Sequence[float]) -> Estimate:
    """The median, with its interval where there are several rounds."""
    values = np.array(ratios)
    if len(values) < 2:
        return Estimate(float(values[0]), None)
    medians = Resampling(len(values), RESAMPLES, SEED).quantile(values[:, None], 0.5)
    return Estimate(float(np.median(values)), interval(medians))
