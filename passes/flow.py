"""Follow the channels of one producer through the graph to the linears that read them.

Label propagation by abstract execution: the producer's output channels are numbered, and the numbers are pushed
through the operations (``flow_ops``) until each one arrives at an input channel of a linear layer, which can absorb
its factor, or at an operation that does not commute with a scale, which pins the factor to 1. No module names and
no architectures: only what the operations do.
"""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..passes._gs import Node
from ..passes.flow_labels import NONE, ConstantUse, Labels, Mask, OpaqueError, Visit, label_shape
from ..passes.flow_ops import rule_of
from ..passes.graph import Index
from ..passes.linears import Linear


@dataclass(frozen=True, eq=False)
class Absorption:
    """A linear whose input channels come (partly) from the producer.

    Attributes:
        linear: The linear's name.
        weight: Its weight initializer.
        labels: int32 [K]; per input channel the producer's channel, or ``NONE``.
        crossed: What the labels went through: ``product``, ``attention``.
    """

    linear: str
    weight: str
    labels: Labels
    crossed: frozenset[str]


@dataclass(frozen=True, eq=False)
class Pinned:
    """Channels of the producer whose factor must be 1, why, and the node that says so."""

    channels: Labels
    reason: str
    node: str


@dataclass(frozen=True, eq=False)
class Flow:
    """Where the channels of one producer go.

    Attributes:
        size: Number of channels C.
        consumers: The linears that absorb, in topological order.
        biases: Constants added on the way, to be divided like the producer.
        pinned: Channels that cannot be scaled, with reasons.
        free: bool [C]; the channels that can be scaled: not pinned, and some linear reads them.
        nodes: The nodes that scaled values reach, the linears included.
        scaled: The values with an element that is scaled, ``start`` included.
    """

    size: int
    consumers: tuple[Absorption, ...]
    biases: tuple[ConstantUse, ...]
    pinned: tuple[Pinned, ...]
    free: Mask
    nodes: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()


class _State(NamedTuple):
    labels: Labels
    crossed: frozenset[str]


class _Pin(NamedTuple):
    labels: Labels
    reason: str
    node: str


@dataclass
class _Walk:
    """One pass over the producer's descendants, with the channels known so far to be pinned."""

    index: Index
    linears: Mapping[str, Linear]
    is_pinned: Mask
    values: dict[str, _State] = field(default_factory=dict[str, _State])
    queue: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    queued: set[str] = field(default_factory=set[str])
    pins: list[_Pin] = field(default_factory=list[_Pin])
    contests: list[_Pin] = field(default_factory=list[_Pin])
    consumers: list[Absorption] = field(default_factory=list[Absorption])
    biases: list[ConstantUse] = field(default_factory=list[ConstantUse])

    def run(self, start: str, labels: Labels) -> None:
        self.emit(start, _State(labels, frozenset()))
        while self.queue:
            _, name = heapq.heappop(self.queue)
            self.visit(self.index.nodes[name])

    def emit(self, value: str, state: _State) -> None:
        """Record the labels of a value and queue the nodes that read it."""
        labels = np.where(self.pinned_mask(state.labels), NONE, state.labels).astype(np.int32)
        if not (labels != NONE).any():
            return
        self.values[value] = _State(labels, state.crossed)
        if value in self.index.outputs and value not in self.index.caches:
            self.pin(labels, "the channel is an output of the graph", value)
        for node in self.index.users(value):
            if not self.index.owns(node):
                self.pin(labels, f"the channel enters a subgraph at {node.op}", node.name)
            elif node.name not in self.queued:
                self.queued.add(node.name)
                heapq.heappush(self.queue, (self.index.order[node.name], node.name))

    def pinned_mask(self, labels: Labels) -> Mask:
        return (labels != NONE) & self.is_pinned[labels]

    def pin(self, labels: Labels, reason: str, node: str) -> None:
        self.pins.append(_Pin(labels, reason, node))

    def visit(self, node: Node) -> None:
        states = [self.values.get(tensor.name) for tensor in node.inputs]
        linear = self.linears.get(node.name)
        if linear is not None and states[0] is not None:
            self.absorb(linear, states[0])
            return
        visit = Visit(node, self.index, [state.labels if state else None for state in states])
        crossed = frozenset[str]().union(*(state.crossed for state in states if state))
        try:
            outputs = _transfer(visit)
        except OpaqueError as error:
            for labels in visit.labels:
                if labels is not None:
                    self.pin(labels, str(error), node.name)
            return
        self.pins.extend(_Pin(labels, reason, node.name) for labels, reason in visit.pinned)
        self.contests.extend(_Pin(labels, reason, node.name) for labels, reason in visit.contested)
        self.biases.extend(visit.biases)
        if visit.crossed:
            crossed |= {visit.crossed}
        for tensor, labels in zip(node.outputs, outputs, strict=False):
            if labels is not None and not tensor.is_empty():
                self.emit(tensor.name, _State(labels, crossed))

    def absorb(self, linear: Linear, state: _State) -> None:
        if others := [name for name in linear.shared_with if not _looks_up(name, self.index)]:
            reason = f"the weight {linear.weight} of {linear.name} is shared with another node ({others[0]})"
            self.pin(state.labels, reason, linear.node)
            return
        rows = state.labels.reshape(-1, linear.k)
        varies = (rows != rows[0]).any(axis=0)
        if varies.any():
            self.pin(rows[:, varies], "positions of one channel come from different channels", linear.node)
        self.consumers.append(Absorption(linear.name, linear.weight, rows[0].copy(), state.crossed))


def trace(start: str, size: int, linears: Iterable[Linear], index: Index) -> Flow:
    """Follow ``size`` channels, the last axis of the value ``start``, to the linears that read them.

    The result is complete: every use of a channel that is ``free`` is an absorption or a bias of the result.
    """
    return trace_with(start, size, {linear.node: linear for linear in linears}, index)


def trace_with(start: str, size: int, linears: Mapping[str, Linear], index: Index) -> Flow:
    """``trace`` with the linears by the name of their node."""
    dims = index.shape(start)
    if dims is None or not dims or dims[-1] != size:
        known = "no shape" if dims is None else f"shape {list(dims)}"
        everything = Pinned(np.arange(size, dtype=np.int32), f"{start} has {known}, expected [..., {size}]", start)
        return Flow(size, (), (), (everything,), np.zeros(size, np.bool_))
    labels = np.broadcast_to(np.arange(size, dtype=np.int32), label_shape(dims))
    is_pinned = np.zeros(size, np.bool_)
    pinned: list[Pinned] = []
    while True:
        walk = _Walk(index, linears, is_pinned.copy())
        walk.run(start, labels)
        # A contest is decided only when nothing else can pin one of its two sides any more.
        if not (_record(walk.pins, is_pinned, pinned) or _record(walk.contests, is_pinned, pinned)):
            return _result(size, walk, pinned)


def _record(pins: Iterable[_Pin], is_pinned: Mask, pinned: list[Pinned]) -> bool:
    """Add the newly pinned channels; whether there were any."""
    before = len(pinned)
    for pin in pins:
        channels = channels_in(pin.labels, is_pinned.size)
        channels = channels[~is_pinned[channels]]
        if channels.size:
            is_pinned[channels] = True
            pinned.append(Pinned(channels, pin.reason, pin.node))
    return len(pinned) > before


def channels_in(labels: Labels, size: int) -> Labels:
    """The distinct channels among labels, in ascending order (``np.unique`` takes ten times as long)."""
    occurs = np.zeros(size, np.bool_)
    occurs[labels[labels != NONE]] = True
    return occurs.nonzero()[0].astype(np.int32)


def _result(size: int, walk: _Walk, pinned: list[Pinned]) -> Flow:
    free = np.zeros(size, np.bool_)
    for consumer in walk.consumers:
        free[consumer.labels[consumer.labels != NONE]] = True
    biases = tuple(bias for bias in walk.biases if (bias.labels != NONE).any())
    nodes, scaled = frozenset(walk.queued), frozenset(walk.values)
    return Flow(size, tuple(walk.consumers), biases, tuple(pinned), free, nodes, scaled)


def _transfer(visit: Visit) -> list[Labels | None]:
    """Apply the node's rule and check the shapes it gives against the recorded ones."""
    rule = rule_of(visit.node)
    if rule is None:
        raise OpaqueError(f"{visit.node.op} does not commute with a scale per channel")
    try:
        outputs = rule(visit)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise OpaqueError(f"{visit.node.op} cannot be followed: {error}") from error
    for place, labels in enumerate(outputs):
        if labels is not None and not visit.node.outputs[place].is_empty():
            expected = label_shape(visit.out_dims(place))
            if labels.shape != expected:
                raise OpaqueError(f"{visit.node.op} gives {labels.shape}, recorded is {expected}")
    return outputs


def _looks_up(name: str, index: Index) -> bool:
    """Whether a node is an embedding: it keeps the weight as it was when a linear gets a weight of its own."""
    node = index.nodes.get(name)
    return node is not None and node.op == "Gather"
