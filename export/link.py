"""Point the initializers of a traced graph at the bytes of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from .errors import BismoothError
from .safetensors_file import TensorEntry
from .source import Weights

_IR_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}


def stored_names(model: Any, weights: Weights) -> dict[str, str]:
    """Parameter name of a transformers model → the name of its tensor in the checkpoint.

    Checkpoints spell names differently from the model (old names, with or without the base model's prefix); transformers keeps the rules.
    Parameters that share storage (tied embeddings) share a tensor.

    Raises:
        BismoothError: transformers computes a parameter from several tensors, so that it has no bytes in the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[str, str] = {}
    for stored in weights.entries:
        if stored in parameters:
            names[stored] = stored
            continue
        name, converted = rename_source_key(stored, renamings, converters, model.base_model_prefix, parameters)
        if converted is not None:
            path = weights.entries[stored][0]
            raise BismoothError(
                f"{path}: tensor {stored} must be rearranged to become {name} of {type(model).__name__}; its bytes cannot be used as they "
                "are. Load the model with transformers, save it with save_original_format=False and export that folder."
            )
        names.setdefault(name, stored)
    by_parameter = {id(parameters[name]): stored for name, stored in names.items() if name in parameters}
    return {name: by_parameter[id(value)] for name, value in parameters.items() if id(value) in by_parameter}


def link_weights(model: ir.Model, weights: Weights, names: Mapping[str, str]) -> None:
    """Give every initializer without data its place in the checkpoint's files, in place; weights stay outside.

    An initializer takes its name in the checkpoint (``names``). Where the checkpoint's type is not FP32, a ``Cast`` to FP32 follows it.

    Raises:
        BismoothError: a tensor is missing, has another shape than the model's configuration says, or is not a float.
    """
    graph = model.graph
    linked: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None:
            continue
        if name not in names:
            raise BismoothError(
                f"{weights.files[0].parent}: the checkpoint has no tensor {name}. It has {len(weights.entries)} tensors, "
                f"for example {', '.join(sorted(weights.entries)[:3])}. Is the checkpoint complete, and of this architecture?"
            )
        stored = names[name]
        path, entry = weights.entries[stored]
        expected = tuple(int(cast(Any, size)) for size in cast(ir.Shape, value.shape))
        if entry.shape != expected:
            raise BismoothError(
                f"{path}: tensor {stored} has shape {list(entry.shape)}, but config.json makes it {list(expected)}. "
                "Weights and configuration belong to different models."
            )
        graph.initializers.pop(name)
        if stored in linked:
            value.replace_all_uses_with(linked[stored])
            continue
        linked[stored] = _external(value, stored, path, entry)
        graph.initializers.add(linked[stored])
    for stored, value in linked.items():
        if value.dtype != ir.DataType.FLOAT:
            _cast_to_float(graph, stored, value)


def _external(value: ir.Value, name: str, path: Path, entry: TensorEntry) -> ir.Value:
    if entry.dtype not in _IR_TYPES:
        raise BismoothError(f"{path}: tensor {name} has type {entry.dtype}. Expected a float type.")
    value.name = name
    value.dtype = _IR_TYPES[entry.dtype]
    value.const_value = ir.ExternalTensor(
        path.name, entry.offset, entry.length, value.dtype, shape=ir.Shape(entry.shape), name=name, base_dir=path.parent
    )
    return value


def _cast_to_float(graph: ir.Graph, name: str, value: ir.Value) -> None:
    node = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
    output = node.outputs[0]
    output.name, output.dtype, output.shape = f"{name}/Cast", ir.DataType.FLOAT, value.shape
    uses = [(user, index) for user, index in value.uses() if user is not node]
    for user, index in uses:
        user.replace_input_with(index, output)
    graph.insert_before(graph[0], node)
