"""Point the initializers of a traced graph at the bytes of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from .errors import BismoothError
from .safetensors_file import TensorEntry
from .scopes import scopes_of, set_scopes
from .source import Weights

_IR_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}


def link_weights(model: ir.Model, weights: Weights, names: Mapping[str, str]) -> None:
    """Give every initializer without data its place in the checkpoint's files, in place; weights stay outside.

    An initializer takes its name in the checkpoint (``names``). Where the checkpoint's type is not FP32, a ``Cast``
    to FP32 follows it.

    Raises:
        BismoothError: a tensor is missing, has another shape than the model's configuration says, or is not a float.
    """
    graph = model.graph
    linked: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None:
            continue
        if name not in names:
            examples = ", ".join(sorted(weights.entries)[:3])
            raise BismoothError(
                f"{weights.files[0].parent}: the checkpoint has no tensor {name}. It has {len(weights.entries)} "
                f"tensors, for example {examples}. Is the checkpoint complete, and of this architecture?"
            )
        stored = names[name]
        path, entry = weights.entries[stored]
        expected = tuple(int(cast(Any, size)) for size in cast(ir.Shape, value.shape))
        if entry.shape != expected:
            raise BismoothError(
                f"{path}: tensor {stored} has shape {list(entry.shape)}, but the model's is {list(expected)}. "
                "Weights and configuration belong to different models."
            )
        graph.initializers.pop(name)
        if stored in linked:
            value.replace_all_uses_with(linked[stored])
            continue
        linked[stored] = _external(value, stored, path, entry)
        graph.initializers.add(linked[stored])
    for value in linked.values():
        if value.dtype != ir.DataType.FLOAT:
            _cast_to_float(graph, value)


def _external(value: ir.Value, name: str, path: Path, entry: TensorEntry) -> ir.Value:
    if entry.dtype not in _IR_TYPES:
        raise BismoothError(
            f"{path}: tensor {name} has type {entry.dtype}. Expected a float type: one of {', '.join(_IR_TYPES)}."
        )
    dtype, shape = _IR_TYPES[entry.dtype], ir.Shape(entry.shape)
    value.name = name
    value.dtype = dtype
    value.const_value = ir.ExternalTensor(
        path.name, entry.offset, entry.length, dtype, shape=shape, name=name, base_dir=path.parent
    )
    return value


def _cast_to_float(graph: ir.Graph, value: ir.Value) -> None:
    """Put a Cast before the first user, in that node's module."""
    uses = list(value.uses())
    first = min((node for node, _ in uses), key=list(graph).index) if len(uses) > 1 else uses[0][0]
    node = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, value.shape
    set_scopes(node, scopes_of(first))
    for user, index in uses:
        user.replace_input_with(index, node.outputs[0])
    graph.insert_before(first, node)
