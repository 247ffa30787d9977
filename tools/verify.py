"""Verify an artifact hop by hop, from the source model to the kernels of its engines, so that a failure names its hop.

Each hop compares two programs on the same token windows, one window at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.base import audit_path
from ..engines.onnxruntime import Session
from ..engines.publish import read_audit
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..export.state import State
from ..export.versions import tool_versions
from ..passes.gates import Gates, Hop
from ..passes.progress import Counter, Progress, silent
from .chains import judge_chains
from .comparison import Comparison, Figures, Ids, Logits, Track, Values, WindowFile, comparison_of, follow
from .decoding import common_prefix, cut_prompts, greedy
from .engine_folder import has_chain
from .hop_programs import NEED_REFERENCE, SOURCE_WINDOWS, HopPrograms, Simulated
from .hops import HopResult, Judge, VerifyResult
from .meant import engine_source
from .programs import Program, Programs, scratch
from .shipped import find_engines

__all__ = ["HopResult", "VerifyResult", "check_gates", "find_hops", "verify_artifact"]

PROMPTS, PROMPT_LENGTH, CONTINUATION = 32, 32, 64
"""Prompts that are continued greedily, their tokens, and new tokens."""

COMPARED = {
    Hop.FLOAT: "torch→ONNX",
    Hop.FOLDED: "ONNX→folded",
    Hop.REFERENCE: "ONNX→Q/DQ float",
    Hop.INT8: "Q/DQ→INT8",
    Hop.DECODE: "windows→tokens",
    Hop.HALF: "FP32→16 bits",
    Hop.AUDIT: "Q/DQ→kernels",
    Hop.DEVICE: "FP16→INT8",
}
_QUANTIZED_ONLY = frozenset({Hop.FOLDED, Hop.REFERENCE, Hop.INT8, Hop.AUDIT, Hop.DEVICE})
_READ_ENGINES = frozenset({Hop.AUDIT, Hop.DEVICE})
_REFERENCE, _EXACT = "outputs of the float32 graph", "outputs of the Q-DQ graph"
_TOO_LARGE = "the model does not fit the memory as a whole, which greedy continuations take"
_SHOWN = 5


def verify_artifact(
    artifact: Artifact,
    ids: Ids,
    gates: Gates,
    hops: Sequence[Hop] = (),
    progress: Progress = silent,
    *,
    memory: int | None = None,
    state: State | None = None,
) -> VerifyResult:
    """Run ``hops``, or all that the artifact has, on token windows ids [N, S].

    A candidate whose outputs are not finite fails its hop.

    Args:
        artifact: what is judged.
        ids: token windows.
        gates: the limits.
        hops: which to run.
        progress: told about the steps.
        memory: bytes that this process may take; most of what the machine has left by default.
        state: where to note what is done, and what an earlier run has done.

    Raises:
        BismoothError: the artifact has no such hop, ``memory`` is too little for one of them, a graph cannot be run, or
            there is no space for the outputs of the float graph.
    """
    wanted = find_hops(artifact, hops)
    with ExitStack() as stack:
        folder = state.folder if state else stack.enter_context(scratch(artifact.path))
        programs = Programs(ids, folder, progress, memory, state)
        table = HopPrograms(artifact, *ids.shape)
        programs.check(
            artifact.path, list(dict.fromkeys(table.of(wanted))), "a shorter --length, or other hops with --hop"
        )
        verifier = _Verifier(artifact, programs, table, gates)
        results = verifier.run(wanted)
        layers = verifier.layer_sqnr() if Hop.REFERENCE in wanted and not verifier.is_broken else ()
    return VerifyResult(
        artifact.path, len(ids), ids.shape[1], results, gates, layers, engine_source(artifact), tools=tool_versions()
    )


def find_hops(artifact: Artifact, hops: Sequence[Hop] = ()) -> list[Hop]:
    """The hops in their order: ``hops``, or all that an artifact of this kind has.

    Raises:
        BismoothError: one of ``hops`` is none of them.
    """
    kind = artifact.manifest.kind
    known = [hop for hop in Hop if kind == "quantized" or hop not in _QUANTIZED_ONLY]
    if Hop.AUDIT not in known and has_chain(artifact):
        known.append(Hop.AUDIT)
    for hop in hops:
        if hop not in known:
            raise BismoothError(f"--hop {hop}: {artifact.path} is a {kind} artifact. Its hops are: {', '.join(known)}.")
    return [hop for hop in known if not hops or hop in hops]


def check_gates(names: Iterable[str], hops: Sequence[Hop]) -> None:
    """Raise :class:`BismoothError` if a gate was named that judges none of ``hops``."""
    for name in names:
        if (hop := Gates.hop(name)) not in hops:
            raise BismoothError(
                f"--gate {name}: has no effect: it judges the hop {hop}, which this run does not have. "
                f"Its hops are: {', '.join(hops) or 'none'}. Leave the gate out, or judge its hop too."
            )


class _Verifier:
    def __init__(self, artifact: Artifact, programs: Programs, table: HopPrograms, gates: Gates) -> None:
        self._artifact, self._programs, self._table, self._gates = artifact, programs, table, gates
        self._ids, self._progress = programs.ids, programs.progress
        folders = [programs.folder, Path(tempfile.gettempdir())]
        self._reference, self._exact = (WindowFile(folders, len(self._ids), name) for name in (_REFERENCE, _EXACT))
        self._make: Callable[[], Comparison] = Logits
        self.is_broken = False
        """Whether the float32 graph itself gives NaN or infinity."""

    def run(self, wanted: Sequence[Hop]) -> tuple[HopResult, ...]:
        """Results in the order of ``wanted``."""
        steps: dict[Hop, Callable[[], list[HopResult]]] = {
            Hop.FLOAT: self._float,
            Hop.FOLDED: self._folded,
            Hop.REFERENCE: lambda: self._quantized(Hop.INT8 in wanted),
            Hop.INT8: lambda: self._quantized(True),
            Hop.DECODE: self._decode,
            Hop.HALF: self._half,
            Hop.AUDIT: self._audit,
            Hop.DEVICE: self._device,
        }
        results: dict[Hop, HopResult] = {}
        with self._reference, self._exact:
            if NEED_REFERENCE.intersection(wanted):
                self._run_reference()
            for hop in wanted:
                if hop not in results:
                    results.update((result.hop, result) for result in self._once(hop, steps[hop]))
        return tuple(results[hop] for hop in wanted)

    def _once(self, hop: Hop, step: Callable[[], list[HopResult]]) -> list[HopResult]:
        """Results of the hop; those of an earlier run that broke off, unless other files than the graphs decide."""
        state = None if hop in _READ_ENGINES else self._programs.state
        if state and (found := state.get(f"hop {hop}")) is not None:
            return [HopResult.from_unit(data) for data in found]
        results = self._guarded(hop, step)
        if state:
            state.record(f"hop {hop}", [result.to_unit() for result in results], (f"hop {hop}", 1, 1))
        return results

    def _guarded(self, hop: Hop, step: Callable[[], list[HopResult]]) -> list[HopResult]:
        if not self.is_broken or hop not in NEED_REFERENCE:
            return step()
        judge = self._judge(hop)
        reason = "the outputs of the float32 graph hold NaN or infinity"
        if hop is not Hop.FLOAT:
            return [judge.skip(reason)]
        return [judge.result({}, [f"{hop}: {reason}. Expected finite numbers. Check the weights of the source."])]

    def _judge(self, hop: Hop) -> Judge:
        return Judge(self._gates, hop, COMPARED[hop])

    def _run_reference(self) -> None:
        """Store the outputs of the float32 graph."""
        program = self._table.reference
        self._make = comparison_of(self._artifact, self._programs.output(program.path))
        outputs = self._programs.outputs(program, "run the float32 graph")
        for values in self._programs.stored(self._reference, _REFERENCE, outputs):
            self.is_broken = self.is_broken or not np.isfinite(values).all()

    def _float(self) -> list[HopResult]:
        judge = self._judge(Hop.FLOAT)
        if isinstance(model := self._table.torch, str):
            return [judge.skip(model)]
        from .torch_model import torch_outputs

        windows = self._ids[: model.count]
        track = Track(self._make())
        programs = self._programs
        with judge.timed():
            outputs = torch_outputs(model.folder, windows, programs.folder, programs.budget, self._progress)
            for number in range(len(windows)):
                track.update(windows[number], outputs.read(number), self._reference.read(number))
        figures = track.figures()
        figures |= _renamed(figures, {"float_error": "relative_error", "float_kl": "kl"})
        return [judge.result(figures, _failures(Hop.FLOAT, track), len(windows))]

    def _folded(self) -> list[HopResult]:
        judge = self._judge(Hop.FOLDED)
        if (program := self._table.folded) is None:
            return [judge.skip("nothing was folded")]
        track = Track(self._make())
        with judge.timed():
            follow(self._ids, self._programs.outputs(program, "run the folded graph"), (track, self._reference))
        figures = track.figures()
        figures |= _renamed(figures, {"folded_error": "relative_error"})
        return [judge.result(figures, _failures(Hop.FOLDED, track), program.count)]

    def _quantized(self, with_kernels: bool) -> list[HopResult]:
        """Both runs of the Q/DQ graph, one after the other."""
        floats, kernels = self._judge(Hop.REFERENCE), self._judge(Hop.INT8)
        against_float, between, kernels_against_float = (Track(self._make()) for _ in range(3))
        programs, table = self._programs, self._table
        outputs = programs.outputs(table.exact, "run the Q/DQ graph in float")
        with floats.timed():
            outputs = programs.stored(self._exact, _EXACT, outputs) if with_kernels else outputs
            follow(self._ids, outputs, (against_float, self._reference))
        with kernels.timed():
            if with_kernels and not against_float.failure:
                outputs = programs.outputs(table.kernels, "run the Q/DQ graph in INT8")
                follow(self._ids, outputs, (between, self._exact), (kernels_against_float, self._reference))
        count = len(self._ids)
        results = [floats.result(against_float.figures(), _failures(Hop.REFERENCE, against_float), count)]
        if not with_kernels:
            return results
        if against_float.failure:
            return [*results, kernels.skip("the Q/DQ graph gives no numbers to compare with")]
        figures = between.figures()
        figures |= _renamed(figures, {"int8_kl_vs_reference": "kl"})
        figures |= {f"float_{name}": value for name, value in kernels_against_float.figures().items()}
        return [*results, kernels.result(figures, _failures(Hop.INT8, between), count)]

    def _decode(self) -> list[HopResult]:
        """The graph that runs on a CPU with a cache; and how long its continuations are those of the float graph."""
        judge = self._judge(Hop.DECODE)
        table = self._table
        if table.decoded is None:
            return [judge.skip("the graph has no cache")]
        with judge.timed():
            track = self._stepwise(*table.decoded)
            if track is None:
                return [judge.skip("the graph gives no numbers to compare with")]
            figures = track.figures()
            figures |= _renamed(figures, {"decode_kl": "kl"})
            if table.layers and not track.failure:
                whole = (table.reference, table.kernels)
                fits = self._programs.fit_whole(*whole)
                figures |= self._continuations() if fits else {"unmeasured": {"greedy_agreement": _TOO_LARGE}}
        return [judge.result(figures, _failures(Hop.DECODE, track), table.decoded[0].count)]

    def _stepwise(self, windows: Program, cached: Program) -> Track | None:
        """The same graph on whole windows and with a cache; None if its outputs are not finite."""
        track = Track(self._make())
        folders = [self._artifact.path, Path(tempfile.gettempdir())]
        with WindowFile(folders, windows.count) as whole:
            if not _store(self._programs.outputs(windows, "run whole windows"), whole):
                return None
            follow(self._ids, self._programs.decoded(cached, "decode with a cache"), (track, whole))
        return track

    def _continuations(self) -> Figures:
        table = self._table
        prompts = cut_prompts(self._ids, PROMPTS, min(PROMPT_LENGTH, self._ids.shape[1]))
        most = self._artifact.manifest.dims.get("max_position_embeddings", CONTINUATION + prompts.shape[1])
        count = max(1, min(CONTINUATION, most - prompts.shape[1]))
        counter = Counter(self._progress, "continue prompts", 2 * len(prompts))
        with Session(table.reference.path, mode=table.reference.mode) as reference:
            expected = greedy(reference, prompts, count, counter)
        with Session(table.kernels.path, mode=table.kernels.mode) as session:
            got = greedy(session, prompts, count, counter)
        prefix = float(common_prefix(expected, got).mean())
        return {"greedy_agreement": prefix / count, "common_prefix": prefix, "continuation": count}

    def _half(self) -> list[HopResult]:
        judge = self._judge(Hop.HALF)
        if not (halves := self._table.halves):
            return [judge.skip("the artifact has no 16-bit graph")]
        with judge.timed():
            metrics, failures = self._simulate(halves[0])
            for without_quantization in halves[1:]:
                plain, more = self._simulate(without_quantization)
                metrics |= {f"unquantized_{name}": value for name, value in plain.items()}
                failures += more
                if not plain["half_max_ratio"] <= metrics["half_max_ratio"]:
                    metrics |= {name: plain[name] for name in ("half_max_ratio", "half_max_node")}
        # the findings name the nodes, which the sentence of the gate does not
        result = judge.result(metrics, (), halves[0].count)
        named = tuple(failure for failure in result.failures if "half_max_ratio" not in failure)
        return [replace(result, failures=(*named, *failures))]

    def _simulate(self, graph: Simulated) -> tuple[Figures, list[str]]:
        """Figures of a 16-bit graph, and a sentence for each node that leaves the range, the worst first."""
        from .halfsim import HalfSimulation

        track = Track(self._make())
        with HalfSimulation(graph.path) as simulation:
            follow(self._ids, simulation.outputs(self._programs, graph.count), (track, self._reference))
            limit, peaks = self._gates.half_max_ratio, simulation.ratios
            findings = simulation.findings(peaks, np.finfo(np.float64).max if limit is None else limit)
            worst = int(np.argmax(np.where(np.isnan(peaks), np.inf, peaks)))
            node = simulation.edges[worst].node
        sentences = [f"{Hop.HALF}: {graph.path.name}: {item.node}: {item.message}" for item in findings[:_SHOWN]]
        if len(findings) > _SHOWN:
            sentences.append(f"{Hop.HALF}: {graph.path.name}: {len(findings) - _SHOWN} more nodes leave the range.")
        if track.failure and not findings:
            sentences += _failures(Hop.HALF, track)
        range_used: Figures = {"half_max_ratio": float(peaks[worst]), "half_max_node": node, "edges": len(peaks)}
        return range_used | track.figures(), sentences

    def _audit(self) -> list[HopResult]:
        judge = self._judge(Hop.AUDIT)
        engines, problems = find_engines(self._artifact)
        failures = [f"{Hop.AUDIT}: {problem}" for problem in problems]
        audits = {engine.folder.name: read_audit(audit_path(engine.file)) for engine in engines}
        if not audits and not failures:
            return [judge.skip("no engine was built")]
        figures: Figures = {}
        wrong: list[str] = []
        if chains := [engine for engine in engines if engine.is_chain]:
            with judge.timed():
                figures["chains"], wrong = judge_chains(self._artifact, chains, self._programs, SOURCE_WINDOWS)
            failures += [f"{Hop.AUDIT}: {sentence}" for sentence in wrong]
        shares = {name: share for name, audit in audits.items() if (share := audit.meant_share()) is not None}
        if shares:
            figures |= {"int8_mac_share": min(shares.values()), "engines": shares}
        elif not figures and not failures:
            return [judge.skip("the recipe computes nothing in INT8")]
        result = judge.result(figures, failures, min(SOURCE_WINDOWS, len(self._ids)) if chains else 0)
        was_run = any("skipped" not in chain for chain in figures.get("chains", {}).values())
        return [replace(result, judged=(*result.judged, "chains")) if was_run or wrong else result]

    def _device(self) -> list[HopResult]:
        from .device import compare_engines, find_target

        judge = self._judge(Hop.DEVICE)
        target = find_target(self._artifact)
        if isinstance(target, str):
            return [judge.skip(target)]
        track = Track(self._make())
        try:
            with judge.timed():
                latency = compare_engines(target, self._artifact, self._ids, track.update, self._progress)
        except BismoothError as error:  # the other hops' results are worth keeping
            return [judge.result({}, [f"{Hop.DEVICE}: {error}"])]
        figures = track.figures()
        figures |= _renamed(figures, {"device_kl": "kl"}) | latency
        return [judge.result(figures, _failures(Hop.DEVICE, track), len(self._ids))]

    def layer_sqnr(self) -> tuple[dict[str, Any], ...]:
        """Per quantized linear, the signal-to-noise ratio of its output in the running model, in dB."""
        return self._table.layers.sqnr(self._programs) if self._table.layers else ()


def _store(outputs: Iterable[Values], file: WindowFile) -> bool:
    """Whether all outputs are finite; if so, they are in the file."""
    for values in outputs:
        if not np.isfinite(values).all():
            return False
        file.append(values)
    return True


def _failures(hop: Hop, track: Track) -> list[str]:
    return [f"{hop}: {track.failure}"] if track.failure else []


def _renamed(figures: Figures, names: Mapping[str, str]) -> Figures:
    """Figures under the names of their gates."""
    return {gate: figures[name] for gate, name in names.items() if name in figures}
