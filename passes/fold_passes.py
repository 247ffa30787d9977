"""The passes that leave smoothing factors folded in a graph whose weights are stored anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ._gs import Graph, Node, Tensor
from .fold import Edit, fold_constants
from .graph import Index
from .linears import Linear
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
                for node in index.users(linear.weight):
                    if node.op == "Cast":
                        _replace_reads(node.outputs[0], new)
                    else:
                        _replace_reads(index.values[linear.weight], new, node)
        graph.cleanup()


def folded_name(linear: Linear) -> str:
    """Name of the stored float weight of a linear that smoothing factors were folded into."""
    return f"{linear.name}.weight.folded"


def _replace_reads(old: Tensor, new: Tensor, *readers: Node) -> None:
    for node in readers or list(old.outputs):
        for place, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[place] = new
