"""What of a run is timed as what."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.export.errors import BismoothError
from bismooth.tools.bench_timing import Timing, time_run
from tests.numpy_decoder import NumpyDecoder

PROMPTS = np.array([[1, 2, 3], [4, 5, 0]])


class Slow(NumpyDecoder):
    """A decoder that takes a second per position that it appends and, of a token, one more than of the one before."""

    def __init__(self) -> None:
        super().__init__(7, capacity=16)
        self.now = 0.0
        self.fed: list[list[int]] = []
        self.made: list[list[int]] = []

    def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        logits = super().prefill(ids, mask)
        self.now += ids.shape[1] + self.length
        self.fed.append(ids[:, -1].tolist())
        self.made.append(logits.argmax(-1).tolist())
        return logits


def test_a_run() -> None:
    decoder = Slow()
    assert time_run(decoder, PROMPTS, 4, lambda: decoder.now) == Timing(6.0, 6.0, (5.0, 6.0, 7.0))
    assert decoder.calls == [3, 1, 1, 1]
    assert decoder.fed[1:] == decoder.made[:-1], "the likeliest tokens are fed"
    assert time_run(decoder, PROMPTS, 2, lambda: decoder.now) == Timing(6.0, 6.0, (5.0,)), "it begins anew"


def test_choosing_the_first_token_is_no_part_of_the_prefill() -> None:
    clock = iter([10.0, 13.0, 13.5, 14.0])
    timing = time_run(Slow(), PROMPTS, 2, lambda: next(clock))
    assert timing == Timing(3.0, 3.5, (0.5,))
    assert timing.decode == 0.5


def test_prompts_that_do_not_fit() -> None:
    with pytest.raises(BismoothError, match="has room for 16 positions per row"):
        time_run(Slow(), PROMPTS, 15)
