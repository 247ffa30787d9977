"""Continue a batch of prompts with a decoder, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from .decoder import Decoder
from .sampling import Sampler, Sampling


class Ended(StrEnum):
    """Why a row ended."""

    STOP = "stop"
    """The model made a stop token, or the caller ended the row."""
    LENGTH = "length"
    """It has as many new tokens as were asked for."""
    CAPACITY = "capacity"
    """The decoder has no room for another position."""
    INTERRUPTED = "interrupted"


@dataclass
class Row:
    """A prompt's continuation: new tokens without the stop token, and why it ended, once it has."""

    tokens: list[int] = field(default_factory=list[int])
    ended: Ended | None = None


class Generation:
    """An iterable that continues ``prompts``: each step gives the new token of every row that made one, by row.

    The prompts are appended to what is in the caches. Reset the decoder before others. They are padded on the left to
    one length. Rows that ended are fed with padding, and are in no step.

    Args:
        prompts: token ids of each row; as many rows as the caches hold, if they hold any.
        stop: token ids that end a row.
        limit: the most new tokens of a row.

    Attributes:
        rows: the continuations so far.
        prefill_tokens: of the prompts, without padding.
        prefill_seconds: until the logits of the prompts were there.
        decode_tokens: new tokens, stop tokens included, but not the first of each row, which the prefill yields.
        decode_seconds: what they took: the time between steps, which is the caller's, not included.

    Raises:
        BismoothError: no prompt, an empty one, a token that the model does not know, or a limit below 1. From
            iterating: the prompts do not fit in the decoder, or its logits are not finite.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        stop: frozenset[int] = frozenset(),
        limit: int = 256,
    ) -> None:
        if limit < 1:
            raise BismoothError(f"generate: {limit} new tokens were asked for. Expected 1 or more.")
        _check_prompts(prompts, decoder.vocab_size)
        self._decoder, self._stop, self.limit = decoder, stop, limit
        self._sampler = Sampler(sampling, len(prompts))
        self._ids, self._mask = pad_left(prompts)
        self.rows = [Row() for _ in prompts]
        self.prefill_tokens = sum(map(len, prompts))
        self.prefill_seconds = 0.0
        self.decode_tokens = 0
        self.decode_seconds = 0.0

    def __iter__(self) -> Iterator[Mapping[int, int]]:
        start = time.perf_counter()
        logits = self._decoder.prefill(self._ids, self._mask)
        self.prefill_seconds = time.perf_counter() - start
        made = self._take(self._sampler(logits))
        yield made
        while running := self._running():
            start = time.perf_counter()
            logits = self._decoder.decode(self._last(running))
            made = self._take(self._sampler(logits))
            self.decode_seconds += time.perf_counter() - start
            self.decode_tokens += len(running)
            yield made

    def stop(self, row: int) -> None:
        """End one row, as a stop token would."""
        self.rows[row].ended = self.rows[row].ended or Ended.STOP

    def interrupt(self) -> None:
        """End all rows. A call of the decoder may have been cut short, so its caches are dropped."""
        for row in self._running():
            self.rows[row].ended = Ended.INTERRUPTED
        self._decoder.reset()

    def _running(self) -> list[int]:
        return [number for number, row in enumerate(self.rows) if row.ended is None]

    def _last(self, running: list[int]) -> NDArray[np.int64]:
        tokens = np.zeros(len(self.rows), np.int64)
        tokens[running] = [self.rows[row].tokens[-1] for row in running]
        return tokens

    def _take(self, tokens: NDArray[np.int64]) -> dict[int, int]:
        """Give the rows that run their tokens [B], and end those that are done."""
        is_full = self._decoder.length >= self._decoder.capacity
        made: dict[int, int] = {}
        for number in self._running():
            row, token = self.rows[number], int(tokens[number])
            if token in self._stop:
                row.ended = Ended.STOP
                continue
            made[number] = token
            row.tokens.append(token)
            if len(row.tokens) >= self.limit:
                row.ended = Ended.LENGTH
            elif is_full:
                row.ended = Ended.CAPACITY
        return made


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids [B, S] that end in the prompts, with 0 before, and the mask [B, S] that is 1 where the prompts are."""
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, ids.shape[1] - len(prompt) :] = prompt
        mask[row, ids.shape[1] - len(prompt) :] = 1
    return ids, mask


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    if not prompts:
        raise BismoothError("generate: Expected one or more prompts, got none.")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise BismoothError(
                f"generate: prompt {number} has no tokens. Expected some text: the model has to begin from something."
            )
        if max(prompt) >= vocab_size:
            raise BismoothError(
                f"generate: prompt {number} has the token {max(prompt)}, but the model knows {vocab_size}. "
                "Expected the tokenizer of the model. Build the engine again from an artifact that has it."
            )
