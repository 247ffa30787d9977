"""What a graph with caches computes token by token, held against what it computes on whole windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.onnxruntime import Session
from ..engines.token_feeds import Port
from ..export.graph_names import ATTENTION_MASK, POSITION_IDS, is_past, is_present, past_of

Ids = NDArray[np.int64]
_BATCH = 16


class CachedRun:
    """Runs a graph, or a piece of one, on one stretch of text after the other; the caches go from each run to the next.

    Args:
        session: of the graph; a cache that it reads and does not append to counts for its length alone.
        output: what is wanted.
    """

    def __init__(self, session: Session, output: str) -> None:
        self._session, self._output = session, output
        self._names = [port.name for port in session.outputs if is_present(port.name)]
        grown = set(map(past_of, self._names))
        self._others = [port for port in session.inputs if is_past(port.name) and port.name not in grown]
        self._caches: dict[str, NDArray[Any]] = {}
        self._length = 0

    def append(self, ids: Ids, others: Mapping[str, NDArray[Any]] | None = None) -> NDArray[Any]:
        """The output [B, S, …] at the tokens ids [B, S] behind those so far; ``others`` are further inputs there."""
        total = self._length + ids.shape[1]
        positions = np.arange(self._length, total, dtype=np.int64)
        feeds = self._session.token_feeds(
            ids,
            {
                ATTENTION_MASK: np.ones((len(ids), total), np.int64),
                POSITION_IDS: np.broadcast_to(positions, ids.shape),
                **{port.name: self._empty(port, len(ids)) for port in self._others},
                **self._caches,
                **(others or {}),
            },
        )
        values = self._session.run(feeds, [self._output, *self._names])
        self._caches = {past_of(name): values[name] for name in self._names}
        self._length = total
        return values[self._output]

    def _empty(self, port: Port, batch: int) -> NDArray[Any]:
        """A cache [B, heads, length, size] of which only the length is read."""
        heads, size = (int(str(port.shape[axis])) for axis in (1, 3))
        return np.zeros((batch, heads, self._length, size), port.dtype)


def stepwise(
    run: CachedRun,
    ids: Ids,
    prefill: int,
    on_step: Callable[[str], None],
    others: Mapping[str, NDArray[Any]] | None = None,
) -> NDArray[Any]:
    """The output [B, S, …] at windows ids [B, S]: their first ``prefill`` tokens in one run, the others one by one.

    ``others`` are further inputs [B, S, …], of which each run gets its part.
    """

    def part(start: int, stop: int) -> NDArray[Any]:
        return run.append(ids[:, start:stop], {name: value[:, start:stop] for name, value in (others or {}).items()})

    pieces = [part(0, prefill)]
    for place in range(prefill, ids.shape[1]):
        pieces.append(part(place, place + 1))
        on_step(f"token {place}")
    return np.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]


def greedy(session: Session, prompts: Ids, count: int, on_prompt: Callable[[str], None]) -> Ids:
    """The ``count`` most likely tokens [N, count], one after the other, behind each of the prompts [N, P]."""
    continued: list[Ids] = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        run = CachedRun(session, session.outputs[0].name)
        tokens = [run.append(batch)[:, -1:].argmax(-1)]
        while len(tokens) < count:
            tokens.append(run.append(tokens[-1]).argmax(-1))
        continued.append(np.concatenate(tokens, axis=1))
        for number in range(start, start + len(batch)):
            on_prompt(f"prompt {number}")
    return np.concatenate(continued)


def common_prefix(a: Ids, b: Ids) -> NDArray[np.int64]:
    """How many tokens [N] of each row of a [N, T] are those of b before the first that differs."""
    differs = np.concatenate([a != b, np.ones((len(a), 1), np.bool_)], axis=1)
    return differs.argmax(axis=1)


def cut_prompts(windows: Ids, count: int, length: int) -> Ids:
    """Up to ``count`` pieces [P, length] of windows [N, S], spread evenly over each window."""
    per_window = min(-(-count // len(windows)), windows.shape[1] // length)
    starts = np.arange(per_window) * (windows.shape[1] // per_window)
    pieces = [window[start : start + length] for window in windows for start in starts]
    return np.array(pieces[:count])
