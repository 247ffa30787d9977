"""Run graphs with caches in ONNX Runtime, piece of text by piece.

In graphs that ``bismooth build --engine onnxruntime`` lowered, caches are buffers that attention appends to in place,
and that grow by doubling. In any other graph with caches, each run makes new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..export.graph_names import ATTENTION_MASK, INPUT_IDS, LOGITS, is_past, is_present, past_of
from .onnxruntime import Session
from .token_feeds import Port

ROOM = 256
"""Positions that caches have room for at first."""

Values = Mapping[str, NDArray[Any]]


class Run(Protocol):
    """A graph and its caches.

    Attributes:
        output: what it computes.
    """

    output: Port

    def __call__(self, values: Values) -> NDArray[Any]:
        """The output [B, S, …] for more positions; of graphs that give the last position alone, [B, 1, …].

        Args:
            values: what the graph reads beside its caches, by name; at least ``input_ids`` [B, S] of the new positions
                and ``attention_mask`` [B, total], of those in the caches too.
        """
        ...

    def reset(self) -> None:
        """Forget all positions."""
        ...


class RunOfParts:
    """Graphs that run one after the other, and read what those before have computed."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self.output = runs[-1].output

    def reset(self) -> None:
        for run in self._runs:
            run.reset()

    def __call__(self, values: Values) -> NDArray[Any]:
        known = dict(values)
        for run in self._runs:
            known[run.output.name] = run(known)
        return known[self.output.name]


class _InPlace:
    """Runs a graph whose caches have room for more positions than there are."""

    def __init__(self, session: Session, capacity: int) -> None:
        self._session, self._capacity = session, capacity
        self.output = _output(session)
        self._ports = [port for port in session.inputs if is_past(port.name)]
        self._presents = {past_of(port.name): port.name for port in session.outputs if is_present(port.name)}
        self._caches: dict[str, NDArray[Any]] = {}
        self._binding: Any = None
        self._rows = self._room = self._length = 0

    def reset(self) -> None:
        self._length = 0

    def __call__(self, values: Values) -> NDArray[Any]:
        rows, total = values[ATTENTION_MASK].shape
        self._reserve(rows, total)
        if self._length and rows > 1 and values[INPUT_IDS].shape[1] > 1:  # GroupQueryAttention takes one row then
            parts = [slice(row, row + 1) for row in range(rows)]
            results = [
                self._append(self._bind(part), {name: value[part] for name, value in values.items()}) for part in parts
            ]
        else:
            results = [self._append(self._binding, values)]
        self._length = total
        return np.concatenate(results)

    def _append(self, binding: Any, values: Values) -> NDArray[Any]:
        rows, length = values[INPUT_IDS].shape
        sizes = [size if isinstance(size, int) else length for size in self.output.shape[1:]]
        result = np.empty((rows, *sizes), self.output.dtype)
        binding.bind_output(self.output.name, "cpu", 0, result.dtype.type, result.shape, result.ctypes.data)
        names = [port.name for port in self._session.inputs if port.name in values]
        self._session.run_bound(binding, {name: np.ascontiguousarray(values[name]) for name in names})
        return result

    def _reserve(self, rows: int, total: int) -> None:
        """Make room for ``total`` positions of ``rows`` rows, with those that there are in front."""
        if rows == self._rows and total <= self._room:
            return
        kept = self._length  # 0 if the rows are others
        room = min(self._capacity, max(total, ROOM, 2 * self._room if kept else 0))
        self._rows = 0  # until all is bound: after an interrupt the binding may be to buffers that are gone
        for port in self._ports:
            grown = np.zeros((rows, size_of(port, 1), room, size_of(port, 3)), port.dtype)
            if kept:
                grown[:, :, :kept] = self._caches[port.name][:, :, :kept]
            self._caches[port.name] = grown
        self._binding = self._bind(slice(None))
        self._rows, self._room = rows, room

    def _bind(self, rows: slice) -> Any:
        """Some rows of the caches as input and output."""
        binding = self._session.bind()
        for name, cache in self._caches.items():
            part = cache[rows]
            place = "cpu", 0, part.dtype.type, part.shape, part.ctypes.data
            binding.bind_input(name, *place)
            binding.bind_output(self._presents[name], *place)
        return binding


class _Growing:
    """Runs a graph that gives new caches each time, or has none."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.output = _output(session)
        self._names = [port.name for port in session.outputs if is_present(port.name)]
        self._caches: dict[str, NDArray[Any]] = {}

    def reset(self) -> None:
        self._caches = {}

    def __call__(self, values: Values) -> NDArray[Any]:
        feeds = self._session.token_feeds(values[INPUT_IDS], {**values, **self._caches})
        results = self._session.run(feeds, [self.output.name, *self._names])
        self._caches = {past_of(name): results[name] for name in self._names}
        return results[self.output.name]


def find_run(session: Session, capacity: int) -> Run:
    """What runs the graph, which tells by the names of its axes whether caches are updated in place.

    Args:
        capacity: the most positions of a row.
    """
    past = {port.name: port.shape[2] for port in session.inputs if is_past(port.name)}
    present = {past_of(port.name): port.shape[2] for port in session.outputs if is_present(port.name)}
    return _InPlace(session, capacity) if past and past == present else _Growing(session)


def size_of(port: Port, axis: int) -> int:
    """A size that does not vary."""
    return int(port.shape[axis] or 0)


def _output(session: Session) -> Port:
    """The logits; of a part without them, what the next part reads."""
    outputs = [port for port in session.outputs if not is_present(port.name)]
    return next((port for port in outputs if port.name == LOGITS), outputs[0])
