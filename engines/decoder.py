"""A causal language model with caches, and the bookkeeping of rows and positions that its implementations share."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError


class Decoder(Protocol):
    """A causal language model with caches. One batch at a time; a context manager, which closes it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def capacity(self) -> int:
        """The most positions, padding included, that a row may have."""
        ...

    @property
    def length(self) -> int:
        """Positions that are in the caches now, padding included."""
        ...

    def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Append ids [B, S], left-padded where mask [B, S] is 0; logits [B, V] of the last position.

        After :meth:`reset` it begins a batch of any B, otherwise it appends to the rows that there are.

        Raises:
            BismoothError: there is no room for S more positions, or there are other than B rows.
        """
        ...

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to each row, tokens [B]; logits [B, V]. Raises as :meth:`prefill` does."""
        ...

    def reset(self) -> None:
        """Forget all rows. Whatever state an interrupted call has left ends with it."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Positions:
    """Which positions of the rows in a decoder's caches are text and which are padding.

    Args:
        label: the engine, for messages.
        capacity: the most positions of a row.
    """

    def __init__(self, label: str, capacity: int) -> None:
        self._label = label
        self.capacity = capacity
        self.reset()

    def reset(self) -> None:
        self._mask = np.zeros((0, self.capacity), np.int64)
        self._count = np.zeros((0, 1), np.int64)
        self.length = 0

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first."""
        return len(self._mask)

    @property
    def mask(self) -> NDArray[np.int64]:
        """The attention mask [B, total]: 1 for text, 0 for padding. A view that later calls do not change."""
        return self._mask[:, : self.length]

    def mask_of(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """``mask``, or one without padding, of token ids [B, S].

        Raises:
            BismoothError: the ids are no integers [B, S], or the mask has another shape.
        """
        known = np.ones(ids.shape, np.int64) if mask is None else mask
        if ids.ndim != 2 or ids.dtype.kind != "i" or known.shape != ids.shape:
            raise BismoothError(
                f"{self._label}: expected token ids [batch, sequence] of integers and a mask of their shape, "
                f"got {ids.dtype} {list(ids.shape)} and {list(known.shape)}."
            )
        return known

    def append(self, mask: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position ids [B, S] of S more positions, whose mask is [B, S]: the number of tokens before, at least 0.

        Raises:
            BismoothError: no rows or positions, other than the rows there are, or more positions than fit. Nothing is
                appended then.
        """
        rows, size = mask.shape
        if not mask.size or self.rows not in (0, rows):
            raise BismoothError(
                f"{self._label}: expected 1 or more tokens for each of {self.rows or 'the'} rows of the batch, "
                f"got {size} for {rows}. Reset the decoder before another batch."
            )
        total = self.length + size
        if total > self.capacity:
            raise BismoothError(
                f"{self._label}: has room for {self.capacity} positions per row, and {total} were asked for: "
                f"{self.length} that are there and {size} more. Expected {self.capacity} at most. "
                "Shorten the text. Engines for a GPU can be built with a larger --capacity."
            )
        if not self.rows:
            self._mask = np.zeros((rows, self.capacity), np.int64)
            self._count = np.zeros((rows, 1), np.int64)
        counts = self._count + np.cumsum(mask, axis=1)
        self._mask[:, self.length : total] = mask
        self._count = counts[:, -1:]
        self.length = total
        return np.maximum(counts - 1, 0)
