"""Choose the next tokens from logits: the likeliest ones, or by chance.

The order is that of transformers: temperature, then top-k, then top-p (nucleus sampling, arXiv 1904.09751), then min-p
(arXiv 2407.01082). Each computes with the probabilities that those before it left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, of equal ones that with the lowest id.
        top_k: keep the k likeliest tokens, and all that are as likely as the last of them. ``None`` keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach it; of equally likely ones those with lower
            ids.
        min_p: keep tokens that have at least this share of the probability of the likeliest one.
        seed: of the random numbers. Each row of a batch has its own.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = [
            ("temperature", self.temperature, 0 <= self.temperature < np.inf, "a finite number of 0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        ]
        for name, value, valid, expected in checks:
            if not valid:
                raise BismoothError(f"sampling: {name} is {value}. Expected {expected}.")


GREEDY = Sampling()
"""The likeliest tokens."""


class Sampler:
    """Draws tokens for the rows of one batch.

    A row's tokens depend on its own logits, the seed and its number, not on the other rows.
    """

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self._sampling = sampling
        self._random = [np.random.default_rng([sampling.seed, row]) for row in range(rows)]

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Tokens [B] from logits [B, V].

        Raises:
            BismoothError: a row has NaN, infinity, or no finite logit.
        """
        highest = logits.max(axis=-1)
        if not np.isfinite(highest).all():
            row = int(np.flatnonzero(~np.isfinite(highest))[0])
            raise BismoothError(
                f"sampling: the largest logit of row {row} is {highest[row]}. Expected a finite number. "
                "The engine overflows: run 'bismooth verify' on the artifact that it was built from."
            )
        if self._sampling.temperature == 0:
            return logits.argmax(axis=-1)
        chosen = [
            random.choice(len(row), p=probabilities(row, self._sampling))
            for row, random in zip(logits, self._random, strict=True)
        ]
        return np.array(chosen, np.int64)


def probabilities(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities [V] of the tokens from logits [V] with a finite maximum; 0 for those that are not kept.

    The temperature must not be 0.
    """
    with np.errstate(over="ignore"):  # to -inf, which is the limit
        scores = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    shares = np.exp(scores)
    shares /= shares.sum()
    if sampling.top_p < 1:
        shares = _nucleus(shares, sampling.top_p)
    shares[shares < sampling.min_p * shares.max()] = 0
    return shares / shares.sum()


def _nucleus(shares: NDArray[np.float64], p: float) -> NDArray[np.float64]:
    """The fewest largest ``shares`` whose sum reaches ``p``; 0 in place of the others."""
    # all below this are less than 1 - p together: a few are sorted instead of a vocabulary
    candidates = np.flatnonzero(shares >= (1 - p) / len(shares))
    order = candidates[np.argsort(-shares[candidates], kind="stable")]
    kept = order[: np.searchsorted(np.cumsum(shares[order]), p) + 1]
    nucleus = np.zeros_like(shares)
    nucleus[kept] = shares[kept]
    return nucleus
