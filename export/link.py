"""Point the initializers of a traced graph at the bytes of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch

from .errors import BismoothError
from .safetensors_file import TensorEntry
from .source import Weights

_IR_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}
_LEGACY = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


def tied_names(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter name → all names of the same parameter (tied embeddings), itself included."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def link_weights(model: ir.Model, weights: Weights, tied: dict[str, tuple[str, ...]], base_prefix: str) -> None:
    """Give every initializer without data its place in the checkpoint's files, in place; weights stay outside.

    An initializer takes the checkpoint's name. Where the checkpoint's type is not FP32, a ``Cast`` to FP32 follows it.

    Raises:
        BismoothError: a tensor is missing, has another shape than the model's configuration says, or is not a float.
    """
    graph = model.graph
    linked: dict[str, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None:
            continue
        stored = _find(name, weights, tied, base_prefix)
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


def _find(name: str, weights: Weights, tied: dict[str, tuple[str, ...]], base_prefix: str) -> str:
    for candidate in _candidates([name, *tied.get(name, ())], base_prefix):
        if candidate in weights.entries:
            return candidate
    raise BismoothError(
        f"{weights.files[0].parent}: the checkpoint has no tensor {name}. It has {len(weights.entries)} tensors, "
        f"for example {', '.join(sorted(weights.entries)[:3])}. Is the checkpoint complete, and of this architecture?"
    )


def _candidates(names: Sequence[str], base_prefix: str) -> Iterable[str]:
    """The ways in which a checkpoint may spell a parameter: without or with the base model's prefix, with old norm names."""
    prefix = f"{base_prefix}."
    for name in names:
        for spelled in (name, name.removeprefix(prefix), prefix + name):
            yield spelled
            for new, old in _LEGACY:
                if spelled.endswith(new):
                    yield spelled.removesuffix(new) + old


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
