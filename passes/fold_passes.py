"""The passes that leave smoothing factors folded in a graph whose weights are stored anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ._gs import Graph, Node, Tensor, is_constant
from .fold import Edit, fold_constants
from .graph import Index
from .linears import WEIGHT_OPERAND, Linear
from .qdq import Store


@dataclass(frozen=True)
class FoldConstants:
    """Fold smoothing factors into gammas, betas and biases; weights follow when they are stored.

    Needs: the constants that ``edits`` names. Promises: those constants, and nothing else, are replaced.
    """

    edits: Mapping[str, Edit] = field(compare=False)

    name: ClassVar[str] = "fold"

    def apply(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        fold_constants(graph, self.edits)


@dataclass(frozen=True)
class StoreFolded:
    """Let linears that stay float, and whose weights factors were folded into, read new weights.

    Needs: the graph's float linears. Promises: only weights with an edit are replaced, by float32 in their layout.
    """

    linears: Sequence[Linear]
    edits: Mapping[str, Edit] = field(compare=False)
    store: Store = field(compare=False)

    name: ClassVar[str] = "store folded weights"

    def apply(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        index = Index.of(graph)
        for linear in self.linears:
            if linear.weight in self.edits:
                shape = (linear.n, linear.k) if linear.layout == "NK" else (linear.k, linear.n)
                new = self.store(folded_name(linear), np.dtype(np.float32), shape)
                _replace_weight(index.nodes[linear.node], new)
        graph.cleanup()


def folded_name(linear: Linear) -> str:
    """Name of the stored float weight of a linear that smoothing factors were folded into."""
    return f"{linear.name}.weight.folded"


def _replace_weight(node: Node, new: Tensor) -> None:
    """Let a linear read ``new`` in place of its weight, or of the Cast of it. Others that read the weight keep it."""
    place, weight = WEIGHT_OPERAND, node.inputs[WEIGHT_OPERAND]
    while not is_constant(weight) and weight.inputs[0].op != "Cast":
        place, node = 0, weight.inputs[0]
        weight = node.inputs[0]
    node.inputs[place] = new
