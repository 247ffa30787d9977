"""Let the caller of a graph choose the positions whose logits it computes.

A decoder needs those of the last position only, while the product with the vocabulary's weight takes a large part of a
small model's time, and the logits of all positions of a prompt are the largest buffer of an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper, numpy_helper

from ..export.graph_names import LOGITS
from .base import KEPT, LOGITS_AT

_PRODUCTS = frozenset({"MatMul", "Gemm"})
_BY_POSITION = _PRODUCTS | {
    *("Abs", "Add", "Cast", "Clip", "DequantizeLinear", "Div", "Identity", "Max", "Min", "Mul", "QuantizeLinear"),
    *("ReduceMax", "Sub", "Tanh"),
}
"""Operators that, in the head of a model, compute each position [batch, position, …] by itself."""


def keep_logits(model: onnx.ModelProto) -> None:
    """Add the input ``logits_at`` [kept], int64; the output ``logits`` [batch, kept, vocabulary] is of those positions.

    The other positions are dropped before the head, or behind it where the head is of an unknown form.
    """
    graph = model.graph
    place, tail = _find_place(graph)
    kept = f"{place}/{KEPT}"
    gather = helper.make_node("Gather", [place, LOGITS_AT], [kept], name=kept, axis=1)
    if not tail:  # behind the head: the kept ones get the output's name
        producer = next(node for node in graph.node if LOGITS in node.output)
        producer.output[list(producer.output).index(LOGITS)] = kept
        gather.input[0], gather.output[0] = kept, LOGITS
    for node in tail:
        for index, value in enumerate(node.input):
            if value == place:
                node.input[index] = kept
    nodes = list(graph.node)
    after = next((number for number, node in enumerate(nodes, 1) if gather.input[0] in node.output), 0)
    del graph.node[after:]
    graph.node.extend([gather, *nodes[after:]])
    graph.input.append(helper.make_tensor_value_info(LOGITS_AT, TensorProto.INT64, [KEPT]))
    (logits,) = (value for value in graph.output if value.name == LOGITS)
    logits.type.tensor_type.shape.dim[1].dim_param = KEPT
    del graph.value_info[:]


def _find_place(graph: onnx.GraphProto) -> tuple[str, list[onnx.NodeProto]]:
    """The value [batch, sequence, …] before the head, and the nodes that compute the logits from it alone."""
    varying, constants = _varying(graph), {tensor.name: tensor for tensor in graph.initializer}
    frontier, tail = {LOGITS}, list[onnx.NodeProto]()
    for node in reversed(graph.node):
        if frontier.isdisjoint(node.output):
            continue
        if node.op_type not in _BY_POSITION or (node.op_type == "ReduceMax" and not _is_over_channels(node, constants)):
            break
        tail.append(node)
        frontier = (frontier - set(node.output)) | varying.intersection(node.input)
        if len(frontier) == 1 and any(node.op_type in _PRODUCTS for node in tail):
            return (frontier.pop(), tail) if _is_apart(graph, tail) else (LOGITS, [])
    return LOGITS, []


def _is_apart(graph: onnx.GraphProto, tail: Sequence[onnx.NodeProto]) -> bool:
    """Whether nothing but the logits comes of what the nodes in ``tail`` compute."""
    made = {value for node in tail for value in node.output} - {LOGITS}
    inside = {node.name for node in tail}
    read = {value for node in graph.node if node.name not in inside for value in node.input}
    return made.isdisjoint(read | {value.name for value in graph.output})


def _is_over_channels(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    axes = constants.get(node.input[1]) if len(node.input) > 1 else None
    return axes is not None and numpy_helper.to_array(axes).tolist() == [-1]


def _varying(graph: onnx.GraphProto) -> set[str]:
    """The values that follow from inputs."""
    varying = {value.name for value in graph.input}
    for node in graph.node:
        if varying.intersection(node.input):
            varying.update(node.output)
    return varying
