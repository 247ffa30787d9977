"""The verdict on an artifact: one result per hop, each with its figures, its gates and, if it failed, why."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from ..passes.gates import Gates, Hop

FORMAT, FORMAT_VERSION = "bismooth-verify", 1


def is_report(path: Path, format: str = FORMAT) -> bool:
    """Whether a file is a report of that format, as an earlier run has written it."""
    try:
        document: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and cast(dict[str, Any], document).get("format") == format


@dataclass(frozen=True)
class HopResult:
    """One hop: what was compared with what, and how it came out.

    Attributes:
        metrics: Figures by name; those with a gate have the gate's name. Under ``unmeasured``, why some are not there.
        judged: The gates that were held against the figures.
        failures: What failed, a sentence each.
        skipped: Why the hop was not judged, or None.
        windows: Windows of text that were compared.
        seconds: Wall time.
    """

    hop: Hop
    compared: str
    metrics: dict[str, Any]
    judged: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    skipped: str | None = None
    windows: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """``passed``, ``failed``, ``measured`` (no gate is set for it) or ``skipped``."""
        if self.failures:
            return "failed"
        if self.skipped is not None:
            return "skipped"
        return "passed" if self.judged else "measured"

    def to_json(self) -> dict[str, Any]:
        return {
            "hop": str(self.hop),
            "compared": self.compared,
            "verdict": self.verdict,
            "metrics": self.metrics,
            "judged": list(self.judged),
            "failures": list(self.failures),
            "skipped": self.skipped,
            "windows": self.windows,
            "seconds": round(self.seconds, 2),
        }

    def to_unit(self) -> dict[str, Any]:
        """What :meth:`from_unit` reads."""
        return asdict(self)

    @classmethod
    def from_unit(cls, data: Mapping[str, Any]) -> HopResult:
        """The result that a run which broke off has left."""
        return replace(
            cls(**data), hop=Hop(data["hop"]), judged=tuple(data["judged"]), failures=tuple(data["failures"])
        )

    def to_row(self) -> dict[str, Any]:
        """The hop as a row of a table; ``ppl`` is the ratio of the perplexities."""
        columns = {"kl": "kl", "top1": "top1", "ppl": "perplexity_ratio", "error": "relative_error"}
        figures = {column: self.metrics.get(name) for column, name in columns.items()}
        row = {"hop": str(self.hop), "compared": self.compared, **figures}
        return row | {"seconds": round(self.seconds, 2), "verdict": self.verdict}

    def note(self) -> str | None:
        """What a table has no column for, in a line."""
        if self.skipped is not None:
            return self.skipped
        if "half_max_ratio" in self.metrics:
            return f"{self.metrics['half_max_ratio']:.3g} of the range used, at {self.metrics['half_max_node']}"
        if "latency_ms" in self.metrics:
            float_ms, ms = self.metrics["float_latency_ms"], self.metrics["latency_ms"]
            return f"{self.metrics['device']}: {ms:.3g} ms a window, the float engine {float_ms:.3g} ms"
        if "common_prefix" in self.metrics:
            prefix, count = self.metrics["common_prefix"], self.metrics["continuation"]
            return f"greedy continuations are those of the float graph for {prefix:.3g} of {count} tokens"
        if "unmeasured" in self.metrics:
            return "; ".join(f"{name} was not measured: {why}" for name, why in self.metrics["unmeasured"].items())
        notes = [f"{name} {share:.2%} INT8" for name, share in self.metrics.get("engines", {}).items()]
        chains: Mapping[str, Mapping[str, Any]] = {} if self.failures else self.metrics.get("chains", {})
        notes += [f"the {chain['parts']} parts of {name} {_said_of(chain)}" for name, chain in chains.items()]
        return ", ".join(notes) or None


def _said_of(chain: Mapping[str, Any]) -> str:
    if "skipped" in chain:
        return f"were not run: {chain['skipped']}"
    return f"compute {'the same' if chain['equal'] else 'nearly the same'}"


@dataclass(frozen=True)
class VerifyResult:
    """All hops of an artifact.

    Attributes:
        windows, length: The text: windows of so many tokens.
        gates: The limits that held.
        layers: Per quantized linear, the signal-to-noise ratio of its output in dB, worst first.
        source: Fingerprints of the model and the recipe that were judged.
        data: Where the text came from, with the SHA-256 of its tokens.
        tools: Versions.
    """

    artifact: Path
    windows: int
    length: int
    hops: tuple[HopResult, ...]
    gates: Gates
    layers: tuple[dict[str, Any], ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tools: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def failures(self) -> tuple[str, ...]:
        failures = tuple(failure for hop in self.hops for failure in hop.failures)
        if not failures and not any(hop.verdict in ("passed", "measured") for hop in self.hops):
            reasons = "; ".join(f"{hop.hop}: {hop.skipped}" for hop in self.hops)
            return (f"no hop was judged: {reasons}.",)
        return failures

    def demanding(self, gates: Sequence[str]) -> VerifyResult:
        """The same, where each of ``gates`` that was held against no figure counts as missed."""
        return replace(self, hops=tuple(self._demanded(hop, gates) for hop in self.hops))

    def _demanded(self, hop: HopResult, gates: Sequence[str]) -> HopResult:
        reason = hop.skipped or "it was not measured"
        open_gates = [name for name in gates if Gates.hop(name) is hop.hop and name not in hop.judged]
        why = hop.metrics.get("unmeasured", {})
        missed = tuple(
            f"{hop.hop}: {name} was asked for and could not be judged: {why.get(name, reason)}." for name in open_gates
        )
        return replace(hop, failures=(*hop.failures, *missed))

    @property
    def verdict(self) -> str:
        """``failed``, or ``passed`` with the hops that were not judged."""
        if self.failures:
            return "failed"
        open_hops = [str(hop.hop) for hop in self.hops if hop.verdict != "passed"]
        return f"passed; not judged: {', '.join(open_hops)}" if open_hops else "passed"

    def summary(self) -> dict[str, Any]:
        """The figures that people ask for first: of the INT8 kernels, or else of the next best, against float32."""
        keys = ("reference_perplexity", "perplexity", "perplexity_ratio", "kl", "top1")
        by_hop = {hop.hop: hop.metrics for hop in self.hops}
        for hop, prefix in ((Hop.INT8, "float_"), (Hop.REFERENCE, ""), (Hop.HALF, "")):
            metrics = by_hop.get(hop, {})
            if f"{prefix}perplexity" in metrics:
                return {key: metrics[f"{prefix}{key}"] for key in keys}
        return {}

    def brief(self) -> dict[str, Any]:
        """What fits a terminal."""
        notes = {str(hop.hop): note for hop in self.hops if (note := hop.note())}
        worst = [dict(layer) for layer in self.layers[:5]]
        return {
            "artifact": str(self.artifact),
            "text": f"{self.windows} windows of {self.length} tokens",
            "verdict": self.verdict,
            **self.summary(),
            "hops": [hop.to_row() for hop in self.hops],
            **({"notes": notes} if notes else {}),
            **({"noisiest_layers": worst} if worst else {}),
            "failures": list(self.failures),
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as it is stored in ``verify.json``."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "artifact": str(self.artifact),
            "source": dict(self.source),
            "windows": self.windows,
            "length": self.length,
            **self.data,
            "verdict": self.verdict,
            **self.summary(),
            "hops": [hop.to_json() for hop in self.hops],
            "layers": list(self.layers),
            "gates": self.gates.to_dict(),
            "tools": dict(self.tools),
            "failures": list(self.failures),
        }


@dataclass
class Judge:
    """Takes a hop's time, and holds its figures against its gates."""

    gates: Gates
    hop: Hop
    compared: str
    seconds: float = 0.0

    @contextmanager
    def timed(self) -> Generator[None]:
        """Adds the time of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def result(self, metrics: dict[str, Any], failures: Sequence[str] = (), windows: int = 0) -> HopResult:
        """The hop's result; ``failures`` are those that no gate states."""
        limits = self.gates.to_dict()
        judged = [
            name
            for name, limit in limits.items()
            if limit is not None and Gates.hop(name) is self.hop and metrics.get(name) is not None
        ]
        missed = [sentence for name in judged if (sentence := self.gates.missed(name, metrics[name]))]
        everything = (*missed, *failures)
        return HopResult(self.hop, self.compared, metrics, tuple(judged), everything, None, windows, self.seconds)

    def skip(self, reason: str) -> HopResult:
        return HopResult(self.hop, self.compared, {}, skipped=reason, seconds=self.seconds)
