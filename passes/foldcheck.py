"""Prove every fold: run the operations around each site before and after, on random data, and compare.

Each site is cut out of the graph (``segment``), folded on its own and run in ONNX Runtime's CPU provider in the
graph's own type, so a mistake of the data-flow analysis shows as an error and not as a worse model. Memory: the
constants of one site at a time. Sites of the same structure share one session: constants are fed, not stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

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
    set_type,
    shape_of,
)
from ..passes.fold import Factors, fold_graph, weight_edits
from ..passes.graph import Index
from ..passes.segment import Sizes, cut
from ..passes.sites import Site

_ort: Any = onnxruntime

TOLERANCE = 1e-5
"""Largest relative error max|a - b| / max|a| of a correct fold in float32."""


def check_folds(
    graph: Graph,
    sites: Sequence[Site],
    factors: Factors,
    progress: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """The relative error max|a - b| / max|a| that folding each site causes, by the site's name.

    Compare it with ``TOLERANCE``. Infinite if a result is not finite. Sites without factors are not run.

    Args:
        graph: The float graph before folding.
        sites: The sites of ``find_sites``.
        factors: Per site name the divisor of its channels.
        progress: Called with the name of each site that is done.

    Raises:
        BismoothError: ONNX Runtime cannot run the operations around a site.
    """
    index, sessions = Index.of(graph), _Sessions()
    errors: dict[str, float] = {}
    for site in sites:
        if site.name in factors:
            errors[site.name] = _check(graph, index, site, factors, sessions)
            if progress is not None:
                progress(site.name)
    return errors


def _check(graph: Graph, index: Index, site: Site, factors: Factors, sessions: "_Sessions") -> float:
    sizes, constants = Sizes.of(graph), dict[str, Array]()
    segment = cut(graph, index, site, sizes)
    folded = segment.graph.copy()
    fold_graph(folded, weight_edits([site], factors))
    programs = [_program(graph, sizes, constants) for graph in (segment.graph, folded)]
    try:
        expected, got = (sessions.run(program) for program in programs)
    except Exception as error:
        raise BismoothError(
            f"{site.name}: the fold cannot be checked. Expected ONNX Runtime to run the operations from "
            f"{site.producer.node} on, got: {error}. Exclude the site from smoothing, or export the model again."
        ) from error
    return max(_relative_error(a, b) for a, b in zip(expected, got, strict=True))


def _relative_error(a: Array, b: Array) -> float:
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


def _program(graph: Graph, sizes: Sizes, constants: dict[str, Array]) -> _Program:
    """Take the names and the float constants out of a segment; ``constants`` keeps those that were read."""
    random, names = np.random.default_rng(0), _Names()
    feeds = {names.of(tensor): _data(tensor, sizes, random) for tensor in graph.inputs}
    for place, node in enumerate(graph.nodes):
        node.name = f"n{place}"
        for slot, tensor in enumerate(node.inputs):
            if is_constant(tensor) and _is_float(tensor):
                if tensor.name not in constants:
                    constants[tensor.name] = read(tensor)
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
