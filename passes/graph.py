"""Read and write ONNX files as onnx-graphsurgeon graphs, and ask them questions, without reading weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from google.protobuf.message import DecodeError

from ..export.errors import BismoothError
from ..export.graph_names import is_present, past_of
from ..export.replacing import replacing
from ..passes import constants
from ..passes._gs import (
    Array,
    Dim,
    Graph,
    Node,
    Tensor,
    bind_folder,
    dtype_of,
    export_model,
    external_location,
    external_proto,
    import_model,
    is_constant,
    make_constant,
    shape_of,
    to_constant,
)


def load(path: Path, data: bytes | None = None) -> Graph:
    """The graph of an ONNX file, or the one that is serialized in ``data`` and whose weights lie beside ``path``.

    Weights stay in their files. Every node has a unique name, ``Constant`` nodes have become initializers, nodes
    are in topological order and every value has a recorded shape if ONNX can infer it.

    Raises:
        BismoothError: Not an ONNX file, external data that is outside the folder, missing or truncated, or nodes
            that are out of order or form a cycle.
    """
    model = _read_model(path, data)
    if _lacks_shapes(model.graph):
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = import_model(model)
    _inline_constant_nodes(graph)
    _name_nodes(graph)
    _require_order(graph, path)
    _bind_external_data(graph, path.parent)
    return graph


def save(graph: Graph, path: Path) -> None:
    """Write a graph as one ONNX file; references to external data are kept as they are.

    The weight files that the graph refers to must lie in ``path``'s folder when the file is loaded. The file
    appears under its name only when it is complete.
    """
    data = export_model(graph).SerializeToString()
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@dataclass(frozen=True, eq=False)
class Index:
    """Look-ups over a graph as it is at one moment: build a new one after an edit.

    Attributes:
        nodes: The graph's own nodes by name (not those of subgraphs).
        order: Each node's place in the topological order.
        values: Every value and initializer by name.
        outputs: Names of the graph's outputs.
        constants: Names of the values that depend on no graph input.
        caches: Graph output → graph input: pairs of which the input takes, run after run, what the output gave.
    """

    nodes: dict[str, Node]
    order: dict[str, int]
    values: dict[str, Tensor]
    outputs: frozenset[str]
    constants: frozenset[str]
    caches: dict[str, str]

    @classmethod
    def of(cls, graph: Graph) -> "Index":
        """Index a graph whose nodes have unique names and are in topological order (as ``load`` makes it)."""
        values = {tensor.name: tensor for tensor in _tensors(graph)}
        known = {name for name, tensor in values.items() if is_constant(tensor)}
        for node in graph.nodes:
            inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
            if inputs and all(tensor.name in known for tensor in inputs):
                known.update(tensor.name for tensor in node.outputs)
        return cls(
            nodes={node.name: node for node in graph.nodes},
            order={node.name: place for place, node in enumerate(graph.nodes)},
            values=values,
            outputs=frozenset(tensor.name for tensor in graph.outputs),
            constants=frozenset(known),
            caches=find_caches(graph),
        )

    def producer(self, value: str) -> Node | None:
        """The node that computes a value; None for graph inputs and initializers."""
        inputs = self.values[value].inputs
        return inputs[0] if inputs else None

    def users(self, value: str) -> list[Node]:
        """The distinct nodes that read a value, those of subgraphs included."""
        return list({id(node): node for node in self.values[value].outputs}.values())

    def owns(self, node: Node) -> bool:
        """Whether the node belongs to the graph itself, not to a subgraph of an ``If`` or ``Loop``."""
        return self.nodes.get(node.name) is node

    def shape(self, value: str) -> tuple[Dim, ...] | None:
        """The recorded shape of a value, or None."""
        return shape_of(self.values[value])

    def array(self, value: str) -> Array | None:
        """A small constant, or a constant expression of small constants, as numpy; None if it is neither."""
        return constants.evaluate(self.values[value]) if value in self.constants else None


def find_caches(graph: Graph) -> dict[str, str]:
    """Outputs that are a graph's input with more positions behind it, and that input: keys and values of attention."""
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    outputs = [tensor for tensor in graph.outputs if is_present(tensor.name)]
    pairs = {tensor.name: past_of(tensor.name) for tensor in outputs}
    grown = {tensor.name for tensor in outputs if tensor.inputs and tensor.inputs[0].op == "Concat"}
    return {
        tensor.name: pairs[tensor.name]
        for tensor in outputs
        if tensor.name in grown and tensor.inputs[0].inputs[0] is inputs.get(pairs[tensor.name])
    }


def stored_place(index: Index, value: str, folder: Path) -> tuple[str, int]:
    """The file in ``folder`` that holds a constant, and the offset of its bytes. Casts change nothing in that.

    Raises:
        BismoothError: the constant is computed, or is not outside of the graph.
    """
    tensor = index.values[value]
    while tensor.inputs and tensor.inputs[0].op == "Cast":
        tensor = tensor.inputs[0].inputs[0]
    proto = external_proto(tensor)
    if proto is None:
        raise BismoothError(
            f"{value}: is computed from what is stored (as 1 + w in Gemma), or lies in the graph itself. Expected a "
            "tensor that a weight file holds as it is used."
        )
    place = external_location(proto, folder)
    return place.file.relative_to(folder).as_posix(), place.offset


def new_constant(name: str, values: Array, like: Tensor) -> Tensor:
    """A constant in the type of an existing value."""
    dtype = dtype_of(like)
    return make_constant(name, values if dtype is None else values.astype(dtype))


def _read_model(path: Path, data: bytes | None) -> onnx.ModelProto:
    try:
        model = onnx.ModelProto.FromString(path.read_bytes() if data is None else data)
    except DecodeError as error:
        raise BismoothError(
            f"{path}: not an ONNX file. Expected a serialized onnx.ModelProto, got {error}. Export the model again."
        ) from error
    except FileNotFoundError as error:
        raise BismoothError(
            f"{path}: no such file. Expected an ONNX model, got nothing. Check the path, or run 'bismooth export'."
        ) from error
    if not model.graph.node:
        raise BismoothError(
            f"{path}: not a model. Expected an ONNX graph with nodes, got an empty one. Export the model again."
        )
    return model


def _lacks_shapes(graph: onnx.GraphProto) -> bool:
    known = {info.name for info in (*graph.value_info, *graph.output) if info.type.tensor_type.HasField("shape")}
    return any(output and output not in known for node in graph.node for output in node.output)


def _tensors(graph: Graph) -> Iterator[Tensor]:
    for tensor in graph.inputs:
        yield tensor
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if not tensor.is_empty():
                yield tensor
    for tensor in graph.outputs:
        yield tensor


def _inline_constant_nodes(graph: Graph) -> None:
    kept: list[Node] = []
    for node in graph.nodes:
        if node.op != "Constant" or not _inline(node):
            kept.append(node)
    graph.nodes[:] = kept


def _inline(node: Node) -> bool:
    for key, value in node.attrs.items():
        if key == "value":
            source: Tensor | None = value
        else:
            source = _attribute_constant(key, value)
        if source is not None:
            to_constant(node.outputs[0], source)
            return True
    return False


def _attribute_constant(key: str, value: Any) -> Tensor | None:
    dtype = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return make_constant(key, np.asarray(value, dtype[key])) if key in dtype else None


def _name_nodes(graph: Graph) -> None:
    taken: set[str] = set()
    for place, node in enumerate(graph.nodes):
        base = node.name or f"{node.op}_{place}"
        name, suffix = base, 0
        while name in taken:
            suffix += 1
            name = f"{base}_{suffix}"
        node.name = name
        taken.add(name)


def _require_order(graph: Graph, path: Path) -> None:
    done: set[int] = set()
    for node in graph.nodes:
        for tensor in node.inputs:
            if any(id(producer) not in done for producer in tensor.inputs):
                raise BismoothError(
                    f"{path}: node {node.name} reads {tensor.name} before it is computed. Expected nodes in "
                    "topological order, got a cycle or an unsorted graph. Export the model again."
                )
        done.add(id(node))


def _bind_external_data(graph: Graph, folder: Path) -> None:
    for tensor in {id(tensor): tensor for tensor in _tensors(graph)}.values():
        if not is_constant(tensor):
            continue
        proto = external_proto(tensor)
        if proto is not None:
            external_location(proto, folder)
            bind_folder(tensor, folder)
