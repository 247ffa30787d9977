"""Time one prompt and the tokens that follow it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..engines.decoder import Decoder


@dataclass(frozen=True)
class Timing:
    """Seconds of one run of a decoder.

    Attributes:
        prefill: until the logits of the prompt were there.
        first_token: until the first new token was chosen.
        tokens: of each further token, until it was chosen.
    """

    prefill: float
    first_token: float
    tokens: tuple[float, ...]

    @property
    def decode(self) -> float:
        """Seconds of all tokens but the first."""
        return sum(self.tokens)


def time_run(
    decoder: Decoder, ids: NDArray[np.int64], new_tokens: int, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Continue the prompts ids [B, S] by ``new_tokens`` tokens each, the likeliest ones; no token ends a row.

    Raises:
        BismoothError: the prompts do not fit in the decoder.
    """
    decoder.reset()
    start = clock()
    logits = decoder.prefill(ids)
    prefilled = clock()
    tokens = logits.argmax(axis=-1)
    times = [clock()]
    for _ in range(new_tokens - 1):
        tokens = decoder.decode(tokens).argmax(axis=-1)
        times.append(clock())
    steps = tuple(after - before for before, after in pairwise(times))
    return Timing(prefilled - start, times[0] - start, steps)
