"""Find the residual stream of a decoder by data flow: what is written into it, and what reads it.

The stream is whatever the input of the logits' linear is added up from. From there the graph is walked both ways:
a value belongs to the stream if an operation that commutes with a rotation of the channels (a sum, a scalar factor,
RMSNorm with gamma folded away) joins it to one that does. The walk ends at embeddings and linears. No module names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..export.errors import BismoothError
from ..passes._gs import Graph, Node, is_constant, shape_of
from ..passes.graph import Index
from ..passes.linears import Linear, find_head, module_path

NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")
_SAME = ("Cast", "Identity")


@dataclass(frozen=True)
class Embedding:
    """A table [V, d] whose rows a ``Gather`` puts into the stream."""

    weight: str
    node: str


@dataclass(frozen=True)
class Norm:
    """An RMSNorm that reads the stream.

    Attributes:
        name: The module's path.
        node: The node.
        x: The value that enters.
        gamma: The constant [d] as it enters the node.
        epsilon: What is added to the mean square.
    """

    name: str
    node: str
    x: str
    gamma: str
    epsilon: float


@dataclass(frozen=True)
class Reader:
    """A linear whose input is the stream, behind a norm or as it is."""

    linear: Linear
    norm: Norm | None


@dataclass(frozen=True)
class Residual:
    """The residual stream of ``width`` channels; norms, readers and writers in topological order."""

    width: int
    embeddings: tuple[Embedding, ...]
    norms: tuple[Norm, ...]
    readers: tuple[Reader, ...]
    writers: tuple[Linear, ...]


def find_residual(graph: Graph, linears: Sequence[Linear]) -> Residual:
    """The residual stream that ends in the logits.

    Raises:
        BismoothError: There are no logits, or some operation at the stream does not commute with a rotation of its
            channels (LayerNorm, a norm whose result is added, experts ...); it is named.
    """
    heads = find_head(linears, graph)
    if not heads:
        raise BismoothError(
            "rotate: no linear makes the logits. Expected a language model whose last linear reads the residual stream."
        )
    walk = _Walk(Index.of(graph), {linear.node: linear for linear in linears})
    for head in heads:
        walk.reach(head.x, None)
    walk.run()
    return walk.result(heads[0].k)


@dataclass
class _Walk:
    """The values known to be of the stream, each with the norm it went through, if any."""

    index: Index
    by_node: Mapping[str, Linear]
    values: dict[str, Norm | None] = field(default_factory=dict[str, "Norm | None"])
    pending: list[str] = field(default_factory=list[str])
    embeddings: dict[str, Embedding] = field(default_factory=dict[str, Embedding])
    norms: dict[str, Norm] = field(default_factory=dict[str, Norm])
    readers: dict[str, Reader] = field(default_factory=dict[str, Reader])
    writers: dict[str, Linear] = field(default_factory=dict[str, Linear])

    def __post_init__(self) -> None:
        self.by_output = {linear.output: linear for linear in self.by_node.values()}

    def run(self) -> None:
        while self.pending:
            value = self.pending.pop()
            self.look_back(value)
            self.look_ahead(value)

    def reach(self, value: str, norm: Norm | None) -> None:
        if value not in self.values:
            self.values[value] = norm
            self.pending.append(value)

    def look_back(self, value: str) -> None:
        """What makes a value of the stream."""
        if value in self.by_output:
            self.writers[value] = self.by_output[value]
            return
        node = self.index.producer(value)
        if node is None:
            raise _refused(value, "it is an input of the graph", "an embedding whose table is in the weights")
        if (embedding := self.embedding(node)) is not None:
            self.embeddings[value] = embedding
            return
        if node.op in NORMS and not node.domain:
            self.values[value] = self.norm(node)
        self.pass_through(node)

    def look_ahead(self, value: str) -> None:
        """What reads a value of the stream."""
        if value in self.index.outputs:
            raise _refused(value, "it is an output of the graph", "logits as the only result")
        for node in self.index.users(value):
            linear = self.by_node.get(node.name)
            if linear is not None and linear.x == value and self.index.owns(node):
                self.readers[node.name] = Reader(linear, self.values[value])
            elif node.op not in ("Shape", "Size"):
                self.pass_through(node)

    def pass_through(self, node: Node) -> None:
        """Reach the values at the other side of an operation that commutes with a rotation."""
        if not self.index.owns(node):
            raise _refused(node.name, "it belongs to a subgraph", "a stream that no If or Loop reads")
        output = node.outputs[0].name
        if node.op in NORMS and not node.domain:
            self.reach(node.inputs[0].name, None)
            self.reach(output, self.norm(node))
            return
        operands = self.operands(node)
        norm = next((self.values[name] for name in (*operands, output) if self.values.get(name)), None)
        if norm is not None and node.op not in _SAME:
            raise _refused(
                norm.name, f"{node.op} {node.name} reads its result", "norms whose gamma folds into linears behind it"
            )
        for name in (*operands, output):
            self.reach(name, norm)

    def operands(self, node: Node) -> list[str]:
        """The inputs of a node that are of the stream if its output is."""
        names = [tensor.name for tensor in node.inputs]
        variable = [name for name in names if name not in self.index.constants]
        if not node.domain:
            if node.op in _SAME or (node.op == "Add" and len(variable) == 2):
                return variable
            if node.op in ("Mul", "Div") and variable == names[:1] and self.is_scalar(names[1]):
                return variable
            if node.op == "Mul" and variable == names[1:] and self.is_scalar(names[0]):
                return variable
        known = "RMSNorm, sums, scalar factors and linear layers"
        if node.op == "LayerNormalization":
            raise _refused(node.name, "LayerNormalization subtracts the mean over the channels", known)
        raise _refused(node.name, f"{node.op} does not commute with a rotation of the channels", known)

    def is_scalar(self, value: str) -> bool:
        array = self.index.array(value)
        return array is not None and array.size == 1

    def embedding(self, node: Node) -> Embedding | None:
        if node.op != "Gather" or node.domain or int(node.attrs.get("axis", 0)) != 0:
            return None
        table = node.inputs[0]
        while table.inputs and table.inputs[0].op in _SAME:
            table = table.inputs[0].inputs[0]
        if not is_constant(table) or len(shape_of(table) or ()) != 2:
            return None
        return Embedding(table.name, node.name)

    def norm(self, node: Node) -> Norm:
        if node.name not in self.norms:
            rank = len(self.index.shape(node.outputs[0].name) or ())
            axis = int(node.attrs.get("axis", -1))
            if axis not in (-1, rank - 1):
                raise _refused(node.name, f"it normalizes from axis {axis} on", "the last one")
            x, gamma = (tensor.name for tensor in node.inputs[:2])
            if self.index.array(gamma) is None:
                raise _refused(node.name, f"its gamma {gamma} is computed", "a constant vector")
            epsilon = float(node.attrs.get("epsilon", 1e-5))
            self.norms[node.name] = Norm(module_path(node) or node.name, node.name, x, gamma, epsilon)
        return self.norms[node.name]

    def check_sharing(self) -> None:
        """Refuse weights that would have to be two things at once, but for an embedding's with a reader."""
        tables = {embedding.node for embedding in self.embeddings.values()}
        linears = [(reader.linear, tables) for reader in self.readers.values()]
        linears += [(linear, set[str]()) for linear in self.writers.values()]
        for linear, allowed in linears:
            if others := [node for node in linear.shared_with if node not in allowed]:
                expected = "weights of their own, but for a head that shares its weight with an embedding"
                raise _refused(linear.name, f"its weight {linear.weight} is shared with {others[0]}", expected)

    def result(self, width: int) -> Residual:
        self.check_sharing()
        order = self.index.order
        return Residual(
            width,
            tuple({item.weight: item for item in self.embeddings.values()}.values()),
            tuple(sorted(self.norms.values(), key=lambda item: order[item.node])),
            tuple(sorted(self.readers.values(), key=lambda item: order[item.linear.node])),
            tuple(sorted(self.writers.values(), key=lambda item: order[item.node])),
        )


def _refused(where: str, reason: str, expected: str) -> BismoothError:
    return BismoothError(
        f"{where}: the residual stream cannot be rotated here: {reason}. Expected {expected}. "
        "Make a stand-in of kind 'scale', or choose a model such as Llama, Mistral, Qwen2 or Qwen3."
    )
