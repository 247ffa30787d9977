"""Choose which values of an ONNX graph are computed, leaving the weights on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
from google.protobuf.message import DecodeError

from ..export.errors import BismoothError


class _Repeated(Protocol):
    def extend(self, iterable: Iterable[Any], /) -> None: ...
    def __delitem__(self, key: slice, /) -> None: ...


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph in the file ``path``, its external data left on disk.

    Raises:
        BismoothError: ``path`` cannot be read or is no ONNX model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BismoothError(f"{path}: cannot be read ({error.strerror}). Expected an ONNX file.") from error
    return parse_graph(data, str(path))


def parse_graph(data: bytes, name: str) -> onnx.ModelProto:
    """The graph serialized in ``data``; ``name`` is for messages.

    Raises:
        BismoothError: ``data`` is no ONNX model.
    """
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise BismoothError(f"{name}: not a valid ONNX file: {error}. Make the artifact again.") from error
    if not model.graph.node:
        raise BismoothError(f"{name}: not a valid ONNX file: it holds no nodes. Make the artifact again.")
    return model


def add_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Make the values ``names`` outputs of ``model``, in place, after those it has. ONNX Runtime infers their types.

    Raises:
        BismoothError: a name is not a value of the graph.
    """
    check_names(model.graph, names)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)


def cut(model: onnx.ModelProto, outputs: Sequence[str]) -> None:
    """Make the values ``outputs`` the only outputs of ``model``, in place, and drop all that they do not need.

    Graph inputs stay, also those that nothing reads any more, so the same feeds fit.

    Raises:
        BismoothError: a name is not a value of the graph.
    """
    graph = model.graph
    check_names(graph, outputs)
    producer = {name: node for node in graph.node for name in node.output if name}
    needed: set[str] = set()
    todo = list(outputs)
    while todo:
        name = todo.pop()
        if name in needed:
            continue
        needed.add(name)
        if name in producer:
            node = producer[name]
            todo += [*node.input, *node.output, *captured(node)]
    _replace(graph.node, [node for node in graph.node if needed.intersection(node.output)])
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed])
    _replace(graph.value_info, [value for value in graph.value_info if value.name in needed])
    _replace(graph.output, [onnx.ValueInfoProto(name=name) for name in outputs])


def captured(node: onnx.NodeProto) -> set[str]:
    """Names that the bodies of ``node`` (If, Loop, Scan) may take from the graph around it."""
    bodies = [body for a in node.attribute for body in ([a.g] if a.HasField("g") else a.graphs)]
    inner = [n for body in bodies for n in body.node]
    names = {name for n in inner for name in n.input} | {value.name for body in bodies for value in body.output}
    return names.union(*(captured(n) for n in inner))


def check_names(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    """Raise :class:`BismoothError` unless all ``names`` are values of the graph."""
    known = {name for node in graph.node for name in node.output}
    known.update(value.name for value in (*graph.input, *graph.initializer))
    missing = [name for name in names if name not in known]
    if missing:
        raise BismoothError(
            f"value {missing[0]}: not in the graph, like {len(missing)} of the {len(names)} values asked for. "
            "Expected names of inputs, initializers or node outputs. Make the list from the same graph."
        )


def _replace(field: _Repeated, items: list[Any]) -> None:
    del field[:]
    field.extend(items)
