"""Readable, unique names for traced nodes and values: ``model.layers.0.self_attn.q_proj/MatMul``."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from .scopes import scopes_of


def name_nodes(model: ir.Model) -> None:
    """Name every node after its module and operator, and every value after the node that makes it, in place.

    Graph inputs, outputs and initializers keep their names. The exporter's tracing notes are dropped.
    """
    graph = model.graph
    keep = {id(value) for value in [*graph.inputs, *graph.outputs]}
    taken = {value.name for value in [*graph.inputs, *graph.outputs]} | set(graph.initializers)
    counts: Counter[str] = Counter()
    for node in graph:
        base = f"{_module(node)}/{node.op_type}"
        name = base
        while name in taken:
            counts[base] += 1
            name = f"{base}_{counts[base]}"
        taken.add(name)
        node.name = name
        for key in [key for key in node.metadata_props if key.startswith("pkg.")]:
            del node.metadata_props[key]
        for index, value in enumerate(node.outputs):
            if id(value) not in keep:
                value.name = name if len(node.outputs) == 1 else f"{name}:{index}"
            value.metadata_props.clear()


def _module(node: ir.Node) -> str:
    """The innermost module around the node; ``graph`` for what the model itself does."""
    scopes = scopes_of(node)[:-1]
    return scopes[-1] if scopes and not scopes[-1].startswith("_empty") else "graph"


def name_constants(model: ir.Model, parameters: set[str]) -> None:
    """Name initializers that are no parameters after their type and shape (``const.int64[1]_3``), in place."""
    graph = model.graph
    counts: Counter[str] = Counter()
    for name, value in list(graph.initializers.items()):
        if name in parameters or value.const_value is None:
            continue
        shape = "x".join(str(size) for size in value.const_value.shape.numpy())
        base = f"const.{value.const_value.dtype.name.lower()}[{shape}]"
        new = f"{base}_{counts[base]}"
        counts[base] += 1
        if new not in graph.initializers:
            value.name = new
