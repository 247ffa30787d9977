"""Channel labels of one value, and what a rule sees of a node when labels pass through it.

A value's labels are an int32 array of the value's shape with every symbolic dimension set to 1: per element the
producer's channel that scales it, or ``NONE``.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..passes._gs import Dim, Node
from ..passes.graph import Index

Labels = NDArray[np.int32]
Mask = NDArray[np.bool_]

NONE = -1
"""The label of an element that no channel of the producer scales."""


class OpaqueError(Exception):
    """The operation does not commute with a scale per channel; the message says why."""


@dataclass(frozen=True, eq=False)
class ConstantUse:
    """A small constant that must be divided along with the channels: a bias, or a norm's gamma or beta.

    Attributes:
        value: Name of the constant as it enters the node (an initializer, or an expression such as ``1 + w``).
        node: The node.
        labels: int32, the constant's shape.
    """

    value: str
    node: str
    labels: Labels


@dataclass
class Visit:
    """One node seen with the labels of its inputs; rules report what must not be scaled, and what they pass through.

    Attributes:
        node: The operation.
        index: The graph.
        labels: Per input; None where no element carries a label.
        pinned: Channels whose factor must be 1, with the reason.
        contested: Channels that must be 1 unless those they meet turn out to be.
        biases: Constants to divide.
        crossed: ``product`` or ``attention``, if labels went through one.
    """

    node: Node
    index: Index
    labels: list[Labels | None]
    pinned: list[tuple[Labels, str]] = field(default_factory=list[tuple[Labels, str]])
    contested: list[tuple[Labels, str]] = field(default_factory=list[tuple[Labels, str]])
    biases: list[ConstantUse] = field(default_factory=list[ConstantUse])
    crossed: str | None = None

    def only(self, place: int = 0) -> Labels:
        """The labels of the one input that may carry any."""
        for other, labels in enumerate(self.labels):
            if labels is not None and other != place:
                raise OpaqueError(f"the channels enter {self.node.op} at input {other}")
        labels = self.labels[place]
        assert labels is not None, "a node is visited because one of its inputs carries labels"
        return labels

    def dims(self, place: int) -> tuple[Dim, ...]:
        """The recorded dimensions of an input."""
        return _known(self.index.shape(self.node.inputs[place].name), self.node.inputs[place].name)

    def out_dims(self, place: int = 0) -> tuple[Dim, ...]:
        """The recorded dimensions of an output."""
        return _known(self.index.shape(self.node.outputs[place].name), self.node.outputs[place].name)

    def full(self, place: int) -> Labels:
        """The labels of an input, ``NONE`` everywhere if it carries none."""
        labels = self.labels[place]
        return np.full(label_shape(self.dims(place)), NONE, np.int32) if labels is None else labels

    def is_constant(self, place: int) -> bool:
        """Whether an input is a constant or a constant expression."""
        return self.node.inputs[place].name in self.index.constants

    def has(self, place: int) -> bool:
        """Whether an optional input is given."""
        return place < len(self.node.inputs) and not self.node.inputs[place].is_empty()

    def integers(self, place: int) -> list[int]:
        """A constant input of sizes, axes or indices."""
        array = self.index.array(self.node.inputs[place].name)
        if array is None:
            raise OpaqueError(f"input {place} of {self.node.op} is not a constant")
        return [int(number) for number in np.atleast_1d(array)]

    def axis(self, rank: int, default: int = 0) -> int:
        """The ``axis`` attribute, counted from the front."""
        return int(self.node.attrs.get("axis", default)) % rank

    def constant_along(self, labels: Labels, axis: int) -> Labels:
        """The labels with ``axis`` reduced to size 1; channels that vary along it are pinned."""
        first = labels.take([0], axis)
        varies = labels != first
        if varies.any():
            reason = f"{self.node.op} mixes channels of axis {axis}"
            self.pinned += [(side[varies], reason) for side in (labels, np.broadcast_to(first, labels.shape))]
            first = np.where(varies.any(axis=axis, keepdims=True), NONE, first).astype(np.int32)
        return first


def label_shape(dims: tuple[Dim, ...]) -> tuple[int, ...]:
    """The shape of a value's label array: symbolic dimensions are 1."""
    return tuple(dim if isinstance(dim, int) else 1 for dim in dims)


def keeps_order(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> bool:
    """Whether a reshape moves each channel alike for every size of the symbolic dimensions.

    The dimensions between two symbolic ones may be regrouped; a symbolic dimension itself must stay where it is,
    unless nothing but symbolic dimensions and ones stands before it.
    """
    left, right = list(before), _renamed(before, after)
    while True:
        if _pop_sizes(left) != _pop_sizes(right):
            return False
        if not left and not right:
            return True
        if not left or not right or left[-1] != right[-1]:
            return all(dim == 1 or not isinstance(dim, int) for dim in (*left, *right))
        left.pop()
        right.pop()


def _renamed(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> list[Dim]:
    """The dimensions after a reshape, one that is only known from the number of elements by its name before."""
    given, found = (Counter(dim for dim in dims if not isinstance(dim, int)) for dims in (before, after))
    if given[None] > 1 or found[None] > 1:
        return [f"unknown {place}" if dim is None else dim for place, dim in enumerate(after)]
    lost, new = list((given - found).elements()), list((found - given).elements())
    if len(lost) == len(new) == 1 and np.prod(label_shape(before)) == np.prod(label_shape(after)):
        place = after.index(new[0])
        return [*after[:place], lost[0], *after[place + 1 :]]
    return list(after)


def _pop_sizes(dims: list[Dim]) -> int:
    product = 1
    while dims and isinstance(size := dims[-1], int):
        product *= size
        dims.pop()
    return product


def _known(dims: tuple[Dim, ...] | None, value: str) -> tuple[Dim, ...]:
    if dims is None:
        raise OpaqueError(f"the shape of {value} is not recorded")
    return dims
