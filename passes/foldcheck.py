"""Prove every fold: run the operations around each site before and after, on random data, and compare.

Each site is cut out of the graph (``segment``), folded on its own and run in ONNX Runtime's CPU provider, so a mistake
of the data-flow analysis shows as an error and not as a worse model. It runs in float32, and then rounded to 16 bits
wherever the deployed graph rounds (``rounding``): there a factor may push a channel out of the type's range. Sites of
the same structure share one session: constants are fed, not stored. Of large weights it sees what a fold does not touch
as a sample: rows of the linears that read the site, and columns of the one that makes it.

NOTE: a tensor may carry the factors of two sites, and one channel of thousands hardly shows in a result. Stored 16-bit
tensors are therefore also judged by themselves, channel by channel, when they are written (``fold_underflow``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

from ..export.errors import BismoothError
from ..passes._gs import (
    Array,
    Graph,
    Tensor,
    dtype_of,
    export_model,
    is_constant,
    make_variable,
    read,
    read_pieces,
    read_rows_of,
    set_type,
    shape_of,
)
from ..passes.executor import LOCAL, Executor, each
from ..passes.fold import Factors, fold_graph, weight_edits
from ..passes.graph import Index
from ..passes.linears import Linear, find_linears
from ..passes.open_graph import OpenGraph
from ..passes.precision_policy import float_limits
from ..passes.refine import sample
from ..passes.rounding import Rounding
from ..passes.segment import Sizes, cut
from ..passes.sites import Site

_ort: Any = onnxruntime

TOLERANCE = 1e-5
"""Largest relative error max|a - b| / max|a| of a correct fold in float32."""

WORSE = 2.0
"""How many times the error of the unfolded operations a fold may have in 16 bits."""

SAMPLED = 512
"""Outputs of a reading linear, and inputs of the producing one, that are computed with. The site's channels all are."""

_BLOCK = 1 << 20
"""Elements of a weight that are read together where its columns are wanted."""

FEW_ROUNDINGS = 4
"""An error of so many roundings is no concern either: unfolded weights may be exact in 16 bits, folded ones are not."""


@dataclass(frozen=True, slots=True)
class ComputeError:
    """The relative error of a site in the deployed graph's own type, against float32; None where it is not finite.

    Attributes:
        unfolded: Without the fold: what the type costs anyway.
        folded: With it.
        limit: What ``folded`` may be; None: anything, since the unfolded operations overflow already.
    """

    unfolded: float | None
    folded: float | None
    limit: float | None

    @property
    def is_kept(self) -> bool:
        """Whether the fold costs the type no accuracy to speak of."""
        return self.limit is None or (self.folded is not None and self.folded <= self.limit)


@dataclass(frozen=True, slots=True)
class FoldErrors:
    """What folding causes, by the site's name; sites without factors are not run.

    Attributes:
        exact: The relative error max|a - b| / max|a| in float32, infinite if a result is not finite: see ``TOLERANCE``.
        compute: The errors in the deployed graph's type.
    """

    exact: dict[str, float] = field(default_factory=dict[str, float])
    compute: dict[str, ComputeError] = field(default_factory=dict[str, ComputeError])


def check_folds(
    model: OpenGraph,
    sites: Sequence[Site],
    factors: Factors,
    rounding: Rounding | None = None,
    progress: Callable[[str], None] = lambda _: None,
    executor: Executor = LOCAL,
) -> FoldErrors:
    """Fold each site on its own and measure by how much its results change.

    Args:
        model: The float32 graph before folding.
        sites: The sites of ``find_sites``.
        factors: Per site name the divisor of its channels.
        rounding: That of the deployed graph; None if it computes in float32, and then ``compute`` stays empty.
        progress: Called with the name of each site that is done.
        executor: Does the work.

    Raises:
        BismoothError: ONNX Runtime cannot run the operations around a site.
    """
    errors = FoldErrors()
    smoothed = [site for site in sites if site.name in factors]
    for site, (exact, compute) in each(executor, CheckFold(model, factors, rounding), smoothed, progress):
        errors.exact[site.name] = exact
        if compute is not None:
            errors.compute[site.name] = compute
    return errors


@dataclass(frozen=True, eq=False)
class CheckFold:
    """The work on one site; for the attributes see :func:`check_folds`."""

    model: OpenGraph
    factors: Factors
    rounding: Rounding | None

    @property
    def step(self) -> str:
        """Name of the step."""
        return "check folds"

    def __call__(self, site: Site) -> tuple[float, ComputeError | None]:
        """The error in float32, and those in 16 bits if the deployed graph computes in that."""
        return self._checker.check(site)

    def encode(self, result: tuple[float, ComputeError | None]) -> Any:
        """As JSON values."""
        exact, compute = result
        return [exact, None if compute is None else asdict(compute)]

    def decode(self, plain: Any) -> tuple[float, ComputeError | None]:
        """And back."""
        exact, compute = plain
        return exact, None if compute is None else ComputeError(**compute)

    @cached_property
    def _checker(self) -> "_Checker":
        graph = self.model.graph
        linears = {linear.name: linear for linear in find_linears(graph)}
        return _Checker(graph, self.model.index, Sizes.of(graph), linears, self.factors, self.rounding, _Sessions())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_checker"}


@dataclass(frozen=True, eq=False)
class _Sample:
    """Some places along an axis."""

    axis: int
    places: NDArray[np.intp]

    def of(self, values: Array) -> Array:
        return values if values.shape[self.axis] == len(self.places) else values.take(self.places, self.axis)

    def read(self, tensor: Tensor) -> Array:
        """The same of a constant, of which not all is in memory."""
        shape = [int(str(dim)) for dim in shape_of(tensor) or ()]
        if shape[self.axis] == len(self.places):
            return read(tensor)
        if self.axis == 0:
            return read_rows_of(tensor, self.places)
        rows = max(1, _BLOCK // shape[1])
        blocks = (piece.reshape(-1, shape[1]) for piece in read_pieces(tensor, rows * shape[1]))
        return np.concatenate([block[:, self.places] for block in blocks])


@dataclass(frozen=True, eq=False)
class _Checker:
    graph: Graph
    index: Index
    sizes: Sizes
    linears: dict[str, Linear]
    factors: Factors
    rounding: Rounding | None
    sessions: "_Sessions"

    def check(self, site: Site) -> tuple[float, ComputeError | None]:
        """As :meth:`CheckFold.__call__`."""
        segment = cut(self.graph, self.index, site, self.sizes).graph
        folded = segment.copy()
        fold_graph(folded, weight_edits([site], self.factors))
        samples = self._samples(site, segment)
        expected, *results = self._run(site, samples, [segment, folded, *self._rounded(segment, folded)])
        errors = [_relative_error(expected, result) for result in results]
        if self.rounding is None:
            return errors[0], None
        unfolded_error, folded_error = errors[1:] or (0.0, errors[0])
        return errors[0], _compute_error(unfolded_error, folded_error, self.rounding.dtype)

    def _rounded(self, *graphs: Graph) -> list[Graph]:
        """The graphs as the deployed one rounds; none if it does not round anything here."""
        if self.rounding is None or not any(map(self.rounding.concerns, graphs)):
            return []
        copies = [graph.copy() for graph in graphs]
        for copy in copies:
            self.rounding.apply(copy)
        return copies

    def _samples(self, site: Site, segment: Graph) -> dict[str, _Sample]:
        """What to take of the constants and inputs of a segment, by name."""
        samples: dict[str, _Sample] = {}
        for consumer in site.consumers:
            linear = self.linears[consumer.linear]
            rows = sample(linear.n, SAMPLED)
            samples[linear.weight] = _Sample(0 if linear.layout == "NK" else 1, rows)
            if linear.bias is not None:
                samples[linear.bias.initializer] = _Sample(0, rows)
        if site.producer.linear is not None:
            linear = self.linears[site.producer.linear]
            readers = [node for node in segment.nodes if any(tensor.name == linear.x for tensor in node.inputs)]
            given = any(tensor.name == linear.x for tensor in segment.inputs)
            samples.pop(linear.weight, None)
            if given and len(readers) == 1:
                columns = sample(linear.k, SAMPLED)
                samples[linear.x] = _Sample(-1, columns)
                samples[linear.weight] = _Sample(1 if linear.layout == "NK" else 0, columns)
        return samples

    def _run(self, site: Site, samples: Mapping[str, _Sample], graphs: Sequence[Graph]) -> list[list[Array]]:
        constants: dict[str, Array] = {}
        try:
            return [self.sessions.run(_program(graph, self.sizes, constants, samples)) for graph in graphs]
        except Exception as error:
            raise BismoothError(
                f"{site.name}: the fold cannot be checked. Expected ONNX Runtime to run the operations from "
                f"{site.producer.node} on, got: {error}. Exclude the site from smoothing, or export the model again."
            ) from error


def _compute_error(unfolded: float, folded: float, dtype: np.dtype[Any]) -> ComputeError:
    limit = max(WORSE * unfolded, FEW_ROUNDINGS * float_limits(dtype).epsilon / 2)
    return ComputeError(*(error if np.isfinite(error) else None for error in (unfolded, folded, limit)))


def _relative_error(expected: Sequence[Array], got: Sequence[Array]) -> float:
    """The largest of the relative errors of the results."""
    return max(_error(a, b) for a, b in zip(expected, got, strict=True))


def _error(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    difference, scale = float(np.abs(a - b).max(initial=0)), float(np.abs(a).max(initial=0))
    return difference / scale if scale else difference


@dataclass(frozen=True, eq=False)
class _Program:
    """A model without names and float constants, equal for sites of equal structure, and what to feed it."""

    model: bytes
    feeds: dict[str, Array]


def _program(graph: Graph, sizes: Sizes, constants: dict[str, Array], samples: Mapping[str, _Sample]) -> _Program:
    """Take the names and the float constants out of a segment; ``constants`` keeps those that were read."""
    random, names = np.random.default_rng(0), _Names()

    feeds: dict[str, Array] = {}
    for tensor in graph.inputs:
        values = _data(tensor, sizes, random)
        values = samples[tensor.name].of(values) if tensor.name in samples else values
        feeds[names.of(tensor)] = values
    for place, node in enumerate(graph.nodes):
        node.name = f"n{place}"
        for slot, tensor in enumerate(node.inputs):
            if is_constant(tensor) and _is_float(tensor):
                if tensor.name not in constants:
                    some = samples.get(tensor.name)
                    constants[tensor.name] = read(tensor) if some is None else some.read(tensor)
                node.inputs[slot] = make_variable("fed", dtype_of(tensor), None)
                feeds[names.of(node.inputs[slot])] = constants[tensor.name]
                graph.inputs.append(node.inputs[slot])
        for tensor in (*node.inputs, *node.outputs):
            names.of(tensor)
            if not is_constant(tensor):
                set_type(tensor, dtype_of(tensor), None)
    for tensor in graph.inputs:
        set_type(tensor, feeds[tensor.name].dtype, feeds[tensor.name].shape)
    for tensor in graph.outputs:
        set_type(tensor, dtype_of(tensor) or np.dtype(np.float32), None)
    return _Program(export_model(graph).SerializeToString(deterministic=True), feeds)


class _Names:
    """Renames tensors to t0, t1 … in the order in which they are met."""

    def __init__(self) -> None:
        self.seen: dict[int, str] = {}

    def of(self, tensor: Tensor) -> str:
        if tensor.is_empty():
            return ""
        if id(tensor) not in self.seen:
            self.seen[id(tensor)] = tensor.name = f"t{len(self.seen)}"
        return self.seen[id(tensor)]


class _Sessions:
    """One ONNX Runtime session per distinct program."""

    def __init__(self) -> None:
        self.sessions: dict[bytes, Any] = {}

    def run(self, program: _Program) -> list[Array]:
        if program.model not in self.sessions:
            self.sessions[program.model] = _session(program.model)
        feeds = {name: _ort_value(values) for name, values in program.feeds.items()}
        results = self.sessions[program.model].run_with_ort_values(None, feeds)
        return [cast(Array, result.numpy()) for result in results]


def _session(model: bytes) -> Any:
    options = _ort.SessionOptions()
    options.graph_optimization_level = _ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = 1  # hundreds of tiny runs: a thread pool spends more on waiting than on work
    options.log_severity_level = 3
    return _ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _ort_value(values: Array) -> Any:
    element_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    if element_type == onnx.TensorProto.BFLOAT16:
        return _ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), element_type)
    return _ort.OrtValue.ortvalue_from_numpy(values)


def _data(tensor: Tensor, sizes: Sizes, random: np.random.Generator) -> Array:
    """Normal floats, True, or ones."""
    shape = sizes.shape(shape_of(tensor) or ())
    dtype = dtype_of(tensor) or np.dtype(np.float32)
    if not _is_float(tensor):
        return np.ones(shape, dtype)
    return random.standard_normal(shape, np.float32).astype(dtype)


def _is_float(tensor: Tensor) -> bool:
    dtype = dtype_of(tensor)
    return dtype is None or dtype.name in ("float16", "bfloat16", "float32", "float64")
