"""Verify an artifact hop by hop, from the source model to the kernels of its engines, so that a failure names its hop.

Each hop compares two programs on the same token windows. The float32 graph's logits are kept in a temporary file, so memory
does not grow with the number of windows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.audit import Audit
from ..engines.onnxruntime import Mode, Session
from ..export.artifact import Artifact
from ..export.errors import BismoothError, GateError
from ..passes.gates import Gates, Hop
from .metrics import LogitComparison, LogitMetrics

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

SOURCE_WINDOWS = 2
"""Windows on which the torch model runs: it is loaded whole, and equality shows on any text."""

HALF_WINDOWS = 2
"""Windows of the 16-bit simulation, which is slow; overflow depends on the tokens seen first of all."""


@dataclass(frozen=True)
class HopResult:
    """One hop: what was compared with what, and how it came out.

    Attributes:
        metrics: Figures by name; those with a gate have the gate's name.
        failures: Gates that were missed, a sentence each.
        skipped: Why the hop was not judged, or None.
    """

    hop: Hop
    compared: str
    metrics: dict[str, Any]
    failures: tuple[str, ...] = ()
    skipped: str | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "hop": str(self.hop),
            "compared": self.compared,
            "metrics": self.metrics,
            "failures": list(self.failures),
            "skipped": self.skipped,
            "seconds": round(self.seconds, 2),
        }

    def to_row(self) -> dict[str, Any]:
        """The hop as a row of a table."""
        shown = {key: self.metrics.get(key) for key in ("kl", "top1", "perplexity_ratio", "relative_error")}
        verdict = self.skipped or ("failed" if self.failures else "passed")
        return {"hop": str(self.hop), "compared": self.compared, **shown, "verdict": verdict}


@dataclass(frozen=True)
class VerifyResult:
    """All hops of an artifact."""

    artifact: Path
    windows: int
    length: int
    hops: tuple[HopResult, ...]
    layers: tuple[dict[str, Any], ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(failure for hop in self.hops for failure in hop.failures)

    @property
    def verdict(self) -> str:
        """``failed``, or ``passed`` with the hops that could not be judged."""
        if self.failures:
            return "failed"
        skipped = [str(hop.hop) for hop in self.hops if hop.skipped]
        return f"passed; not judged: {', '.join(skipped)}" if skipped else "passed"

    def summary(self) -> dict[str, Any]:
        """The figures that people ask for first: of the INT8 kernels against the float32 graph."""
        for hop in reversed(self.hops):
            if hop.hop in (Hop.INT8, Hop.REFERENCE, Hop.HALF) and "perplexity" in hop.metrics:
                keys = ("reference_perplexity", "perplexity", "perplexity_ratio", "kl", "top1")
                return {key: hop.metrics[f"float_{key}" if f"float_{key}" in hop.metrics else key] for key in keys}
        return {}

    def to_json(self) -> dict[str, Any]:
        return {
            "artifact": str(self.artifact),
            "windows": self.windows,
            "length": self.length,
            "verdict": self.verdict,
            **self.summary(),
            "hops": [hop.to_row() for hop in self.hops],
            "failures": list(self.failures),
        }

    def report(self) -> dict[str, Any]:
        """Everything, as it is stored in ``verify.json``."""
        return self.to_json() | {"hops": [hop.to_json() for hop in self.hops], "layers": list(self.layers)}


@dataclass
class _Judge:
    """Collects a hop's figures and holds them against its gates."""

    gates: Gates
    hop: Hop
    compared: str
    start: float = field(default_factory=time.perf_counter)

    def result(self, metrics: dict[str, Any], failures: Sequence[str] = ()) -> HopResult:
        missed = [
            sentence
            for name in self.gates.to_dict()
            if name in metrics and Gates.hop(name) is self.hop and (sentence := self.gates.missed(name, metrics[name]))
        ]
        seconds = time.perf_counter() - self.start
        return HopResult(self.hop, self.compared, metrics, (*missed, *failures), None, seconds)

    def skip(self, reason: str) -> HopResult:
        return HopResult(self.hop, self.compared, {}, (), reason, time.perf_counter() - self.start)


def verify_artifact(
    artifact: Artifact,
    ids: Ids,
    gates: Gates,
    hops: Sequence[Hop] = tuple(Hop),
    progress: Progress = lambda _step, _done, _total: None,
) -> VerifyResult:
    """Run the hops that the artifact has on token windows ids [N, S].

    Raises:
        BismoothError: a graph cannot be run.
    """
    results: list[HopResult] = []
    verifier = _Verifier(artifact, ids, gates, progress)
    with verifier.reference_logits() as reference:
        for hop, run in verifier.hops(reference).items():
            if hop in hops:
                results.append(run())
    layers = verifier.layer_sqnr() if Hop.REFERENCE in hops else ()
    return VerifyResult(artifact.path, len(ids), ids.shape[1], tuple(results), layers)


class _Verifier:
    def __init__(self, artifact: Artifact, ids: Ids, gates: Gates, progress: Progress) -> None:
        self._artifact, self._ids, self._gates, self._progress = artifact, ids, gates, progress
        graphs = artifact.manifest.graphs
        self._float_role = "reference" if "reference" in graphs else "float32"

    def hops(self, reference: Logits) -> dict[Hop, Callable[[], HopResult]]:
        """The hops of this kind of artifact, in order."""
        quantized = self._artifact.manifest.kind == "quantized"
        hops: dict[Hop, Callable[[], HopResult]] = {Hop.FLOAT: lambda: self._float(reference)}
        if quantized:
            hops[Hop.FOLDED] = lambda: self._folded(reference)
            hops[Hop.REFERENCE] = lambda: self._reference(reference)
            hops[Hop.INT8] = lambda: self._int8(reference)
        hops[Hop.HALF] = lambda: self._half(reference)
        if quantized:
            hops[Hop.AUDIT] = self._audit
            hops[Hop.DEVICE] = self._device
        return hops

    @contextmanager
    def reference_logits(self) -> Generator[Logits]:
        """Logits [N, S, V] of the float32 graph, in a temporary file."""
        with tempfile.TemporaryDirectory(prefix=".verify-", dir=self._artifact.path) as folder:
            logits: Logits | None = None
            for number, window in enumerate(self._logits(self._float_role, "plain", "run the float32 graph")):
                if logits is None:
                    shape = (len(self._ids), *window.shape)
                    logits = np.memmap(Path(folder) / "logits", np.float32, "w+", shape=shape)
                logits[number] = window
            assert logits is not None
            yield logits

    def _logits(self, role: str, mode: Mode, step: str, windows: int | None = None) -> Iterator[Logits]:
        ids = self._ids[:windows]
        with Session(self._artifact.graph(role), mode=mode) as session:
            for number, logits in enumerate(session.windows(ids)):
                self._progress(step, number + 1, len(ids))
                yield logits[0]

    def _compare(self, reference: Logits, candidate: Iterator[Logits]) -> LogitMetrics:
        comparison = LogitComparison()
        for number, logits in enumerate(candidate):
            comparison.update(self._ids[number][None], np.asarray(reference[number])[None], logits[None])
        return comparison.result()

    def _judge(self, hop: Hop, compared: str) -> _Judge:
        return _Judge(self._gates, hop, compared)

    def _float(self, reference: Logits) -> HopResult:
        judge = self._judge(Hop.FLOAT, "torch FP32 → ONNX FP32")
        if self._artifact.manifest.architecture is None:
            return judge.skip("the artifact was made from an ONNX file")
        from .torch_model import torch_logits

        windows = self._ids[:SOURCE_WINDOWS]
        comparison = LogitComparison()
        for number, logits in enumerate(torch_logits(self._artifact.path, windows)):
            self._progress("run the torch model", number + 1, len(windows))
            comparison.update(windows[number][None], logits[None], np.asarray(reference[number])[None])
        metrics = _plain(comparison.result())
        return judge.result(metrics | {"float_error": metrics["relative_error"], "float_kl": metrics["kl"]})

    def _folded(self, reference: Logits) -> HopResult:
        judge = self._judge(Hop.FOLDED, "ONNX FP32 → smoothing folded in")
        if "folded" not in self._artifact.manifest.graphs:
            return judge.skip("nothing was folded")
        windows = SOURCE_WINDOWS
        metrics = _plain(self._compare(reference, self._logits("folded", "plain", "run the folded graph", windows)))
        return judge.result(metrics | {"folded_error": metrics["relative_error"]})

    def _reference(self, reference: Logits) -> HopResult:
        judge = self._judge(Hop.REFERENCE, "ONNX FP32 → Q/DQ in float")
        candidate = self._logits("float32", "reference", "run the Q/DQ graph in float")
        return _gated(judge, lambda: _plain(self._compare(reference, candidate)))

    def _int8(self, reference: Logits) -> HopResult:
        """Both Q/DQ runs side by side, so that no second file of logits is needed."""
        judge = self._judge(Hop.INT8, "Q/DQ in float → INT8 kernels")
        kernels, against_float = LogitComparison(), LogitComparison()
        exact = self._logits("float32", "reference", "compare INT8 kernels")
        fast = self._logits("float32", "int8", "run INT8 kernels")

        def compare() -> dict[str, Any]:
            for number, (a, b) in enumerate(zip(exact, fast, strict=True)):
                window = self._ids[number][None]
                kernels.update(window, a[None], b[None])
                against_float.update(window, np.asarray(reference[number])[None], b[None])
            metrics = _plain(kernels.result())
            metrics |= {f"float_{key}": value for key, value in _plain(against_float.result()).items()}
            return metrics | {"int8_kl_vs_reference": metrics["kl"]}

        return _gated(judge, compare)

    def _half(self, reference: Logits) -> HopResult:
        judge = self._judge(Hop.HALF, "ONNX FP32 → 16-bit graph, rounded at every edge")
        role = next((role for role in ("float16", "bfloat16") if role in self._artifact.manifest.graphs), None)
        if role is None:
            return judge.skip("the artifact has no 16-bit graph")
        metrics, failures = self._simulate(role, reference)
        if (float_role := f"reference_{role}") in self._artifact.manifest.graphs:
            plain, more = self._simulate(float_role, reference)
            metrics |= {f"unquantized_{key}": value for key, value in plain.items()}
            failures += [f"unquantized graph: {failure}" for failure in more]
            metrics["half_max_ratio"] = max(metrics["half_max_ratio"], plain["half_max_ratio"])
        return judge.result(metrics, failures)

    def _simulate(self, role: str, reference: Logits) -> tuple[dict[str, Any], list[str]]:
        from .halfsim import HalfSimulation

        windows = self._ids[:HALF_WINDOWS]
        comparison = LogitComparison()
        with HalfSimulation(self._artifact.graph(role)) as simulation:
            peaks: NDArray[np.float64] | None = None
            for number, window in enumerate(windows):
                run = simulation.run(window[None])
                peaks = run.ratios if peaks is None else np.fmax(peaks, run.ratios) + 0 * run.ratios
                self._progress(f"simulate {role}", number + 1, len(windows))
                if np.isfinite(run.logits).all():
                    comparison.update(window[None], np.asarray(reference[number])[None], run.logits)
            assert peaks is not None
            limit = self._gates.half_max_ratio or np.inf
            failures = [str(finding) for finding in simulation.findings(peaks, limit)][:5]
            worst = int(np.argmax(np.where(np.isnan(peaks), np.inf, peaks)))
            metrics = {"half_max_ratio": float(peaks[worst]), "half_max_node": simulation.edges[worst].node}
            metrics["edges"] = len(simulation.edges)
        if np.isfinite(peaks).all():
            metrics |= _plain(comparison.result())
        return metrics, [failure for failure in failures if not np.isfinite(peaks).all()]

    def _audit(self) -> HopResult:
        judge = self._judge(Hop.AUDIT, "Q/DQ graph → kernels of the engines")
        engines = sorted(self._artifact.path.glob("engines/*/*.audit.json"))
        if not engines:
            return judge.skip("no engine was built")
        if not any(site.get("quantized") for site in _linear_counts(self._artifact)):
            return judge.skip("the recipe quantizes nothing")
        shares: dict[str, float] = {}
        for path in engines:
            audit = read_audit(path)
            shares[path.parent.name] = _meant_share(audit)
        return judge.result({"int8_mac_share": min(shares.values()), "engines": shares})

    def _device(self) -> HopResult:
        judge = self._judge(Hop.DEVICE, "FP16 engine → INT8 engine")
        return judge.skip("needs an NVIDIA GPU")

    def layer_sqnr(self) -> tuple[dict[str, Any], ...]:
        """Per quantized linear, the signal-to-noise ratio of its output in the running model, in dB."""
        from .layers import layer_sqnr

        if self._artifact.manifest.kind != "quantized":
            return ()
        clean = "folded" if "folded" in self._artifact.manifest.graphs else "reference"
        return layer_sqnr(self._artifact.graph(clean), self._artifact.graph("float32"), self._ids[:1], self._progress)


def _gated(judge: _Judge, compare: Callable[[], dict[str, Any]]) -> HopResult:
    """A comparison whose candidate may produce logits that are no numbers: then the hop fails, not the run."""
    try:
        return judge.result(compare())
    except GateError as error:
        return judge.result({}, [f"{judge.hop}: {error}"])


def _plain(metrics: LogitMetrics) -> dict[str, Any]:
    """The figures under the names that gates use."""
    return {
        "reference_perplexity": metrics.reference_perplexity,
        "perplexity": metrics.perplexity,
        "perplexity_ratio": metrics.perplexity_ratio,
        "kl": metrics.kl_mean,
        "kl_p99": metrics.kl_p99,
        "top1": metrics.top1,
        "top1_stable": metrics.top1_stable,
        "cosine_p5": metrics.cosine_p5,
        "max_error": metrics.max_error,
        "relative_error": metrics.relative_error,
    }


def _linear_counts(artifact: Artifact) -> list[dict[str, Any]]:
    return [stage for stage in artifact.manifest.stages if stage.get("stage") == "quantize"]


def _meant_share(audit: Audit) -> float:
    """Share of the MACs of the linears that were meant to be INT8 and are."""
    meant = [linear for linear in audit.linears if linear.meant_int8]
    total = sum(linear.macs for linear in meant)
    return sum(linear.macs for linear in meant if linear.int8) / total if total else 0.0


def read_audit(path: Path) -> Audit:
    """The audit beside an engine.

    Raises:
        BismoothError: the file cannot be read.
    """
    try:
        return Audit.from_json(json.loads(path.read_text("utf-8"))["audit"])
    except (ValueError, KeyError, TypeError) as error:
        raise BismoothError(f"{path}: not an audit file: {error}. Build the engine again.") from error
