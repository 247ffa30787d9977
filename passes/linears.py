"""Find the linear layers of a graph: products of an activation and a constant weight matrix."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..passes._gs import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from ..passes.graph import Index

Layout = Literal["NK", "KN"]
"""Order of the axes of a stored weight: N outputs, K inputs."""

WEIGHT_OPERAND = 1
"""The input of MatMul and Gemm at which a linear's weight stands."""


@dataclass(frozen=True)
class Bias:
    """The constant vector [N] that is added to a linear's product.

    Attributes:
        value: The constant as it enters the addition: an initializer, or the Cast of one.
        initializer: The initializer behind it.
        node: The ``Add``, or the ``Gemm`` itself.
    """

    value: str
    initializer: str
    node: str


@dataclass(frozen=True)
class Linear:
    """Y = X Wᵀ (+ bias), with X ``[..., K]``.

    Attributes:
        name: The module's path, unique (``model.layers.0.self_attn.q_proj``).
        node: Name of the ``MatMul`` or ``Gemm``.
        x: The activation that enters.
        output: The value that leaves, after the bias.
        weight: The initializer; its shape is [N, K] or [K, N] as ``layout`` says.
        layout: Axes of the initializer as it is stored.
        k: Input channels.
        n: Output channels.
        bias: The bias, if there is one.
        is_cast: A ``Cast`` stands between the initializer and the product.
        shared_with: Names of the other nodes that use the same initializer.
    """

    name: str
    node: str
    x: str
    output: str
    weight: str
    layout: Layout
    k: int
    n: int
    bias: Bias | None
    is_cast: bool
    shared_with: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A product with a constant that is not a linear layer, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class _Weight:
    initializer: Tensor
    is_transposed: bool
    is_cast: bool


def find_linears(graph: Graph) -> list[Linear]:
    """The linear layers in topological order.

    ``MatMul(x, W)``, ``MatMul(x, Transpose(W))`` and ``Gemm`` with alpha = beta = 1, where W is a two-dimensional
    float initializer, possibly behind a ``Cast``.
    """
    return scan(graph)[0]


def scan(graph: Graph) -> tuple[list[Linear], list[Skipped]]:
    """The linear layers, and the products with a constant that are none (a stack of experts, Gemm with alpha ≠ 1)."""
    index = Index.of(graph)
    linears: list[Linear] = []
    skipped: list[Skipped] = []
    names: set[str] = set()
    for node in graph.nodes:
        if node.op not in ("MatMul", "Gemm") or node.domain:
            continue
        found = _linear(node, index, names)
        if isinstance(found, Linear):
            linears.append(found)
            names.add(found.name)
        elif found is not None:
            skipped.append(found)
    return linears, skipped


def find_head(linears: Sequence[Linear], graph: Graph) -> list[Linear]:
    """The linears that make the logits: a graph output is their result, but for its shape, a bias and a soft cap."""
    index = Index.of(graph)
    return [linear for linear in linears if _reaches_output(linear.output, index)]


def _linear(node: Node, index: Index, taken: set[str]) -> Linear | Skipped | None:
    operands = node.inputs[:2]
    constant_operands = [place for place, operand in enumerate(operands) if operand.name in index.constants]
    if len(operands) < 2 or len(constant_operands) != 1:
        return None
    if constant_operands != [WEIGHT_OPERAND]:
        return Skipped(node.name, f"the constant {node.inputs[0].name} is the left operand")
    weight = _resolve(node.inputs[WEIGHT_OPERAND])
    if not isinstance(weight, _Weight):
        return Skipped(node.name, f"its weight is computed by {weight.op} ({weight.name})")
    shape = shape_of(weight.initializer) or ()
    if len(shape) != 2:
        return Skipped(node.name, f"its weight {weight.initializer.name} has shape {list(shape)}, expected [N, K]")
    dtype = dtype_of(weight.initializer)
    if dtype is None or dtype.name not in ("float32", "float16", "bfloat16", "float64"):
        return Skipped(node.name, f"its weight {weight.initializer.name} is {dtype}, expected a float type")
    outputs_first = weight.is_transposed != bool(node.op == "Gemm" and node.attrs.get("transB", 0))
    n = int(str(shape[0 if outputs_first else 1]))
    if node.op == "Gemm" and (reason := _unusual_gemm(node, n, index)):
        return Skipped(node.name, reason)
    return _describe(node, weight, outputs_first, index, taken)


def _describe(node: Node, weight: _Weight, outputs_first: bool, index: Index, taken: set[str]) -> Linear:
    first, second = (int(str(dim)) for dim in shape_of(weight.initializer) or ())
    n, k = (first, second) if outputs_first else (second, first)
    bias = _gemm_bias(node, n, index) if node.op == "Gemm" else _added_bias(node, n, index)
    last = node if bias is None else index.nodes[bias.node]
    return Linear(
        name=unique(_linear_name(node, weight.initializer.name), taken),
        node=node.name,
        x=node.inputs[0].name,
        output=last.outputs[0].name,
        weight=weight.initializer.name,
        layout="NK" if outputs_first else "KN",
        k=k,
        n=n,
        bias=bias,
        is_cast=weight.is_cast,
        shared_with=tuple(user.name for user in _weight_users(weight.initializer) if user is not node),
    )


def _resolve(tensor: Tensor) -> _Weight | Node:
    is_transposed = is_cast = False
    while not is_constant(tensor):
        node = tensor.inputs[0]
        if node.op == "Transpose" and list(node.attrs.get("perm", (1, 0))) == [1, 0]:
            is_transposed = not is_transposed
        elif node.op == "Cast":
            is_cast = True
        elif node.op != "Identity":
            return node
        tensor = node.inputs[0]
    return _Weight(tensor, is_transposed, is_cast)


def _weight_users(initializer: Tensor) -> list[Node]:
    users: dict[int, Node] = {}
    pending = list(initializer.outputs)
    while pending:
        node = pending.pop()
        if node.op in ("Transpose", "Cast", "Identity"):
            pending.extend(node.outputs[0].outputs)
        else:
            users[id(node)] = node
    return list(users.values())


def _unusual_gemm(node: Node, n: int, index: Index) -> str | None:
    for attribute, usual in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
        if (value := node.attrs.get(attribute, usual)) != usual:
            return f"{attribute} is {value}, expected {usual:g}"
    if _has_addend(node) and _as_bias(node.inputs[2], node, n, index) is None:
        return f"its addend {node.inputs[2].name} is not a constant vector [{n}]"
    return None


def _has_addend(node: Node) -> bool:
    return len(node.inputs) > 2 and not node.inputs[2].is_empty()


def _gemm_bias(node: Node, n: int, index: Index) -> Bias | None:
    return _as_bias(node.inputs[2], node, n, index) if _has_addend(node) else None


def _added_bias(node: Node, n: int, index: Index) -> Bias | None:
    product = node.outputs[0]
    users = index.users(product.name)
    if len(users) != 1 or users[0].op != "Add" or not index.owns(users[0]) or product.name in index.outputs:
        return None
    addends = [tensor for tensor in users[0].inputs if tensor is not product]
    return _as_bias(addends[0], users[0], n, index) if len(addends) == 1 else None


def _as_bias(tensor: Tensor, node: Node, n: int, index: Index) -> Bias | None:
    if tensor.name not in index.constants:
        return None
    source = _resolve(tensor)
    if not isinstance(source, _Weight) or source.is_transposed:
        return None
    shape = shape_of(source.initializer) or ()
    if not shape or shape[-1] != n or any(dim != 1 for dim in shape[:-1]):
        return None
    return Bias(tensor.name, source.initializer.name, node.name)


def module_path(node: Node) -> str | None:
    """``model.layers.0.q_proj/MatMul`` and ``/model/layers.0/q_proj/MatMul`` give ``model.layers.0.q_proj``."""
    *module, last = [part for part in node.name.split("/") if part]
    return ".".join(module) if module and last.split("_")[0] == node.op else None


def unique(name: str, taken: Container[str]) -> str:
    """The name, with a number behind it if it is taken."""
    candidate, suffix = name, 1
    while candidate in taken:
        suffix += 1
        candidate = f"{name}_{suffix}"
    return candidate


def _linear_name(node: Node, weight: str) -> str:
    fallback = weight.removesuffix(".weight") if weight.endswith(".weight") else node.name
    return module_path(node) or fallback


_SHAPE_OPS = frozenset(
    ("Reshape", "Transpose", "Cast", "Identity", "Squeeze", "Unsqueeze", "Slice", "Gather", "Flatten", "Neg")
)


def _reaches_output(value: str, index: Index) -> bool:
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        if current in index.outputs:
            return True
        for node in index.users(current):
            if index.owns(node) and _keeps_logits(node, current, index):
                fresh = [tensor.name for tensor in node.outputs if tensor.name not in seen]
                seen.update(fresh)
                pending.extend(fresh)
    return False


def _keeps_logits(node: Node, value: str, index: Index) -> bool:
    if node.op in _SHAPE_OPS:
        return node.inputs[0].name == value
    if node.op in ("Add", "Sub", "Mul", "Div"):
        return all(tensor.name == value or tensor.name in index.constants for tensor in node.inputs)
    return node.op == "Tanh" and _is_scaled(node.inputs[0], index)


def _is_scaled(tensor: Tensor, index: Index) -> bool:
    """Whether a Tanh reads x / cap (a soft cap), not a bare activation (a pooler)."""
    node = index.producer(tensor.name)
    if node is None or node.op not in ("Mul", "Div"):
        return False
    arrays = [index.array(operand.name) for operand in node.inputs]
    return any(array is not None and np.size(array) == 1 for array in arrays)
