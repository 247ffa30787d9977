"""What each hop of ``verify`` runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..engines.linears import summarize
from ..export.artifact import Artifact
from ..export.graph_names import has_caches
from ..passes.gates import Hop
from .engine_folder import has_chain
from .layers import Layers
from .meant import quantize_stage
from .programs import Needed, Program, Programs, float_graph, in_float, in_kernels

SOURCE_WINDOWS = 2
"""Windows on which the torch model and the folded graph run: equality shows on any text."""

HALF_WINDOWS = 2
"""Windows of the 16-bit simulation, which is slow; overflow depends on the tokens seen first of all."""

DECODE_WINDOWS, DECODE_STEPS = 2, 64
"""Windows that are run with a cache, and how many of their last tokens one by one."""

NEED_REFERENCE = frozenset({Hop.FLOAT, Hop.FOLDED, Hop.REFERENCE, Hop.INT8, Hop.HALF})


@dataclass(frozen=True)
class TorchModel:
    """The transformers model in ``folder``, on the first ``count`` windows, in a process of its own."""

    folder: Path
    count: int

    def least(self, programs: Programs) -> int:
        from .torch_model import torch_least

        return torch_least(self.folder, programs.ids.shape[1])


@dataclass(frozen=True)
class Simulated:
    """The 16-bit graph ``path``, simulated on the first ``count`` windows."""

    path: Path
    count: int

    def least(self, programs: Programs) -> int:
        from .halfsim import HalfSimulation

        with HalfSimulation(self.path) as simulation:
            return simulation.least(programs, self.count)


class HopPrograms:
    """What the hops of an artifact run on ``count`` windows of ``length`` tokens.

    Attributes:
        reference: the float32 graph that the others are held against.
        torch: the source model, or why it cannot be run.
        folded: the graph with smoothing factors folded in, if the artifact has one.
        exact, kernels: the Q/DQ graph in float and in INT8; without quantization both are the float32 graph.
        decoded: the graph for CPUs on whole windows and with a cache; None if it has no cache.
        halves: the 16-bit graph, and that without quantization, as far as the artifact has them.
        chains: what the chains are held against, if the artifact has any.
        layers: the quantized linears; None of a float artifact.
    """

    def __init__(self, artifact: Artifact, count: int, length: int) -> None:
        graphs, few = artifact.manifest.graphs, min(SOURCE_WINDOWS, count)
        self.reference = float_graph(artifact, count)
        self.torch = _why_not_torch(artifact) or TorchModel(artifact.path, few)
        self.folded = Program(artifact.graph("folded"), "plain", few) if "folded" in graphs else None
        self.exact, self.kernels = in_float(artifact, count), in_kernels(artifact, count)
        self.decoded = _decoded(in_kernels(artifact, min(DECODE_WINDOWS, count)), length)
        half = next((role for role in ("float16", "bfloat16") if role in graphs), None)
        roles = [role for role in (half, f"reference_{half}") if role in graphs]
        self.halves = [Simulated(artifact.graph(role), min(HALF_WINDOWS, count)) for role in roles]
        self.chains = in_float(artifact, few) if has_chain(artifact) else None
        self.layers = _layers(artifact) if artifact.manifest.kind == "quantized" else None

    def of(self, hops: Collection[Hop]) -> Iterator[Needed]:
        """What runs for some hops."""
        if NEED_REFERENCE.intersection(hops):
            yield self.reference
        for hop in hops:
            yield from filter(None, self._of(hop))

    def _of(self, hop: Hop) -> list[Needed | None]:
        table: dict[Hop, list[Needed | None]] = {
            Hop.FLOAT: [None if isinstance(self.torch, str) else self.torch],
            Hop.FOLDED: [self.folded],
            Hop.REFERENCE: [self.exact, self.layers],
            Hop.INT8: [self.exact, self.kernels],
            Hop.DECODE: [*(self.decoded or ())],
            Hop.HALF: [*self.halves],
            Hop.AUDIT: [self.chains],
        }
        return table.get(hop, [])


def _why_not_torch(artifact: Artifact) -> str | None:
    if artifact.manifest.architecture is None:
        return "the artifact was made from an ONNX file"
    if not (artifact.path / "config.json").is_file():
        return "the artifact was made from a torch module"
    if artifact.manifest.source.get("remote_code"):
        return "the model computes with Python code of its own, and an artifact carries none"
    return None


def _decoded(program: Program, length: int) -> tuple[Program, Program] | None:
    if not has_caches(summarize(program.path).inputs):
        return None
    return program, replace(program, prefill=length - min(DECODE_STEPS, length - 1))


def _layers(artifact: Artifact) -> Layers:
    names = frozenset(linear["name"] for linear in quantize_stage(artifact)["quantized"])
    clean = artifact.graph("folded" if "folded" in artifact.manifest.graphs else "reference")
    return Layers(artifact.graph("reference"), clean, artifact.graph("float32"), names)
