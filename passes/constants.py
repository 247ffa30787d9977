"""Constant expressions of a graph, such as Gemma's ``1 + w`` or a bias in bfloat16 behind a Cast, as numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from ..passes._gs import Array, Node, Tensor, is_constant, read, shape_of

SMALL = 1 << 22
"""Elements up to which a constant is read: vectors over channels and vocabularies, never a weight matrix of an LLM."""


def evaluate(tensor: Tensor) -> Array | None:
    """The value of a constant expression, or None if it is too big, not constant or has an operation unknown here."""
    if is_constant(tensor):
        return read(tensor) if _is_small(tensor) else None
    if not tensor.inputs:
        return None
    node = tensor.inputs[0]
    rule = _RULES.get(node.op)
    if rule is None or node.domain or len(node.outputs) != 1:
        return None
    arguments: list[Array] = []
    for source in node.inputs:
        argument = evaluate(source)
        if argument is None:
            return None
        arguments.append(argument)
    return rule(node, *arguments)


def _is_small(tensor: Tensor) -> bool:
    shape = shape_of(tensor) or ()
    return int(np.prod([dim for dim in shape if isinstance(dim, int)], dtype=np.int64)) <= SMALL


def _cast(node: Node, x: Array) -> Array:
    return x.astype(onnx.helper.tensor_dtype_to_np_dtype(int(node.attrs["to"])))


def _transpose(node: Node, x: Array) -> Array:
    return np.transpose(x, node.attrs.get("perm"))


def _reshape(node: Node, x: Array, shape: Array) -> Array:
    keep_zero = bool(node.attrs.get("allowzero", 0))
    sizes = [x.shape[axis] if size == 0 and not keep_zero else int(size) for axis, size in enumerate(shape)]
    return x.reshape(sizes)


def _unsqueeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    chosen = node.attrs["axes"] if axes is None else axes
    return np.expand_dims(x, tuple(int(axis) for axis in chosen))


def _squeeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    chosen = node.attrs.get("axes") if axes is None else axes
    return np.squeeze(x) if chosen is None else np.squeeze(x, tuple(int(axis) for axis in chosen))


def _concat(node: Node, *parts: Array) -> Array:
    return np.concatenate(parts, axis=int(node.attrs["axis"]))


def _elementwise(function: Callable[..., Any]) -> Callable[..., Array]:
    def apply(_: Node, *arguments: Array) -> Array:
        return np.asarray(function(*arguments))

    return apply


def _divide(_: Node, a: Array, b: Array) -> Array:
    return a / b if np.issubdtype(a.dtype, np.inexact) else (a // b).astype(a.dtype)


_RULES: dict[str, Callable[..., Array]] = {
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _divide,
    "Neg": _elementwise(np.negative),
    "Sqrt": _elementwise(np.sqrt),
    "Identity": _elementwise(np.asarray),
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
}
