"""A language model in numpy with caches: one block of attention over embeddings and positions, random weights."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bismooth.engines.decoder import Positions

HIDDEN = 16


class NumpyDecoder:
    """Implements ``Decoder``; ``calls`` records how many positions each call appended."""

    def __init__(self, vocab_size: int, capacity: int = 64, seed: int = 0) -> None:
        draw = np.random.default_rng(seed).standard_normal
        self.vocab_size, self.capacity = vocab_size, capacity
        self.calls: list[int] = []
        self.is_closed = False
        self._embedding = draw((vocab_size, HIDDEN))
        self._query, self._key, self._value = draw((3, HIDDEN, HIDDEN)) / 2
        self._positions = Positions("numpy", capacity)
        self.reset()

    @property
    def length(self) -> int:
        return self._positions.length

    def reset(self) -> None:
        self._positions.reset()
        self._keys = self._values = np.zeros((0, 0, HIDDEN))

    def close(self) -> None:
        self.is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        places = self._positions.append(self._positions.mask_of(ids, mask))
        self.calls.append(ids.shape[1])
        x = self._embedding[ids] + np.sin(places[..., None] * np.arange(1, HIDDEN + 1) / HIDDEN)
        self._keys = _join(self._keys, x @ self._key)
        self._values = _join(self._values, x @ self._value)
        scores = np.einsum("bsh,bth->bst", x @ self._query, self._keys)
        total = self.length
        steps = np.arange(total)
        own = steps == steps[total - ids.shape[1] :, None]
        seen = (steps <= steps[total - ids.shape[1] :, None]) & (self._positions.mask[:, None] == 1) | own
        weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        attended = weights / weights.sum(axis=-1, keepdims=True) @ self._values
        return ((x + attended)[:, -1] @ self._embedding.T).astype(np.float32)

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.prefill(tokens[:, None])


def _join(cache: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([cache, new], axis=1) if len(cache) else new


class ScriptedDecoder(NumpyDecoder):
    """One that makes the tokens of a script, whatever it reads; the last one over and over."""

    def __init__(self, vocab_size: int, script: Sequence[int], capacity: int = 64) -> None:
        super().__init__(vocab_size, capacity)
        self._script = list(script)

    def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        logits = np.zeros_like(super().prefill(ids, mask))
        logits[:, self._script[0]] = 1
        self._script = self._script[1:] or self._script
        return logits
