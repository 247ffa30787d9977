"""Run a 16-bit graph on the CPU as 16-bit hardware would: every value is rounded to its type on its way to a reader.

ONNX Runtime's CPU computes float16 graphs in float32 from one end to the other, so they never overflow there. Here each
node computes in float32 and its result goes through ``Cast`` to the 16-bit type and back; the largest magnitude on
every such edge is found in the same run and comes back as one vector.

NOTE: what the simulation stands for. A MatMul adds up in float32 and rounds once, as tensor cores with float32
accumulators do; one whose operands are both dequantized is an INT8 GEMM, whose exact sum is rounded once, and its
operands are not rounded at all (sums stay exact up to 2^24 times the scales). Attention is taken apart, so the scores
and the weighted sum are edges: a fused kernel keeps them in registers, an unfused one does not. What a node keeps
inside (a norm's mean, the exponentials of a softmax) is float32, and values that are only moved are the same edge.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from ..engines.onnxruntime import InMemoryGraph, Session
from ..engines.pieces import Piece, PieceMaker
from ..engines.streaming import Streamed, default_batch
from ..export.errors import BismoothError
from ..passes._gs import (
    Graph,
    Node,
    Tensor,
    copy_tensor,
    dtype_of,
    export_model,
    external_proto,
    is_constant,
    make_constant,
    make_node,
    make_variable,
    read,
    shape_of,
)
from ..passes.decompose import lower, lower_attention
from ..passes.graph import load
from ..passes.lint import Finding, Severity
from ..passes.precision_policy import CLAMPED, Role, float_limits, role_of
from ..passes.rounding import round_trip
from .comparison import Ids, Values
from .half_peaks import PREFIX, add_peaks, peak_of_stored, peaks_of
from .programs import Programs, with_held

_FLOAT32 = np.dtype(np.float32)
_MODE = "reference"
_NARROW_TYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_MOST = 1 << 25
"""Bytes of the largest float32 copy of a weight that is made as a whole: while it is rounded, there are two."""
_EXACT = frozenset({"Abs", "Ceil", "Clip", "Floor", "Max", "Min", "Neg", "Relu", "Round", "Sign"})
"""Operators whose result is one of their inputs, up to its sign, or a smaller whole number."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A value that a 16-bit graph computes: its name, the node that computes it, and its type."""

    value: str
    node: str
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class HalfRun:
    """One run: logits [batch, sequence, vocabulary] float32, and per edge max|value| / largest number of its type.

    The ratio is infinite where a value overflowed and NaN where one is not a number.
    """

    logits: NDArray[np.float32]
    ratios: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Simulation:
    """The edges of a graph that was made to simulate, and the weights behind those that are casts of stored ones."""

    edges: tuple[Edge, ...]
    stored: dict[str, Tensor]


class HalfSimulation:
    """A 16-bit graph that simulates; a context manager that frees the memory on exit.

    Attributes:
        edges: the values that are rounded.
        ratios: per edge the largest ratio (see :class:`HalfRun`) in the windows that :meth:`outputs` has run.

    Args:
        path: an ONNX file whose values are float16 or bfloat16; nothing is written, and weights stay in their files.
        threads: threads per operator of :meth:`feed`; one per core by default.

    Raises:
        BismoothError: the file cannot be loaded, or has no 16-bit value.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        graph = load(path)
        simulation = simulate(graph)
        self.edges, self.ratios = simulation.edges, np.zeros(len(simulation.edges))
        self._path, self._threads = path, threads
        self._stored, self._peaks_of_stored = simulation.stored, dict[str, float]()
        self._largest = {edge.value: float_limits(edge.dtype).largest for edge in self.edges}
        measured = [edge.value for edge in self.edges if edge.value not in self._stored]
        if not measured:
            raise BismoothError(
                f"{path}: nothing to simulate. Expected a graph that computes in float16 or bfloat16, got one without "
                "a 16-bit activation. Give the deployment graph, model.float16.onnx."
            )
        self._maker = PieceMaker(export_model(graph))
        self._measured = self._maker.by_segment(measured)
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def outputs(self, programs: Programs, count: int) -> Iterator[Values]:
        """Logits [S, V], float32, of each of the first ``count`` windows, in order; the graph runs piece by piece.

        Memory is for the logits of one window at a time: the caller lets go of them before it asks for more.

        Raises:
            BismoothError: the graph cannot be run, or the memory is too little for a part of it.
        """
        key = self._key(count)
        streamed = programs.fitted(with_held(self._streamed(programs.ids[:count])), key)
        stored = self._maker.by_segment(self._stored)
        self.ratios = np.array(programs.noted(key) or np.zeros(len(self.edges)))
        for piece, run, counter in programs.runs(streamed, key, f"simulate {self._path.name}"):
            weights = [value for segment in range(piece.first, piece.stop) for value in stored.get(segment, ())]
            self._see({value: self._peak_of_stored(value) for value in weights})
            for batch in streamed.batches:
                results = run(batch)
                self._see(dict(zip(streamed.observed(piece), peaks_of(results), strict=True)))
                counter.add(batch.stop - batch.start)
                if piece.stop == streamed.stop:
                    yield from results.pop(streamed.output).astype(np.float32, copy=False)
            programs.note(key, self.ratios.tolist())

    def least(self, programs: Programs, count: int, before: int) -> int:
        """Bytes that :meth:`outputs` takes at least, beside those that were taken ``before`` the graph was loaded."""
        return programs.least(with_held(self._streamed(programs.ids[:count])), self._key(count), before)

    def _key(self, count: int) -> str:
        return f"{self._path.name} simulated {count} windows"

    def run(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None) -> HalfRun:
        """Run token ids [batch, sequence] through the whole graph; without a mask there is no padding.

        Raises:
            BismoothError: the graph has inputs that token ids do not determine, or cannot run on these.
        """
        feeds = self._session.token_feeds(input_ids)
        if attention_mask is not None and "attention_mask" in feeds:
            feeds["attention_mask"] = attention_mask
        return self.feed(feeds)

    def feed(self, feeds: Mapping[str, NDArray[Any]]) -> HalfRun:
        """Run any inputs, by name, through the whole graph.

        Raises:
            BismoothError: an input is missing or does not fit.
        """
        results = self._session.run(feeds)
        peaks = {value: self._peak_of_stored(value) for value in self._stored}
        peaks |= zip(chain.from_iterable(self._measured.values()), peaks_of(results), strict=True)
        return HalfRun(results[self._maker.model.graph.output[0].name], self._ratios(peaks))

    @cached_property
    def _session(self) -> Session:
        """The whole graph."""
        streamed = self._streamed(np.zeros((1, 1), np.int64))
        model = streamed.model(Piece(0, streamed.stop)).SerializeToString()
        graph = InMemoryGraph(f"{self._path} (simulated)", model, self._path.parent)
        return self._resources.enter_context(Session(graph, mode=_MODE, threads=self._threads, lean=True))

    def _streamed(self, ids: Ids) -> Streamed:
        return Streamed(
            self._path,
            self._maker,
            _MODE,
            ids,
            default_batch(ids.shape[1]),
            values=self._measured,
            prepare=add_peaks,
            most=_MOST,
        )

    def _peak_of_stored(self, value: str) -> float:
        if value not in self._peaks_of_stored:
            dtype = next(edge.dtype for edge in self.edges if edge.value == value)
            self._peaks_of_stored[value] = peak_of_stored(self._stored[value], dtype)
        return self._peaks_of_stored[value]

    def _ratios(self, peaks: Mapping[str, float]) -> NDArray[np.float64]:
        """Of all edges; 0 for those that ``peaks`` has not."""
        return np.array([peaks.get(value, 0.0) / largest for value, largest in self._largest.items()])

    def _see(self, peaks: Mapping[str, float]) -> None:
        self.ratios = np.maximum(self.ratios, self._ratios(peaks))  # keeps NaN

    def findings(self, ratios: NDArray[np.float64], limit: float = 0.5) -> list[Finding]:
        """The edges that are not finite or above ``limit``, worst first; join runs by ``np.maximum``, it keeps NaN."""
        bad = np.flatnonzero(~(ratios <= limit))
        order = sorted(bad, key=lambda place: -np.nan_to_num(ratios[place], nan=np.inf, posinf=np.inf))
        return [_finding(self.edges[place], float(ratios[place]), limit) for place in order]


def simulate(graph: Graph) -> Simulation:
    """Make a 16-bit graph compute in float32 with explicit rounding, in place; returns the edges that are rounded."""
    lower(graph, {"Attention": lower_attention})
    simulator = _Simulator(graph)
    simulator.run()
    return Simulation(tuple(simulator.edges), simulator.stored)


def _is_narrow(tensor: Tensor) -> bool:
    return not tensor.is_empty() and dtype_of(tensor) in _NARROW_TYPES


@dataclass(slots=True)
class _Simulator:
    graph: Graph
    edges: list[Edge] = field(default_factory=list[Edge])
    stored: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _nodes: list[Node] = field(default_factory=list[Node])
    _values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def run(self) -> None:
        """Rewrite every node; a node that reads or makes 16-bit values reads and makes float32 ones instead."""
        exact = _integer_operands(self.graph)
        for node in list(self.graph.nodes):
            source = node.inputs[0] if node.inputs else None
            for place, tensor in enumerate(node.inputs):
                if _is_narrow(tensor):
                    node.inputs[place] = self._read(tensor)
            _forget_type(node)
            self._nodes.append(node)
            for place, tensor in enumerate(node.outputs):
                if _is_narrow(tensor):
                    is_rounded = not (role_of(node) is Role.MOVE or node.op in _EXACT or tensor.name in exact)
                    self._write(node, place, tensor, is_rounded)
                    if is_rounded and node.op == "Cast" and source is not None and is_constant(source):
                        self.stored[tensor.name] = copy_tensor(source)
        self.graph.nodes[:] = self._nodes
        for place, tensor in enumerate(self.graph.outputs):
            self.graph.outputs[place] = self._values.get(tensor.name, tensor)

    def _read(self, tensor: Tensor) -> Tensor:
        if tensor.name not in self._values:
            self._values[tensor.name] = self._constant(tensor) if is_constant(tensor) else self._input(tensor)
        return self._values[tensor.name]

    def _constant(self, tensor: Tensor) -> Tensor:
        if external_proto(tensor) is None:
            return make_constant(f"{PREFIX}{tensor.name}.float32", read(tensor).astype(np.float32))
        return self._input(tensor)

    def _input(self, tensor: Tensor) -> Tensor:
        """What is stored in 16 bits, in a file or by the caller, widened when it is read."""
        return self._cast(tensor, f"{PREFIX}{tensor.name}.float32", _FLOAT32)

    def _write(self, node: Node, place: int, tensor: Tensor, is_rounded: bool) -> None:
        dtype = dtype_of(tensor)
        assert dtype is not None
        if not is_rounded:
            value = make_variable(tensor.name, _FLOAT32, shape_of(tensor))
            node.outputs[place] = value
        else:
            value = make_variable(tensor.name, _FLOAT32, shape_of(tensor))
            if not _is_clamped(node):
                self.edges.append(Edge(tensor.name, node.name, dtype))
            self._nodes += round_trip(self._exact(node, place, tensor), value, dtype, PREFIX)
        self._values[tensor.name] = value

    def _exact(self, node: Node, place: int, tensor: Tensor) -> Tensor:
        """What is rounded, as the node computes it; of a cast of what is float32 by now, what it reads."""
        if node.op == "Cast" and dtype_of(node.inputs[0]) == _FLOAT32:
            source = self._nodes.pop().inputs[0]
            node.inputs.clear()
            return source
        node.outputs[place] = make_variable(f"{PREFIX}{tensor.name}.exact", _FLOAT32, shape_of(tensor))
        return node.outputs[place]

    def _cast(self, source: Tensor, name: str, dtype: np.dtype[Any]) -> Tensor:
        result = make_variable(name, dtype, shape_of(source))
        to = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
        self._nodes.append(make_node("Cast", f"{PREFIX}{name}/Cast", [source], [result], {"to": to}))
        return result


def _forget_type(node: Node) -> None:
    """Let the attributes of a node no longer ask for a 16-bit type."""
    if node.op == "DequantizeLinear":
        node.attrs.pop("output_dtype", None)
    if node.op == "Cast" and any(_is_narrow(tensor) for tensor in node.outputs):
        node.attrs["to"] = int(onnx.TensorProto.FLOAT)
    value: Tensor | None = node.attrs.get("value") if node.op == "ConstantOfShape" else None
    if value is not None and _is_narrow(value):
        node.attrs["value"] = make_constant("", read(value).astype(np.float32))


def _integer_operands(graph: Graph) -> frozenset[str]:
    """Dequantized values that only INT8 GEMMs read."""
    dequantized: set[str] = set()
    for node in graph.nodes:
        moved = role_of(node) is Role.MOVE and node.inputs[0].name in dequantized
        if node.op == "DequantizeLinear" or moved:
            dequantized.update(tensor.name for tensor in node.outputs)
    operands: set[str] = set()
    for node in reversed(graph.nodes):
        for tensor in node.outputs:
            readers = tensor.outputs if tensor.name in dequantized else ()
            if readers and all(_passes_exactly(reader, dequantized, operands) for reader in readers):
                operands.add(tensor.name)
    return frozenset(operands)


def _passes_exactly(reader: Node, dequantized: set[str], operands: set[str]) -> bool:
    if reader.op in ("MatMul", "Gemm", "Conv"):
        return all(tensor.name in dequantized for tensor in reader.inputs[:2])
    return role_of(reader) is Role.MOVE and all(tensor.name in operands for tensor in reader.outputs)


def _is_clamped(node: Node) -> bool:
    """Whether a node narrows a mask that was clamped to the lowest number of the type on purpose."""
    producer = node.inputs[0].inputs[0] if node.op == "Cast" and node.inputs[0].inputs else None
    return producer is not None and producer.op == "Max" and node.inputs[0].name.endswith(CLAMPED)


def _finding(edge: Edge, ratio: float, limit: float) -> Finding:
    largest = float_limits(edge.dtype).largest
    seen = f"{ratio * largest:.5g}" if np.isfinite(ratio) else ("not a number" if np.isnan(ratio) else "infinite")
    return Finding(
        "half-range",
        Severity.ERROR,
        edge.node,
        f"value {edge.value} reached {seen} in {edge.dtype}. Expected at most {limit:g} of {largest:.5g}. "
        "Compute in bfloat16 or float32: 'compute_dtype' of the recipe.",
    )
