"""Fold a factor per channel into the constants around a site: X' = X / s, W' = W · diag(s), the function unchanged.

(SmoothQuant, arXiv 2211.10438, equation 3; the factor may be below 1, see arXiv 2408.15301.)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..passes._gs import Array, Graph, Node, Tensor, dtype_of, make_constant, make_node, make_variable
from ..passes.flow_labels import NONE, Labels
from ..passes.graph import Index, new_constant
from ..passes.linears import WEIGHT_OPERAND, Layout, Linear, find_linears
from ..passes.sites import Site

FOLDED = "/folded"
"""What the name of a constant ends in that factors were folded into."""

Factor = NDArray[np.float64]
Factors = Mapping[str, Factor]
"""Per site name the divisor s of its channels: float64 [C], positive, 1 where the site is not free."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What a constant is multiplied with; None stands for ones.

    Attributes:
        rows: float64 [N], for a linear's weight: per output channel.
        columns: float64 [K], for a linear's weight: per input channel.
        values: float64 of the constant's shape, for a gamma, beta or bias.
    """

    rows: Factor | None = None
    columns: Factor | None = None
    values: Factor | None = None

    def of_rows(self, rows: slice) -> "Edit":
        """The edit of some rows of W [N, K]."""
        return Edit(None if self.rows is None else self.rows[rows], self.columns)

    def __mul__(self, other: "Edit") -> "Edit":
        """Both edits, one after the other."""
        return Edit(
            _product(self.rows, other.rows),
            _product(self.columns, other.columns),
            _product(self.values, other.values),
        )


def weight_edits(sites: Iterable[Site], factors: Factors) -> dict[str, Edit]:
    """The edits that fold the factors of these sites, by the name of the constant.

    Weights go by the name of their initializer; gammas, betas and biases by the name of the value that enters the
    node, which is the initializer or, as for Gemma's ``1 + w``, a constant expression. A site without a factor is
    left alone.

    Raises:
        ValueError: A factor of the wrong size, not finite and positive, or not 1 on a channel that is not free.
    """
    edits: dict[str, Edit] = {}
    for site in sites:
        if site.name not in factors:
            continue
        s = _checked(factors[site.name], site)
        for use in site.constants:
            _merge(edits, use.value, Edit(values=1.0 / _spread(s, use.labels)))
        if site.producer.weight is not None:
            _merge(edits, site.producer.weight, Edit(rows=1.0 / s))
        for consumer in site.consumers:
            _merge(edits, consumer.weight, Edit(columns=_spread(s, consumer.labels)))
    return edits


def apply_edit(array: Array, edit: Edit, layout: Layout | None = None) -> NDArray[np.float32]:
    """The edited constant in float32.

    Args:
        array: The constant, of any float type.
        edit: What to multiply it with.
        layout: The axes of a weight, 'NK' or 'KN'; None for a constant that is edited element by element. The
            products of a weight are rounded as those of the graph that ``fold_graph`` makes, so both are equal bit by
            bit.
    """
    if layout is None:
        values = np.ones(()) if edit.values is None else edit.values
        return (array.astype(np.float64) * values).astype(np.float32)
    edited = array.astype(np.float32)
    for factor, axis in ((edit.rows, 0 if layout == "NK" else 1), (edit.columns, 1 if layout == "NK" else 0)):
        if factor is not None:
            edited *= factor.astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
    return edited


def fold_graph(graph: Graph, edits: Mapping[str, Edit]) -> None:
    """Rewrite the graph in place: new small constants, and ``Mul`` nodes on the weights of linears.

    No weight is read: a weight is multiplied when the graph runs. This is the graph for verification and
    calibration; ``fold_constants`` alone is for a graph whose weights are stored anew.

    Raises:
        ValueError: An edit names a constant that the graph does not have.
    """
    linears = [linear for linear in find_linears(graph) if linear.weight in edits]
    index = Index.of(graph)
    views = {linear.node: _view_weight(index.nodes[linear.node], linear, edits[linear.weight]) for linear in linears}
    graph.nodes[:] = [new for node in graph.nodes for new in (*views.get(node.name, ()), node)]
    weights = {linear.weight for linear in linears}
    fold_constants(graph, {name: edit for name, edit in edits.items() if name not in weights})


def fold_constants(graph: Graph, edits: Mapping[str, Edit]) -> None:
    """Replace each edited gamma, beta or bias by a new constant in its own type, ``<name>/folded``."""
    index = Index.of(graph)
    for name, edit in edits.items():
        values = index.array(name) if name in index.values else None
        if values is None or edit.values is None:
            raise ValueError(f"{name} is no small constant of the graph")
        old = index.values[name]
        new = new_constant(f"{name}{FOLDED}", apply_edit(values, edit), old)
        for node in index.users(name):
            for place, tensor in enumerate(node.inputs):
                if tensor is old:
                    node.inputs[place] = new
    graph.cleanup()


def _view_weight(node: Node, linear: Linear, edit: Edit) -> list[Node]:
    """Multiply the weight operand of a linear where it enters the product; the new nodes."""
    outputs_first = node.op == "Gemm" and bool(node.attrs.get("transB", 0))
    shape = (linear.n, linear.k) if outputs_first else (linear.k, linear.n)
    nodes: list[Node] = []
    for what, factor, axis in (
        ("rows", edit.rows, int(not outputs_first)),
        ("columns", edit.columns, int(outputs_first)),
    ):
        if factor is not None:
            operand = node.inputs[WEIGHT_OPERAND]
            nodes.append(_scaled(operand, f"{linear.name}/fold_{what}", factor, axis, shape))
            node.inputs[WEIGHT_OPERAND] = nodes[-1].outputs[0]
    return nodes


def _scaled(operand: Tensor, name: str, factor: Factor, axis: int, shape: tuple[int, int]) -> Node:
    vector = factor.astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
    dtype = dtype_of(operand) or np.dtype(np.float32)
    constant = make_constant(f"{name}/factor", vector.astype(dtype))
    return make_node("Mul", name, [operand, constant], [make_variable(f"{name}/weight", dtype, shape)])


def _checked(s: NDArray[Any], site: Site) -> Factor:
    if s.shape != (site.size,):
        raise ValueError(f"{site.name}: expected {site.size} factors, got shape {s.shape}")
    if not (np.isfinite(s) & (s > 0)).all():
        raise ValueError(f"{site.name}: factors must be finite and positive")
    if (s[~site.free] != 1).any():
        raise ValueError(f"{site.name}: the factor of a channel that is not free must be 1")
    return s.astype(np.float64)


def _spread(s: Factor, labels: Labels) -> Factor:
    """Per element the factor of its channel, 1 where it has none."""
    return np.where(labels == NONE, 1.0, s[labels])


def _merge(edits: dict[str, Edit], name: str, edit: Edit) -> None:
    edits[name] = edits[name] * edit if name in edits else edit


def _product(a: Factor | None, b: Factor | None) -> Factor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b
