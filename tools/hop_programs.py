"""What each hop of ``verify`` runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..engines.budget import base_memory
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

        before = base_memory()
        with HalfSimulation(self.path) as simulation:
            return simulation.least(programs, self.count, before)


@dataclass(frozen=True)
class HopPrograms:
    """What the hops of an artifact run on ``count`` windows of ``length`` tokens."""

    artifact: Artifact
    count: int
    length: int

    def of(self, hops: Collection[Hop]) -> Iterator[Needed]:
        """What runs for some hops."""
        if NEED_REFERENCE.intersection(hops):
            yield self.reference
        for hop in hops:
            yield from filter(None, self._of(hop))

    def _of(self, hop: Hop) -> Sequence[Needed | None]:
        match hop:
            case Hop.FLOAT:
                return () if isinstance(self.torch, str) else (self.torch,)
            case Hop.FOLDED:
                return (self.folded,)
            case Hop.REFERENCE:
                return (self.exact, self.layers)
            case Hop.INT8:
                return (self.exact, self.kernels)
            case Hop.DECODE:
                return self.decoded or ()
            case Hop.HALF:
                return self.halves
            case Hop.AUDIT:
                return (self.chains,)
            case Hop.DEVICE:
                return ()

    @property
    def reference(self) -> Program:
        """The float32 graph that the others are held against."""
        return float_graph(self.artifact, self.count)

    @cached_property
    def torch(self) -> TorchModel | str:
        """The source model, or why it cannot be run."""
        return _why_not_torch(self.artifact) or TorchModel(self.artifact.path, min(SOURCE_WINDOWS, self.count))

    @property
    def folded(self) -> Program | None:
        """The graph with smoothing factors folded in, if the artifact has one."""
        if "folded" not in self.artifact.manifest.graphs:
            return None
        return Program(self.artifact.graph("folded"), "plain", min(SOURCE_WINDOWS, self.count))

    @property
    def exact(self) -> Program:
        """The Q/DQ graph in float."""
        return in_float(self.artifact, self.count)

    @property
    def kernels(self) -> Program:
        """The Q/DQ graph in INT8."""
        return in_kernels(self.artifact, self.count)

    @cached_property
    def decoded(self) -> tuple[Program, Program] | None:
        """The graph for CPUs on whole windows and with a cache; None if it has no cache."""
        windows = in_kernels(self.artifact, min(DECODE_WINDOWS, self.count))
        if not has_caches(summarize(windows.path).inputs):
            return None
        return windows, replace(windows, prefill=self.length - min(DECODE_STEPS, self.length - 1))

    @cached_property
    def halves(self) -> tuple[Simulated, ...]:
        """The 16-bit graph, and that without quantization, as far as the artifact has them."""
        graphs = self.artifact.manifest.graphs
        half = next((role for role in ("float16", "bfloat16") if role in graphs), None)
        roles = [role for role in (half, f"reference_{half}") if role in graphs]
        return tuple(Simulated(self.artifact.graph(role), min(HALF_WINDOWS, self.count)) for role in roles)

    @property
    def chains(self) -> Program | None:
        """What the chains are held against, if the artifact has any."""
        return in_float(self.artifact, min(SOURCE_WINDOWS, self.count)) if has_chain(self.artifact) else None

    @cached_property
    def layers(self) -> Layers | None:
        """The quantized linears; None of a float artifact."""
        if not (stage := quantize_stage(self.artifact)):
            return None
        graphs, names = self.artifact.manifest.graphs, frozenset(linear["name"] for linear in stage["quantized"])
        clean = "folded" if "folded" in graphs else "reference"
        graph = self.artifact.graph
        return Layers(graph("reference"), graph(clean), graph("float32"), names)


def _why_not_torch(artifact: Artifact) -> str | None:
    if artifact.manifest.architecture is None:
        return "the artifact was made from an ONNX file"
    if not (artifact.path / "config.json").is_file():
        return "the artifact was made from a torch module"
    if artifact.manifest.source.get("remote_code"):
        return "the model computes with Python code of its own, and an artifact carries none"
    return None
