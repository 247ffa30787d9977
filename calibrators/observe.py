"""Add statistics to a graph: nodes that reduce each observed activation inside the run, where it is computed.

Every observed value x, flattened to rows [T, K] with channels last, gets the outputs of :class:`Taps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..export.errors import BismoothError
from .histogram import BINS, BINS_PER_OCTAVE, LOWEST

#: How many of the rows with the largest |x| are kept of each value.
OUTLIERS = 16
#: Graph inputs: the numbers of the wanted token rows, int64 [r], and of all token rows of the batch, int64 [1].
ROWS, TOKENS = "bismooth::rows", "bismooth::tokens"
SAMPLED, KEPT_ROWS = "bismooth::sampled", "bismooth::kept"
"""Dimensions: how many rows of a batch are wanted, and how many of the largest it has, at most ``OUTLIERS``."""

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_CONSTANTS: dict[str, NDArray[Any] | np.generic] = {
    "bismooth::first_axis": np.array([0], np.int64),
    "bismooth::last_axis": np.array([1], np.int64),
    "bismooth::any": np.array([-1], np.int64),
    "bismooth::zero": np.array([0], np.int64),
    # bin = clip(trunc(log2|x| · 64 + 24 · 64 + 1)); log 0 = -inf becomes the smallest integer, thus bin 0
    "bismooth::per_log": np.float32(BINS_PER_OCTAVE / np.log(2)),
    "bismooth::offset": np.float32(1 - LOWEST * BINS_PER_OCTAVE),
    "bismooth::first_bin": np.int32(0),
    "bismooth::last_bin": np.int32(BINS - 1),
    "bismooth::outliers": np.array([OUTLIERS], np.int64),
    "bismooth::no_counts": np.zeros(BINS, np.int32),
}


@dataclass(frozen=True)
class Taps:
    """Names of the outputs that belong to one observed value.

    Attributes:
        absmax: float32 [K], max |x| per channel.
        power: float32 [], the sum of x² over all elements; finite only if all of them are and it is below 3.4e38.
        rows: float32 [r, K], the rows asked for through the input ``ROWS``.
        outliers: float32 [o, K], the rows with the largest |x|, at most ``OUTLIERS``, largest first.
        outlier_peaks: float32 [o], their max |x|.
        histogram: int32 [BINS], counts of |x|.
        x: float32 [T, K], all rows.
    """

    absmax: str
    power: str
    rows: str
    outliers: str
    outlier_peaks: str
    histogram: str
    x: str

    @staticmethod
    def of(value: str) -> Taps:
        return Taps(*(f"{value}::{field.name}" for field in fields(Taps)))

    @staticmethod
    def shapes(channels: int | None) -> dict[str, tuple[int, list[int | str | None]]]:
        """Types and shapes of the outputs, by field."""
        return {
            "absmax": (TensorProto.FLOAT, [channels]),
            "power": (TensorProto.FLOAT, []),
            "rows": (TensorProto.FLOAT, [SAMPLED, channels]),
            "outliers": (TensorProto.FLOAT, [KEPT_ROWS, channels]),
            "outlier_peaks": (TensorProto.FLOAT, [KEPT_ROWS]),
            "histogram": (TensorProto.INT32, [BINS]),
            "x": (TensorProto.FLOAT, [None, channels]),
        }


def instrument(model: onnx.ModelProto, values: Sequence[str], *, histograms: bool = False, rows: bool = False) -> None:
    """Give ``model`` further outputs, statistics of its ``values``, in place.

    Args:
        model: what runs.
        values: its float activations to observe, channels last.
        histograms: whether magnitudes are counted.
        rows: whether all rows are wanted.

    Raises:
        BismoothError: a value is not a float tensor.
    """
    graph = model.graph
    _check_floats(graph, values)
    graph.input.append(helper.make_tensor_value_info(ROWS, TensorProto.INT64, [SAMPLED]))
    graph.input.append(helper.make_tensor_value_info(TOKENS, TensorProto.INT64, [1]))
    added = {value: [*_reductions(value), *(_histogram(value) if histograms else ())] for value in values}
    _insert(graph, added)
    used = {name for nodes in added.values() for node in nodes for name in node.input}
    constants = {name: np.asarray(array) for name, array in _CONSTANTS.items() if name in used}
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    made = {name for nodes in added.values() for node in nodes for name in node.output}
    channels = {info.name: info.type.tensor_type.shape.dim for info in (*graph.value_info, *graph.input)}
    for value in values:
        dims = channels.get(value)
        width = dims[-1].dim_value if dims else 0
        shapes = Taps.shapes(width or None)
        for field, name in asdict(Taps.of(value)).items():
            if name in made and (rows or field != "x"):
                graph.output.append(helper.make_tensor_value_info(name, *shapes[field]))


def _insert(graph: onnx.GraphProto, added: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put new nodes right behind the value that they read, so that a run in this order frees it early."""
    behind = dict(added)
    order: list[onnx.NodeProto] = []
    for node in graph.node:
        order.append(node)
        for name in node.output:
            order += behind.pop(name, ())
    order[:0] = [node for nodes in behind.values() for node in nodes]  # values that no node makes
    del graph.node[:]
    graph.node.extend(order)


def _check_floats(graph: onnx.GraphProto, values: Sequence[str]) -> None:
    types = {info.name: info.type.tensor_type.elem_type for info in (*graph.value_info, *graph.input)}
    for value in values:
        if types.get(value, TensorProto.FLOAT) not in _FLOATS:
            kind = TensorProto.DataType.Name(types[value])
            raise BismoothError(f"value {value}: is {kind}. Expected a float activation. Leave it out of the values.")


def _node(owner: str, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    """A node whose inner names, those that begin with "::", belong to ``owner``; it has the name of its output."""
    names = [f"{owner}{name}" if name.startswith("::") else name for name in inputs]
    return helper.make_node(op, names, [f"{owner}{output}"], f"{owner}{output}", **attributes)


def _reductions(value: str) -> Iterator[onnx.NodeProto]:
    node = partial(_node, value)
    yield node("Flatten", [value], "::flat", axis=-1)
    yield node("Cast", ["::flat"], "::x", to=TensorProto.FLOAT)
    yield node("Abs", ["::x"], "::abs")
    yield node("ReduceMax", ["::abs", "bismooth::first_axis"], "::absmax", keepdims=0)
    yield node("ReduceSumSquare", ["::x"], "::power", keepdims=0)
    yield node("Shape", ["::x"], "::size")
    # A value with m rows per token (or one row per m tokens) is sampled at the same share of its rows.
    yield node("Gather", ["::size", "bismooth::zero"], "::row_count")
    yield node("Mul", [ROWS, "::row_count"], "::scaled_rows")
    yield node("Div", ["::scaled_rows", TOKENS], "::chosen")
    yield node("Gather", ["::x", "::chosen"], "::rows", axis=0)
    yield node("ReduceMax", ["::abs", "bismooth::last_axis"], "::row_peaks", keepdims=0)
    yield node("Min", ["::row_count", "bismooth::outliers"], "::outlier_count")
    yield helper.make_node(
        "TopK",
        [f"{value}::row_peaks", f"{value}::outlier_count"],
        [f"{value}::outlier_peaks", f"{value}::outlier_rows"],
        f"{value}::outlier_rows",
        axis=0,
    )
    yield node("Gather", ["::x", "::outlier_rows"], "::outliers", axis=0)


def _histogram(value: str) -> Iterator[onnx.NodeProto]:
    node = partial(_node, value)
    yield node("Reshape", ["::abs", "bismooth::any"], "::magnitudes")
    yield node("Log", ["::magnitudes"], "::log")
    yield node("Mul", ["::log", "bismooth::per_log"], "::octaves")
    yield node("Add", ["::octaves", "bismooth::offset"], "::position")
    yield node("Cast", ["::position"], "::integer", to=TensorProto.INT32)
    yield node("Clip", ["::integer", "bismooth::first_bin", "bismooth::last_bin"], "::bin")
    yield node("Shape", ["::bin"], "::length")
    yield node("ConstantOfShape", ["::length"], "::ones", value=numpy_helper.from_array(np.ones(1, np.int32)))
    yield node("ScatterElements", ["bismooth::no_counts", "::bin", "::ones"], "::histogram", axis=0, reduction="add")
