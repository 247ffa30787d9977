"""Decide for every node of a float32 graph whether it computes in float32 or in 16 bits: the policy, looking around."""

from dataclasses import dataclass, field

import numpy as np

from ._gs import Graph, Node, Tensor, is_constant, shape_of
from .precision_policy import AGNOSTIC, NORMS, Role, fits, is_float, is_inline, origin, role_of


@dataclass(slots=True)
class _Facts:
    """What is known of the values computed so far, by name."""

    data: set[str] = field(default_factory=set[str])
    """They depend on the model's data, not on positions and constants alone."""
    wide: set[str] = field(default_factory=set[str])
    """Computed in float32."""
    dequantized: set[str] = field(default_factory=set[str])
    """Outputs of DequantizeLinear, moved or not."""
    accumulated: set[str] = field(default_factory=set[str])
    """Results of an INT8 GEMM, rescaled or not."""
    row_scale: set[str] = field(default_factory=set[str])
    """max|row| of a per-token quantizer, or made of it and constants."""


@dataclass(slots=True)
class Planner:
    """Decides which nodes of a graph compute in float32; the others do in ``dtype``.

    An elementwise node computes in float32 if one of its activations is a float32 node's, so what follows a norm
    stays there until a linear reads it. Rescaled INT8 sums and graph inputs do not widen their readers.
    """

    graph: Graph
    dtype: np.dtype[np.generic]
    _facts: _Facts = field(default_factory=_Facts)
    _wide: set[int] = field(default_factory=set[int])
    _undecided: set[int] = field(default_factory=set[int])

    def plan(self) -> frozenset[int]:
        """Ids of the float32 nodes: decided forward from the inputs, then backward from what reads each value."""
        angles = angle_nodes(self.graph)
        self._facts.data.update(tensor.name for tensor in self.graph.inputs if is_float(tensor))
        for node in self.graph.nodes:
            wide = self._decide(node, id(node) in angles)
            self._record(node, wide, id(node) in angles)
        self._ask_consumers()
        return frozenset(self._wide)

    def _decide(self, node: Node, angle: bool) -> bool:
        if angle:
            return True
        role, facts = role_of(node), self._facts
        if node.op == "DequantizeLinear":
            return is_inline(node.inputs[1]) and not fits(node.inputs[1], self.dtype)
        if _is_lookup(node, facts):
            return False
        activations = [tensor for tensor in node.inputs if is_float(tensor) and tensor.name in facts.data]
        if role is Role.MOVE and not activations and self._constants_fit(node):
            self._undecided.add(id(node))
            return False
        if role is Role.WIDE or not activations:
            return True
        if role is Role.NARROW:
            return False
        widening = any(tensor.name in facts.wide and tensor.name not in facts.accumulated for tensor in activations)
        return widening or _is_square(node) or self._is_rescale(node) or not self._constants_fit(node)

    def _record(self, node: Node, wide: bool, angle: bool) -> None:
        facts, outputs = self._facts, [tensor.name for tensor in node.outputs]
        inputs = [tensor.name for tensor in node.inputs]
        if wide:
            self._wide.add(id(node))
            facts.wide.update(outputs)
        if angle or node.op in ("Shape", "Size"):
            return
        if _is_lookup(node, facts) or not facts.data.isdisjoint(inputs):
            facts.data.update(outputs)
        moves = role_of(node) is Role.MOVE
        if node.op == "DequantizeLinear" or (moves and inputs[0] in facts.dequantized):
            facts.dequantized.update(outputs)
        if self._is_integer_gemm(node) or self._is_rescale(node):
            facts.accumulated.update(outputs)
        if node.op == "ReduceMax" or self._is_row_scale(node):
            facts.row_scale.update(outputs)

    def _ask_consumers(self) -> None:
        """Let nodes that only float32 readers read compute in float32, and constants be moved in the readers' type.

        A sum of two activations is left alone: it is a residual stream, whose readers begin with a norm. So are
        activations that are only moved: half the bytes are moved before the Cast.
        """
        outputs = {tensor.name for tensor in self.graph.outputs}
        for node in reversed(self.graph.nodes):
            undecided = id(node) in self._undecided
            if not undecided and not self._may_widen(node):
                continue
            readers = [reader for tensor in node.outputs for reader in tensor.outputs if reader.op not in AGNOSTIC]
            is_output = any(tensor.name in outputs for tensor in node.outputs)
            wanted = [id(reader) in self._wide for reader in readers] + [True] * is_output
            if any(wanted) if undecided else wanted and all(wanted):
                self._wide.add(id(node))

    def _may_widen(self, node: Node) -> bool:
        if role_of(node) is not Role.ELEMENTWISE and node.op != "Where":
            return False
        activations = [tensor for tensor in node.inputs if is_float(tensor) and tensor.name in self._facts.data]
        return node.op not in ("Add", "Sub", "Sum") or len(activations) < 2

    def _is_integer_gemm(self, node: Node) -> bool:
        """A linear of two dequantized tensors: builders write its int32 sums as they are."""
        return node.op in ("MatMul", "Gemm", "Conv") and all(
            tensor.name in self._facts.dequantized for tensor in node.inputs[:2]
        )

    def _is_rescale(self, node: Node) -> bool:
        """A product of INT8 sums with scales, or a sum of such products: over groups, and of two linears."""
        facts = self._facts
        if not any(tensor.name in facts.accumulated for tensor in node.inputs):
            return False
        if node.op == "ReduceSum":
            return True
        if node.op == "Add":
            return all(tensor.name in facts.accumulated for tensor in node.inputs)
        others = [tensor for tensor in node.inputs if tensor.name not in facts.accumulated]
        return node.op == "Mul" and all(tensor.name in facts.row_scale or _is_stored(tensor) for tensor in others)

    def _is_row_scale(self, node: Node) -> bool:
        names = [tensor.name for tensor in node.inputs if is_float(tensor) and tensor.name in self._facts.data]
        single = all((shape_of(tensor) or (None,))[-1] == 1 for tensor in node.outputs)
        simple = role_of(node) in (Role.ELEMENTWISE, Role.MOVE) or node.op == "Reciprocal"
        return simple and single and bool(names) and all(name in self._facts.row_scale for name in names)

    def _constants_fit(self, node: Node) -> bool:
        return all(fits(tensor, self.dtype) for tensor in node.inputs if is_float(tensor) and is_inline(tensor))


def angle_nodes(graph: Graph) -> frozenset[int]:
    """Ids of the nodes that compute rotary angles: each Cos and Sin of positions, and all float nodes before it.

    A sine that is an activation function has a linear or a norm before it; those are not angles.
    """
    found: set[int] = set()
    for node in graph.nodes:
        if node.op in ("Cos", "Sin"):
            before = _float_ancestors(node)
            if before is not None:
                found.update(before)
    return frozenset(found)


def _float_ancestors(node: Node) -> set[int] | None:
    seen, pending = {id(node)}, [node]
    while pending:
        for tensor in pending.pop().inputs:
            if not is_float(tensor) or is_constant(tensor):
                continue
            if not tensor.inputs:
                return None
            producer = tensor.inputs[0]
            if producer.op in NORMS or producer.op == "Attention" or _has_weight(producer):
                return None
            if id(producer) not in seen:
                seen.add(id(producer))
                pending.append(producer)
    return seen


def _has_weight(node: Node) -> bool:
    if role_of(node) is not Role.NARROW:
        return False
    return any(
        sum(dim != 1 for dim in shape_of(origin(tensor)) or ()) > 1 for tensor in node.inputs if _is_stored(tensor)
    )


def _is_stored(tensor: Tensor) -> bool:
    return not tensor.is_empty() and is_constant(origin(tensor))


def _is_lookup(node: Node, facts: _Facts) -> bool:
    """An embedding: rows of a stored table, picked at run time."""
    if node.op != "Gather" or not is_float(node.inputs[0]) or is_constant(node.inputs[1]):
        return False
    return node.inputs[0].name not in facts.data and _is_stored(node.inputs[0])


def _is_square(node: Node) -> bool:
    return node.op == "Mul" and node.inputs[0] is node.inputs[1]
