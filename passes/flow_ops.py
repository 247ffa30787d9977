"""What each ONNX operation does to channel labels: one rule per operation, for ``flow``.

A rule must be right for *every* size of the symbolic dimensions. An operation without a rule, or a rule that raises
``OpaqueError``, does not commute with a scale per channel.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..passes._gs import Node, dtype_of
from ..passes.flow_labels import NONE, ConstantUse, Labels, OpaqueError, Visit, keeps_order, label_shape

Rule = Callable[[Visit], list[Labels | None]]


def _nothing(visit: Visit) -> list[Labels | None]:
    """Shape and Size: the result does not depend on the elements."""
    return [None for _ in visit.node.outputs]


def _same(visit: Visit) -> list[Labels | None]:
    return [visit.only()]


def _cast(visit: Visit) -> list[Labels | None]:
    dtype = dtype_of(visit.node.outputs[0])
    if dtype is None or dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise OpaqueError(f"a cast to {dtype} rounds")
    return [visit.only()]


def _view(visit: Visit) -> list[Labels | None]:
    labels, before, after = visit.only(), visit.dims(0), visit.out_dims()
    if labels.size != int(np.prod(label_shape(after))) or not keeps_order(before, after):
        raise OpaqueError(f"{visit.node.op} from {list(before)} to {list(after)} mixes channels with positions")
    return [labels.reshape(label_shape(after))]


def _transpose(visit: Visit) -> list[Labels | None]:
    return [np.transpose(visit.only(), visit.node.attrs.get("perm"))]


def _repeat(visit: Visit) -> list[Labels | None]:
    """Expand and Tile: the input repeated as a whole along each axis."""
    labels, shape = visit.only(), label_shape(visit.out_dims())
    padded = labels.reshape((1,) * (len(shape) - labels.ndim) + labels.shape)
    if any(size % part for size, part in zip(shape, padded.shape, strict=True)):
        raise OpaqueError(f"{visit.node.op} from {labels.shape} to {shape} is not a repetition")
    return [np.tile(padded, [size // part for size, part in zip(shape, padded.shape, strict=True)])]


def _concat(visit: Visit) -> list[Labels | None]:
    places = range(len(visit.node.inputs))
    if visit.node.outputs[0].name in visit.index.caches:  # what it appends to came out of it, scaled alike
        places = places[1:]
    parts = [visit.full(place) for place in places]
    axis = visit.axis(parts[0].ndim)
    if isinstance(visit.out_dims()[axis], int):
        return [np.concatenate(parts, axis=axis)]
    stacked = np.concatenate(parts, axis=axis)
    return [visit.constant_along(stacked, axis)]


def _split(visit: Visit) -> list[Labels | None]:
    labels = visit.only()
    axis = visit.axis(labels.ndim)
    if not isinstance(visit.dims(0)[axis], int):
        return [labels for _ in visit.node.outputs]
    sizes = [label_shape(visit.out_dims(place))[axis] for place in range(len(visit.node.outputs))]
    if sum(sizes) != labels.shape[axis]:
        raise OpaqueError(f"the parts {sizes} of {visit.node.op} do not add up to {labels.shape[axis]}")
    return list(np.split(labels, np.cumsum(sizes)[:-1], axis=axis))


def _slice(visit: Visit) -> list[Labels | None]:
    labels, dims = visit.only(), visit.dims(0)
    axes = visit.integers(3) if visit.has(3) else list(range(labels.ndim))
    axes = [axis % labels.ndim for axis in axes]
    if not any(isinstance(dims[axis], int) for axis in axes):
        return [labels]
    starts, ends = visit.integers(1), visit.integers(2)
    steps = visit.integers(4) if visit.has(4) else [1] * len(axes)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = dims[axis]
        if isinstance(size, int):
            labels = labels.take(_slice_indices(size, start, end, step), axis)
    return [labels]


def _slice_indices(size: int, start: int, end: int, step: int) -> NDArray[np.int64]:
    low, high = (0, size) if step > 0 else (-1, size - 1)
    first, last = (bound + size if bound < 0 else bound for bound in (start, end))
    return np.arange(min(max(first, low), high), min(max(last, low), high), step)


def _gather(visit: Visit) -> list[Labels | None]:
    labels = visit.only()
    axis = visit.axis(labels.ndim)
    if not isinstance(visit.dims(0)[axis], int):
        return [labels.take(np.zeros(label_shape(visit.dims(1)), np.int64), axis)]
    indices = visit.index.array(visit.node.inputs[1].name)
    if indices is None:
        raise OpaqueError("the indices of Gather are not constant")
    return [labels.take(indices, axis)]


def _add(visit: Visit) -> list[Labels | None]:
    for place in (0, 1):
        if visit.is_constant(place):
            return [_add_bias(visit, place)]
    a, b = np.broadcast_arrays(visit.full(0), visit.full(1))
    differs = a != b
    for side in (a, b):
        visit.pinned.append((side[differs], "the channel is added to a value that is not scaled alike"))
    return [np.where(differs, NONE, a).astype(np.int32)]


def _add_bias(visit: Visit, place: int) -> Labels:
    tensor = visit.node.inputs[place]
    constant = visit.index.array(tensor.name)
    if constant is None:
        raise OpaqueError(f"the constant {tensor.name} is too big or not simple enough to be divided")
    labels, channels = np.broadcast_arrays(visit.full(1 - place), np.arange(constant.size).reshape(constant.shape))
    if not constant.any():
        return labels
    if len(visit.index.users(tensor.name)) > 1 or tensor.name in visit.index.outputs:
        raise OpaqueError(f"the bias {tensor.name} is also used elsewhere")
    table = np.full(constant.size, NONE, np.int32)
    table[channels.ravel()] = labels.ravel()
    differs = table[channels] != labels
    for side in (labels, table[channels]):
        visit.pinned.append((side[differs], f"one element of {tensor.name} is added to several channels"))
    table[channels[differs]] = NONE
    visit.biases.append(ConstantUse(tensor.name, visit.node.name, table.reshape(constant.shape)))
    return np.where(differs, NONE, labels).astype(np.int32)


def _multiply(visit: Visit) -> list[Labels | None]:
    a, b = np.broadcast_arrays(visit.full(0), visit.full(1))
    if not (visit.is_constant(0) or visit.is_constant(1)):
        visit.crossed = "product"
    both = (a != NONE) & (b != NONE)
    squared = both & (a == b)
    visit.pinned.append((a[squared], "a channel is multiplied by itself"))
    visit.contested.append((a[both & ~squared], "the channel is multiplied by another one that is scaled"))
    return [np.where(squared, NONE, np.where(b != NONE, b, a)).astype(np.int32)]


def _divide(visit: Visit) -> list[Labels | None]:
    if visit.labels[1] is not None:
        raise OpaqueError("the channels stand in a denominator")
    if not visit.is_constant(1):
        visit.crossed = "product"
    labels, _ = np.broadcast_arrays(visit.full(0), visit.full(1))
    return [labels]


def _matmul(visit: Visit) -> list[Labels | None]:
    """A product of two activations, such as P · V: the labels of one operand pass along its free axis."""
    place = 1 if visit.labels[1] is not None else 0
    labels = visit.only(place)
    if labels.ndim < 2 or len(visit.dims(1 - place)) < 2:
        raise OpaqueError("a product of a vector sums over the channels")
    visit.crossed = "attention"
    kept = visit.constant_along(labels, labels.ndim - 2 if place == 1 else labels.ndim - 1)
    return [np.broadcast_to(kept, label_shape(visit.out_dims()))]


def _attention(visit: Visit) -> list[Labels | None]:
    """Y[head] = P[head] · V[head // group]; the other inputs must not be scaled, and a cache is not followed."""
    for place, labels in enumerate(visit.labels):
        if labels is not None and place != 2:
            visit.pinned.append((labels, f"the channels enter Attention at input {place}, not as values"))
    values = visit.labels[2]
    if values is None:
        return [None]
    if visit.has(5) or any(_is_used(visit, place) for place in range(1, len(visit.node.outputs))):
        raise OpaqueError("Attention keeps its values in a cache")
    visit.crossed = "attention"
    return [_repeat_heads(visit, values)]


def _repeat_heads(visit: Visit, values: Labels) -> Labels:
    out = label_shape(visit.out_dims())
    if values.ndim == 4:
        rows = visit.constant_along(values, 2)
        return np.broadcast_to(np.repeat(rows, out[1] // rows.shape[1], axis=1), out)
    heads, groups = int(visit.node.attrs["kv_num_heads"]), int(visit.node.attrs["q_num_heads"])
    rows = visit.constant_along(values, 1)
    per_head = rows.reshape(rows.shape[0], 1, heads, -1)
    return np.broadcast_to(np.repeat(per_head, groups // heads, axis=2).reshape(rows.shape[0], 1, -1), out)


def _is_used(visit: Visit, place: int) -> bool:
    tensor = visit.node.outputs[place]
    return not tensor.is_empty() and (bool(tensor.outputs) or tensor.name in visit.index.outputs)


RULES: dict[str, Rule] = {
    "Shape": _nothing,
    "Size": _nothing,
    "Identity": _same,
    "Cast": _cast,
    "Reshape": _view,
    "Squeeze": _view,
    "Unsqueeze": _view,
    "Flatten": _view,
    "Transpose": _transpose,
    "Expand": _repeat,
    "Tile": _repeat,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Add": _add,
    "Sub": _add,
    "Mul": _multiply,
    "Div": _divide,
    "Neg": _same,
    # f(x / s) = f(x) / s for every s > 0:
    "Relu": _same,
    "LeakyRelu": _same,
    "PRelu": _same,
    "Abs": _same,
    "MatMul": _matmul,
    "Attention": _attention,
}


def rule_of(node: Node) -> Rule | None:
    """The rule for a node of the ONNX domain, else None."""
    return None if node.domain else RULES.get(node.op)
