"""From a graph that computes in float32 to one that computes in float16 or bfloat16, weights untouched.

Each node gets a type from ``precision_plan``; a Cast stands where a value changes type, once per value. An
initializer that a 16-bit node reads gets a Cast too, so the weight file stays as it is; ``stored_casts`` lists these
for whoever writes a new file, and ``store`` puts a 16-bit initializer in the place of one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import onnx

from ..export.errors import BismoothError
from ._gs import (
    Array,
    Graph,
    Node,
    Tensor,
    dtype_of,
    is_constant,
    make_constant,
    make_node,
    make_variable,
    read,
    shape_of,
)
from .half import half_of
from .precision_plan import Planner
from .precision_policy import AGNOSTIC, CLAMPED, MASK, float_limits, is_float, is_inline, is_mask, is_standard

NARROW_TYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_BFLOAT16 = NARROW_TYPES["bfloat16"]


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """What ``SetPrecision`` did: numbers of nodes per type, Casts in the graph, and the names in ``stored_casts``."""

    narrow: int
    wide: int
    casts: int
    stored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetPrecision:
    """Make a float32 graph compute in ``dtype``, with float32 islands (see ``precision_policy``).

    Needs: recorded types, topological order, no subgraphs, no 16-bit values but initializers behind a Cast to float32.
    Promises: graph inputs and outputs keep their types; values are in float32 or ``dtype`` as recorded; no Cast reads
    another Cast's output.

    Attributes:
        dtype: The 16-bit type.
    """

    dtype: Literal["float16", "bfloat16"]

    name: ClassVar[str] = "precision"

    def apply(self, graph: Graph) -> PrecisionReport:
        """Rewrite the graph in place.

        Raises:
            BismoothError: A need is not met, or a constant of a 16-bit node overflows.
        """
        narrow = NARROW_TYPES[self.dtype]
        _require_float32(graph)
        _drop_idle_casts(graph)
        _Rewriter(graph, Planner(graph, narrow).plan(), narrow).run()
        graph.cleanup()
        return _report(graph, narrow)


@dataclass(frozen=True, slots=True)
class StoredCast:
    """An initializer that a graph casts on every load: a candidate to be stored in the type it is cast to."""

    node: Node
    initializer: Tensor
    dtype: np.dtype[Any]


def stored_casts(graph: Graph) -> tuple[StoredCast, ...]:
    """The initializers that are cast to a 16-bit type, or from bfloat16 to another one, in graph order.

    Turing has no bfloat16: TensorRT builds nothing for it from a graph with one bfloat16 initializer, cast or not.
    """
    found: list[StoredCast] = []
    for node in graph.nodes:
        if node.op == "Cast" and is_constant(node.inputs[0]):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(int(node.attrs["to"]))
            source = dtype_of(node.inputs[0])
            if dtype in NARROW_TYPES.values() or (source == NARROW_TYPES["bfloat16"] and dtype == np.float32):
                found.append(StoredCast(node, node.inputs[0], dtype))
    return tuple(found)


def store(graph: Graph, cast: StoredCast, initializer: Tensor) -> None:
    """Let the readers of a cast initializer read ``initializer``, already in the cast's type, and drop the Cast.

    Raises:
        BismoothError: The new initializer has another type or shape.
    """
    expected = (cast.dtype, shape_of(cast.initializer))
    if (dtype_of(initializer), shape_of(initializer)) != expected:
        raise BismoothError(
            f"{initializer.name}: the stored weight does not fit. Expected {cast.dtype} {expected[1]}, "
            f"got {dtype_of(initializer)} {shape_of(initializer)}. Store the output of 'narrow' for this initializer."
        )
    _replace_reads(cast.node.outputs[0], initializer)
    graph.nodes[:] = [node for node in graph.nodes if node is not cast.node]
    cast.node.inputs.clear()


def narrow(values: Array, dtype: np.dtype[Any], name: str) -> Array:
    """Round a tensor to a 16-bit type, to nearest even; float32 is kept as it is.

    Raises:
        BismoothError: A finite value overflows, or one is not finite; the message names the tensor.
    """
    (result,) = narrow_pieces([values], dtype, name)
    return result


def narrow_pieces(pieces: Iterable[Array], dtype: np.dtype[Any], name: str) -> Iterator[Array]:
    """The same for a tensor that comes in pieces; what it raises does not depend on how it was cut."""
    rest = iter(pieces)
    for piece in rest:
        result = half_of(piece) if (piece.dtype, dtype) == (_BFLOAT16, np.float16) else _rounded(piece, dtype)
        if result is None:
            raise _does_not_fit(chain([piece], rest), dtype, name)
        yield result


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array | None:
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    return result if np.all(np.isfinite(result)) else None


def _does_not_fit(pieces: Iterable[Array], dtype: np.dtype[Any], name: str) -> BismoothError:
    largest = 0.0
    for piece in pieces:
        if not np.all(np.isfinite(piece)):
            return BismoothError(
                f"{name}: the tensor is damaged. Expected finite values, got NaN or infinity. Check the checkpoint."
            )
        largest = max(largest, float(np.max(np.abs(piece))))
    return BismoothError(
        f"{name}: does not fit into {dtype}. Expected values within ±{float_limits(dtype).largest:.5g}, got "
        f"{largest:.5g}. Compute in bfloat16 or float32 instead."
    )


def _require_float32(graph: Graph) -> None:
    for node in graph.nodes:
        if any(isinstance(value, type(graph)) for value in node.attrs.values()):
            raise BismoothError(
                f"precision: node {node.name} has a subgraph. Expected a graph without control flow, got {node.op}. "
                "Export the model without it, or keep the graph in float32."
            )
        for tensor in node.outputs:
            if tensor.is_empty():
                continue
            if dtype_of(tensor) is None:
                raise BismoothError(
                    f"precision: value {tensor.name} of node {node.name} has no recorded type. Expected one from shape "
                    f"inference, got none. Check that {node.op} is an operator of the graph's opset."
                )
            if dtype_of(tensor) in NARROW_TYPES.values():
                raise BismoothError(
                    f"precision: value {tensor.name} of node {node.name} is {dtype_of(tensor)} already. Expected a "
                    "graph that computes in float32, got a mixed one. Start from the float32 graph of the artifact."
                )


@dataclass(slots=True)
class _Rewriter:
    graph: Graph
    wide: frozenset[int]
    narrow: np.dtype[Any]
    _nodes: list[Node] = field(default_factory=list[Node])
    _wide_values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _narrow_values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _names: set[str] = field(default_factory=set[str])

    def run(self) -> None:
        """Build the nodes anew, in order, with Casts before the first reader of a value in its other type."""
        outputs = {tensor.name for tensor in self.graph.outputs}
        self._names = {node.name for node in self.graph.nodes}
        self._names.update(tensor.name for node in self.graph.nodes for tensor in (*node.inputs, *node.outputs))
        for node in list(self.graph.nodes):
            is_wide = id(node) in self.wide
            for place, tensor in enumerate(node.inputs):
                if is_float(tensor):
                    node.inputs[place] = self._read(node, place, tensor, is_wide)
            if node.op == "DequantizeLinear" and not is_wide:
                node.attrs.pop("output_dtype", None)
            self._nodes.append(node)
            for place, tensor in enumerate(node.outputs):
                if is_float(tensor):
                    self._write(node, place, tensor, is_wide, tensor.name in outputs)
        self.graph.nodes[:] = self._nodes

    def _read(self, node: Node, place: int, tensor: Tensor, is_wide: bool) -> Tensor:
        name = tensor.name
        if node.op in AGNOSTIC:
            is_wide = name in self._wide_values or name not in self._narrow_values
        elif not _is_generic(node, "inputs", place, self.graph.opset):
            is_wide = True
        known = self._wide_values if is_wide else self._narrow_values
        if name not in known:
            known[name] = self._widened(tensor) if is_wide else self._narrowed(tensor, node)
        return known[name]

    def _write(self, node: Node, place: int, tensor: Tensor, is_wide: bool, is_output: bool) -> None:
        if is_wide or not _is_generic(node, "outputs", place, self.graph.opset):
            self._wide_values[tensor.name] = tensor
            return
        name = self._unique(f"{tensor.name}.{self.narrow}") if is_output else tensor.name
        value = make_variable(name, self.narrow, shape_of(tensor))
        node.outputs[place] = value
        self._narrow_values[tensor.name] = value
        if is_output:
            self._cast(value, tensor, node.name)
            self._wide_values[tensor.name] = tensor

    def _widened(self, tensor: Tensor) -> Tensor:
        if tensor.name not in self._narrow_values:
            return tensor  # a graph input or an initializer
        source = self._narrow_values[tensor.name]
        name = self._unique(f"{tensor.name}.float32")
        return self._cast(source, make_variable(name, np.dtype(np.float32), shape_of(tensor)))

    def _narrowed(self, tensor: Tensor, reader: Node) -> Tensor:
        if is_inline(tensor):
            return make_constant(self._unique(f"{tensor.name}.{self.narrow}"), self._converted(tensor, reader))
        source = self._wide_values.get(tensor.name, tensor)
        producer = source.inputs[0] if source.inputs else None
        if producer is not None and producer.op == "Cast":
            source = producer.inputs[0]  # an initializer in another type, or integers
            if dtype_of(source) == self.narrow:
                return source
        elif producer is not None and is_mask(source):
            source = self._clamped(source)
        name = self._unique(f"{tensor.name}.{self.narrow}")
        return self._cast(source, make_variable(name, self.narrow, shape_of(tensor)))

    def _converted(self, tensor: Tensor, reader: Node) -> Array:
        values = read(tensor)
        largest = float_limits(self.narrow).largest
        masked = np.abs(values) >= MASK
        clamped = np.where(masked, np.clip(values, -largest, largest), values)
        return narrow(clamped, self.narrow, f"{reader.name}: {tensor.name}")

    def _clamped(self, tensor: Tensor) -> Tensor:
        lowest = make_constant(
            self._unique(f"{tensor.name}.lowest"), np.array(-float_limits(self.narrow).largest, np.float32)
        )
        result = make_variable(self._unique(f"{tensor.name}{CLAMPED}"), np.dtype(np.float32), shape_of(tensor))
        self._nodes.append(make_node("Max", self._unique(f"{_origin_name(tensor)}/Max"), [tensor, lowest], [result]))
        return result

    def _cast(self, source: Tensor, target: Tensor, base: str | None = None) -> Tensor:
        dtype = dtype_of(target)
        assert dtype is not None
        name = self._unique(f"{base or _origin_name(source)}/Cast_{dtype}")
        to = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
        self._nodes.append(make_node("Cast", name, [source], [target], {"to": to}))
        return target

    def _unique(self, base: str) -> str:
        name, count = base, 0
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names.add(name)
        return name


def _origin_name(tensor: Tensor) -> str:
    return tensor.inputs[0].name if tensor.inputs else tensor.name


def _is_generic(node: Node, side: Literal["inputs", "outputs"], place: int, opset: int) -> bool:
    """Whether an input or output may have any float type, unlike the scales of Resize, which are always float32."""
    if not is_standard(node) or not onnx.defs.has(node.op):
        return False
    schema = onnx.defs.get_schema(node.op, opset, "")
    formal = schema.inputs if side == "inputs" else schema.outputs
    return not formal[min(place, len(formal) - 1)].type_str.startswith("tensor(")


def _drop_idle_casts(graph: Graph) -> None:
    outputs = {tensor.name for tensor in graph.outputs}
    for node in graph.nodes:
        idle = node.op == "Cast" and is_float(node.inputs[0]) and is_float(node.outputs[0])
        if idle and node.outputs[0].name not in outputs:
            _replace_reads(node.outputs[0], node.inputs[0])


def _replace_reads(old: Tensor, new: Tensor) -> None:
    for reader in list(old.outputs):
        for place, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[place] = new


def _report(graph: Graph, dtype: np.dtype[Any]) -> PrecisionReport:
    types = [[dtype_of(tensor) for tensor in node.outputs if not tensor.is_empty()] for node in graph.nodes]
    computing = [kind for node, kind in zip(graph.nodes, types, strict=True) if node.op != "Cast"]
    return PrecisionReport(
        narrow=sum(dtype in kind for kind in computing),
        wide=sum(np.float32 in kind for kind in computing),
        casts=sum(node.op == "Cast" for node in graph.nodes),
        stored=tuple(cast.initializer.name for cast in stored_casts(graph)),
    )
