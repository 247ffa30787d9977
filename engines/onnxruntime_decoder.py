"""Generate text in ONNX Runtime on the CPU.

In graphs that ``bismooth build --engine onnxruntime`` lowered, caches are buffers that attention appends to in place.
They grow by doubling, and prompts run in pieces, since attention's scores are as many as new positions times room. In
any other graph with caches, each run makes new ones.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..export.artifact import MANIFEST, Artifact
from ..export.errors import BismoothError
from ..export.graph_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    has_caches,
    is_past,
    is_present,
    past_of,
)
from .decoder import Positions
from .onnxruntime import Session
from .token_feeds import Port

PIECE = 256
"""Positions of a prompt that run at once: of 128 to 1024, the fastest for 1024, and near the least in memory."""

ROOM = 256
"""Positions that caches have room for at first."""

CAPACITY = 2048
"""Positions of a row where no manifest says how many the model takes."""

Ids = NDArray[np.int64]


class OnnxRuntimeDecoder:
    """A :class:`.decoder.Decoder` on the CPU.

    Args:
        engine: the graph in a folder that ``bismooth build`` made, or any float32 graph with caches.
        threads: threads per operator; one per core by default.
        capacity: the most positions of a row; as many as the model takes by default.

    Raises:
        BismoothError: the graph has no caches, or other inputs than text has, or cannot be loaded.
    """

    def __init__(self, engine: Path, *, threads: int | None = None, capacity: int | None = None) -> None:
        self._positions = Positions(str(engine), capacity or _positions_of(engine.parent))
        self._session = Session(engine, threads=threads, spinning=True)
        try:
            self._run = _runner(self._session, self.capacity)
        except BaseException:  # an interrupt too: the graph's weights are not the garbage collector's to free
            self._session.close()
            raise

    @property
    def vocab_size(self) -> int:
        return self._run.vocab_size

    @property
    def capacity(self) -> int:
        return self._positions.capacity

    @property
    def length(self) -> int:
        return self._positions.length

    def prefill(self, ids: Ids, mask: Ids | None = None) -> NDArray[np.float32]:
        """See :class:`.decoder.Decoder`."""
        begin = self.length
        positions = self._positions.append(self._positions.mask_of(ids, mask))
        pieces = [slice(start, start + PIECE) for start in range(0, ids.shape[1], PIECE)]
        seen = self._positions.mask
        return [self._run(ids[:, piece], seen[:, : begin + piece.stop], positions[:, piece]) for piece in pieces][-1]

    def decode(self, tokens: Ids) -> NDArray[np.float32]:
        """See :class:`.decoder.Decoder`."""
        return self.prefill(tokens[:, None])

    def reset(self) -> None:
        """See :class:`.decoder.Decoder`."""
        self._positions.reset()
        self._run.reset()

    def close(self) -> None:
        """Free the graph, its weights and the caches."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Runner(Protocol):
    vocab_size: int

    def __call__(self, ids: Ids, mask: Ids, positions: Ids) -> NDArray[np.float32]:
        """Logits [B, V] of the last of the positions ids [B, S] behind those in the caches; mask [B, total]."""
        ...

    def reset(self) -> None: ...


class _InPlace:
    """Runs a graph whose caches have room for more positions than there are."""

    def __init__(self, session: Session, capacity: int) -> None:
        self._session, self._capacity = session, capacity
        logits = _logits(session)
        self._is_last, self.vocab_size = logits.shape[1] == 1, _size(logits, 2)
        self._ports = [port for port in session.inputs if is_past(port.name)]
        self._presents = {past_of(port.name): port.name for port in session.outputs if is_present(port.name)}
        self._caches: dict[str, NDArray[Any]] = {}
        self._binding: Any = None
        self._rows = self._room = self._length = 0

    def reset(self) -> None:
        self._length = 0

    def __call__(self, ids: Ids, mask: Ids, positions: Ids) -> NDArray[np.float32]:
        rows, total = mask.shape
        self._reserve(rows, total)
        if self._length and rows > 1 and ids.shape[1] > 1:  # GroupQueryAttention takes one row then
            parts = [slice(row, row + 1) for row in range(rows)]
            logits = [self._append(self._bind(part), ids[part], mask[part], positions[part]) for part in parts]
        else:
            logits = [self._append(self._binding, ids, mask, positions)]
        self._length = total
        return np.concatenate(logits)

    def _append(self, binding: Any, ids: Ids, mask: Ids, positions: Ids) -> NDArray[np.float32]:
        logits = np.empty((len(ids), 1 if self._is_last else ids.shape[1], self.vocab_size), np.float32)
        binding.bind_output(LOGITS, "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)
        self._session.run_bound(binding, _feeds(self._session, ids, mask, positions))
        return logits[:, -1]

    def _reserve(self, rows: int, total: int) -> None:
        """Make room for ``total`` positions of ``rows`` rows, with those that there are in front."""
        if rows == self._rows and total <= self._room:
            return
        kept = self._length  # 0 if the rows are others
        room = min(self._capacity, max(total, ROOM, 2 * self._room if kept else 0))
        self._rows = 0  # until all is bound: after an interrupt the binding may be to buffers that are gone
        for port in self._ports:
            grown = np.zeros((rows, _size(port, 1), room, _size(port, 3)), port.dtype)
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
    """Runs a graph that gives new caches each time."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.vocab_size = _size(_logits(session), 2)
        self._names = [port.name for port in session.outputs if is_present(port.name)]
        self._caches: dict[str, NDArray[Any]] = {}

    def reset(self) -> None:
        self._caches = {}

    def __call__(self, ids: Ids, mask: Ids, positions: Ids) -> NDArray[np.float32]:
        feeds = _feeds(self._session, ids, mask, positions)
        values = self._session.run(self._session.token_feeds(ids, {**feeds, **self._caches}), [LOGITS, *self._names])
        self._caches = {past_of(name): values[name] for name in self._names}
        return values[LOGITS][:, -1]


def _runner(session: Session, capacity: int) -> _Runner:
    """What runs the graph, which tells by the names of its axes whether caches are updated in place."""
    known = {INPUT_IDS, ATTENTION_MASK, POSITION_IDS}
    unknown = [port.name for port in session.inputs if port.name not in known and not is_past(port.name)]
    if unknown or not has_caches(port.name for port in session.inputs):
        got = f"the input '{unknown[0]}'" if unknown else "none"
        raise BismoothError(
            f"{session.label}: cannot generate text. Expected {INPUT_IDS}, {ATTENTION_MASK}, {POSITION_IDS} and caches "
            f"as inputs, got {got}. Export the model with --kv-cache and build the engine again."
        )
    past = {port.name: port.shape[2] for port in session.inputs if is_past(port.name)}
    present = {past_of(port.name): port.shape[2] for port in session.outputs if is_present(port.name)}
    return _InPlace(session, capacity) if past == present else _Growing(session)


def _logits(session: Session) -> Port:
    return next(port for port in session.outputs if port.name == LOGITS)


def _size(port: Port, axis: int) -> int:
    """A size that does not vary."""
    return int(port.shape[axis] or 0)


def _feeds(session: Session, ids: Ids, mask: Ids, positions: Ids) -> dict[str, NDArray[Any]]:
    given = {INPUT_IDS: ids, ATTENTION_MASK: mask, POSITION_IDS: positions}
    return {port.name: np.ascontiguousarray(given[port.name]) for port in session.inputs if port.name in given}


def _positions_of(folder: Path) -> int:
    """How many positions the model takes, by the manifest of an engine folder."""
    dims = Artifact.load(folder).manifest.dims if (folder / MANIFEST).is_file() else {}
    return dims.get("max_position_embeddings", CAPACITY)
