"""Find the fold sites of a graph: where a factor per channel costs nothing at run time.

A site is a producer whose channels can be divided by s for free (the gamma of a norm, the rows of a linear) and the
linears whose input columns take the factor back. Which channels arrive where is found by data flow (``flow``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..passes._gs import Graph, Node
from ..passes.flow import Absorption, Flow, Pinned, channels_in, trace_with
from ..passes.flow_labels import NONE, ConstantUse, Mask
from ..passes.graph import Index
from ..passes.linears import Linear, module_path, unique
from ..passes.spec import SiteKind


@dataclass(frozen=True)
class Producer:
    """What is divided by s.

    Attributes:
        node: The norm, or the product of the linear.
        output: The value whose last axis holds the channels.
        linear: Name of the linear whose rows are divided; None for a norm.
        weight: That linear's weight initializer.
    """

    node: str
    output: str
    linear: str | None = None
    weight: str | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """A producer, the linears that read its channels, and the channels that may be scaled.

    Attributes:
        name: Unique: the module of the producer.
        kind: How the channels get to the consumers.
        producer: What is divided by s.
        constants: The small constants to divide with it: gamma and beta, or the biases on the way.
        consumers: Per linear, which channel arrives at which input column; pinned channels count as ``NONE``.
        free: bool [C]; the factor of the other channels must be 1.
        pinned: Why channels are not free.
        nodes: The nodes between the producer and the consumers, the consumers included: all that scaled values reach.
        scaled: The values with scaled elements.
    """

    name: str
    kind: SiteKind
    producer: Producer
    constants: tuple[ConstantUse, ...]
    consumers: tuple[Absorption, ...]
    free: Mask
    pinned: tuple[Pinned, ...]
    nodes: frozenset[str]
    scaled: frozenset[str]

    @property
    def size(self) -> int:
        """C, the number of channels of the producer."""
        return self.free.size


@dataclass(frozen=True)
class Rejected:
    """A producer that is no site: the reason that concerns most of its channels, and the node that gives it."""

    producer: str
    reason: str
    node: str


@dataclass(frozen=True, eq=False)
class _Candidate:
    name: str
    producer: Producer
    size: int
    constants: tuple[ConstantUse, ...]
    objection: str | None
    is_scale: bool = False


def find_sites(graph: Graph, linears: Sequence[Linear]) -> tuple[list[Site], list[Rejected]]:
    """The fold sites in topological order, and the norms and linears that are none.

    No two sites scale the same input column of a linear: the first one has it.
    """
    index = Index.of(graph)
    by_node = {linear.node: linear for linear in linears}
    claims = {linear.name: _Claim(np.zeros(linear.k, np.bool_), linear.node) for linear in linears}
    sites: list[Site] = []
    rejected: list[Rejected] = []
    names: set[str] = set()
    for candidate in _candidates(graph, by_node, index):
        found = _judge(candidate, by_node, claims, index)
        if isinstance(found, Rejected):
            rejected.append(found)
        elif found is not None:
            site = replace(found, name=unique(found.name, names))
            names.add(site.name)
            sites.append(site)
    return sites, rejected


@dataclass
class _Claim:
    """The input columns of a linear that a site already scales."""

    columns: Mask
    node: str
    site: str = ""


def _judge(
    candidate: _Candidate, by_node: Mapping[str, Linear], claims: Mapping[str, _Claim], index: Index
) -> Site | Rejected | None:
    if candidate.objection and not candidate.is_scale:
        return Rejected(candidate.name, candidate.objection, candidate.producer.node)
    flow = _without_claimed(trace_with(candidate.producer.output, candidate.size, by_node, index), claims)
    if not flow.free.any():
        return _rejection(candidate, flow, by_node)
    if candidate.objection:
        return Rejected(candidate.name, candidate.objection, candidate.producer.node)
    for consumer in flow.consumers:
        claim = claims[consumer.linear]
        claim.columns |= consumer.labels != NONE
        claim.site = candidate.name
    return Site(
        name=candidate.name,
        kind=_kind(candidate, flow),
        producer=candidate.producer,
        constants=(*candidate.constants, *flow.biases),
        consumers=flow.consumers,
        free=flow.free,
        pinned=flow.pinned,
        nodes=flow.nodes,
        scaled=flow.scaled,
    )


def _without_claimed(flow: Flow, claims: Mapping[str, _Claim]) -> Flow:
    """The flow without the channels that arrive at a column which another site scales."""
    free, pinned = flow.free.copy(), list(flow.pinned)
    for consumer in flow.consumers:
        claim = claims[consumer.linear]
        channels = channels_in(consumer.labels[claim.columns], flow.size)
        if channels.size:
            free[channels] = False
            reason = f"the inputs of {consumer.linear} are already smoothed by {claim.site}"
            pinned.append(Pinned(channels, reason, claim.node))
    consumers = tuple(
        replace(consumer, labels=np.where(free[consumer.labels] & (consumer.labels != NONE), consumer.labels, NONE))
        for consumer in flow.consumers
    )
    kept = tuple(consumer for consumer in consumers if (consumer.labels != NONE).any())
    return replace(flow, free=free, pinned=tuple(pinned), consumers=kept)


def _rejection(candidate: _Candidate, flow: Flow, by_node: Mapping[str, Linear]) -> Rejected | None:
    if candidate.is_scale and not any(pinned.node in by_node for pinned in flow.pinned):
        return None  # a multiplication by some constant vector that has nothing to do with a linear
    if not flow.pinned:
        return Rejected(candidate.name, "no linear reads its channels", candidate.producer.node)
    most = max(flow.pinned, key=lambda pinned: pinned.channels.size)
    return Rejected(candidate.name, most.reason, most.node)


def _kind(candidate: _Candidate, flow: Flow) -> SiteKind:
    if candidate.producer.linear is None:
        return SiteKind.NORM
    crossed = frozenset[str]().union(*(consumer.crossed for consumer in flow.consumers))
    if "attention" in crossed:
        return SiteKind.ATTENTION_VALUE
    return SiteKind.GATED_PRODUCT if "product" in crossed else SiteKind.ELEMENTWISE


def _candidates(graph: Graph, by_node: Mapping[str, Linear], index: Index) -> Iterator[_Candidate]:
    for node in graph.nodes:
        if node.domain:
            continue
        if node.name in by_node:
            yield _linear_candidate(node, by_node[node.name], index)
        elif node.op in ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization"):
            yield _norm_candidate(node, index)
        elif node.op == "Mul" and (candidate := _scale_candidate(node, index)):
            yield candidate


def _linear_candidate(node: Node, linear: Linear, index: Index) -> _Candidate:
    producer = Producer(node.name, node.outputs[0].name, linear.name, linear.weight)
    constants: tuple[ConstantUse, ...] = ()
    objection = f"its weight {linear.weight} is shared with {linear.shared_with[0]}" if linear.shared_with else None
    if linear.bias is not None and linear.bias.node == node.name:  # Gemm: flow sees the sum, not the addend
        use, problem = _constant(linear.bias.value, node, linear.n, index)
        constants = (use,) if use else ()
        objection = objection or problem
    return _Candidate(linear.name, producer, linear.n, constants, objection)


def _norm_candidate(node: Node, index: Index) -> _Candidate:
    producer = Producer(node.name, node.outputs[0].name)
    name = module_path(node) or node.name
    dims = index.shape(node.inputs[1].name) or ()
    size = dims[-1] if dims and isinstance(dims[-1], int) else 0
    uses: list[ConstantUse] = []
    objection = _odd_axis(node, index)
    for tensor in node.inputs[1:]:
        if not tensor.is_empty():
            use, problem = _constant(tensor.name, node, size, index)
            uses += [use] if use else []
            if use is None:
                objection = objection or problem or f"{tensor.name} is not a constant vector over the channels"
    return _Candidate(name, producer, size, tuple(uses), objection)


def _odd_axis(node: Node, index: Index) -> str | None:
    axis = int(node.attrs.get("axis", -1))
    rank = len(index.shape(node.outputs[0].name) or ())
    return None if axis in (-1, rank - 1) else f"it normalizes from axis {axis} on, expected the last one"


def _scale_candidate(node: Node, index: Index) -> _Candidate | None:
    """The gamma of a decomposed norm: an activation times a constant vector over the last axis."""
    constants = [tensor.name for tensor in node.inputs if tensor.name in index.constants]
    dims = index.shape(node.outputs[0].name)
    if len(constants) != 1 or not dims or not isinstance(dims[-1], int) or dims[-1] < 2:
        return None
    use, problem = _constant(constants[0], node, dims[-1], index)
    if use is None and problem is None:
        return None
    producer = Producer(node.name, node.outputs[0].name)
    name = module_path(node) or node.name
    return _Candidate(name, producer, dims[-1], (use,) if use else (), problem, is_scale=True)


def _constant(value: str, node: Node, size: int, index: Index) -> tuple[ConstantUse | None, str | None]:
    """A constant vector to divide, or the objection to it; neither if it is not a vector of that size."""
    shape = index.shape(value) or ()
    if not shape or shape[-1] != size or any(dim != 1 for dim in shape[:-1]):
        return None, None
    if index.array(value) is None:
        return None, f"{value} is not a constant that can be computed here"
    if len(index.users(value)) > 1 or value in index.outputs:
        return None, f"{value} is also used elsewhere"
    return ConstantUse(value, node.name, np.arange(size, dtype=np.int32).reshape(_sizes(shape))), None


def _sizes(shape: tuple[int | str | None, ...]) -> tuple[int, ...]:
    return tuple(dim for dim in shape if isinstance(dim, int))
