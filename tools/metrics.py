"""How far a candidate's outputs are from a reference's, accumulated window by window in float64.

Over all positions of all windows, with p and q the softmax of the reference's and the candidate's logits:

- perplexity: exp of the mean of -log p(next token), over the S - 1 predicted tokens of each window; that mean, in nats,
  is its logarithm;
- KL: Σ p log(p / q) in nats; its mean and its 99th percentile;
- top-1: the share of positions with the same argmax. *Stable* positions are those where the reference's largest
  probability exceeds its second largest by more than 0.1: a small error should change no argmax there;
- cosine: between the rows of logits; its 5th percentile;
- error: max |candidate - reference|, and the same divided by max |reference|.

Memory does not grow with the number of windows but for what is kept of each position (40 bytes per token). Logits are
converted to float64 a few rows at a time, so a large vocabulary costs no more memory.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError, GateError

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.floating[Any]]
Rows: TypeAlias = NDArray[np.float64]

STABLE_MARGIN = 0.1
#: Elements that are worked on at once: half a MiB in float64, so that the many passes over them run in the cache.
_CHUNK = 1 << 16
_NO_TOKEN = -1


@dataclass(frozen=True)
class LogitMetrics:
    """The result of a comparison, as the module defines it.

    ``perplexity_ratio`` is candidate / reference. ``top1_stable`` is ``None`` where no position is stable.
    """

    positions: int
    reference_perplexity: float
    perplexity: float
    perplexity_ratio: float
    log_perplexity: float
    kl_mean: float
    kl_p99: float
    top1: float
    top1_stable: float | None
    stable_share: float
    cosine_p5: float
    max_error: float
    relative_error: float


@dataclass(frozen=True, eq=False)
class TokenMetrics:
    """What a comparison gave for each of the S tokens of N windows, in float64.

    Attributes:
        kl: KL in nats [N, S].
        top1: 1 where the argmax is the same, else 0 [N, S].
        nll: the candidate's -log p(next token) in nats [N, S - 1].
        reference_nll: the reference's.
    """

    kl: Rows
    top1: Rows
    nll: Rows
    reference_nll: Rows


class Perplexity:
    """Perplexity of one model, window by window."""

    def __init__(self) -> None:
        self._nll = array("d")

    def update(self, ids: Ids, logits: Floats) -> None:
        """Add windows: token ids [B, S] and their logits [B, S, V].

        Raises:
            BismoothError: the shapes do not fit.
            GateError: a logit is not finite.
        """
        for targets, rows in _chunks(ids, logits):
            self.add(targets, _Softmax(rows, "the model", GateError))

    def add(self, targets: Ids, softmax: _Softmax) -> None:
        """Add rows, with the token that follows each, -1 where none does."""
        known = np.flatnonzero(targets != _NO_TOKEN)
        nll = softmax.log_sum[known] - softmax.shifted[known, targets[known]]
        self._nll.frombytes(nll.tobytes())

    @property
    def nll(self) -> Rows:
        """-log p(next token) in nats of all predicted tokens, in their order.

        Raises:
            BismoothError: nothing was added.
        """
        if not self._nll:
            raise BismoothError("metrics: Expected one or more windows, got none. Ask for at least one window.")
        return np.array(self._nll)

    @property
    def mean_nll(self) -> float:
        """Mean of :attr:`nll`."""
        return float(self.nll.mean())

    @property
    def value(self) -> float:
        """exp of the mean; infinite beyond the largest float."""
        return _exp(self.mean_nll)


class LogitComparison:
    """Compares a candidate with a reference, window by window."""

    def __init__(self) -> None:
        self._reference = Perplexity()
        self._candidate = Perplexity()
        self._kl = array("d")
        self._cosine = array("d")
        self._top1 = array("d")
        self._length = 0
        self._stable = 0
        self._stable_same = 0
        self._max_error = 0.0
        self._max_reference = 0.0

    def update(self, ids: Ids, reference: Floats, candidate: Floats) -> None:
        """Add windows: token ids [B, S] and the logits [B, S, V] of both models.

        Raises:
            BismoothError: the shapes do not fit, or a logit of the reference is not finite.
            GateError: a logit of the candidate is not finite.
        """
        if candidate.shape != reference.shape:
            raise BismoothError(
                f"metrics: Expected logits of one shape, got reference {list(reference.shape)} "
                f"and candidate {list(candidate.shape)}. Compare graphs of the same model."
            )
        self._length = ids.shape[-1]
        for (targets, r), (_, c) in zip(_chunks(ids, reference), _chunks(ids, candidate), strict=True):
            self._max_reference = max(self._max_reference, float(np.abs(r).max()))
            self._max_error = max(self._max_error, float(np.abs(c - r).max()))
            self._add(targets, _Softmax(r, "the reference", BismoothError), _Softmax(c, "the candidate", GateError))

    def _add(self, targets: Ids, p: _Softmax, q: _Softmax) -> None:
        self._reference.add(targets, p)
        self._candidate.add(targets, q)
        self._cosine.frombytes(_cosine(p, q).tobytes())
        same = p.top == q.top
        stable = p.margin() > STABLE_MARGIN
        self._top1.frombytes(same.astype(np.float64).tobytes())
        self._stable += int(stable.sum())
        self._stable_same += int((same & stable).sum())
        cross = _dot(p.exp, p.shifted - q.shifted) / p.sum  # Σ p (x - max x - y + max y)
        self._kl.frombytes((cross - p.log_sum + q.log_sum).tobytes())

    def tokens(self) -> TokenMetrics:
        """The metrics of each token of all windows so far, which are of one length.

        Raises:
            BismoothError: there was none.
        """
        nll, reference_nll = (model.nll.reshape(-1, self._length - 1) for model in (self._candidate, self._reference))
        kl, top1 = (np.array(values).reshape(-1, self._length) for values in (self._kl, self._top1))
        return TokenMetrics(kl, top1, nll, reference_nll)

    def result(self) -> LogitMetrics:
        """The metrics of all windows so far.

        Raises:
            BismoothError: there was none.
        """
        nll, reference_nll = self._candidate.mean_nll, self._reference.mean_nll
        kl, cosine = np.array(self._kl), np.array(self._cosine)
        return LogitMetrics(
            positions=kl.size,
            reference_perplexity=_exp(reference_nll),
            perplexity=_exp(nll),
            perplexity_ratio=_exp(nll - reference_nll),
            log_perplexity=nll,
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1=float(np.array(self._top1).mean()),
            top1_stable=self._stable_same / self._stable if self._stable else None,
            stable_share=self._stable / kl.size,
            cosine_p5=float(np.quantile(cosine, 0.05)),
            max_error=self._max_error,
            relative_error=_ratio(self._max_error, self._max_reference),
        )


class Sqnr:
    """Signal-to-quantization-noise ratio 10 log10(Σ r² / Σ (c - r)²) in dB of one tensor, window by window.

    Attributes:
        signal: Σ r² of each window.
        noise: Σ (c - r)² of each window.
    """

    def __init__(self) -> None:
        self.signal: list[float] = []
        self.noise: list[float] = []
        self._max_error = 0.0
        self._max_reference = 0.0

    def update(self, reference: Floats, candidate: Floats) -> None:
        """Add arrays of one shape.

        Raises:
            BismoothError: the shapes differ.
        """
        if candidate.shape != reference.shape:
            raise BismoothError(
                f"metrics: Expected tensors of one shape, got {list(reference.shape)} and {list(candidate.shape)}. "
                "Compare graphs of the same model."
            )
        flat_r, flat_c = reference.reshape(-1), candidate.reshape(-1)
        self.signal.append(0.0)
        self.noise.append(0.0)
        for start in range(0, flat_r.size, _CHUNK):
            r = flat_r[start : start + _CHUNK].astype(np.float64)
            noise = flat_c[start : start + _CHUNK] - r
            self.signal[-1] += float(r @ r)
            self.noise[-1] += float(noise @ noise)
            # np.maximum keeps a NaN, max() would drop it
            self._max_error = float(np.maximum(self._max_error, np.abs(noise).max()))
            self._max_reference = float(np.maximum(self._max_reference, np.abs(r).max()))

    @property
    def decibels(self) -> float:
        """The ratio; infinite without noise (also without signal), minus infinite for noise alone, NaN after a NaN."""
        signal, noise = sum(self.signal), sum(self.noise)
        if not noise:
            return math.inf
        return 10 * math.log10(signal / noise) if signal else -math.inf

    @property
    def relative_error(self) -> float:
        """max |c - r| / max |r|; 0 / 0 counts as 0."""
        return _ratio(self._max_error, self._max_reference)


class _Softmax:
    """Softmax of rows [R, V], in pieces: exp(x - max x), its sum and its logarithm."""

    def __init__(self, rows: Floats, whose: str, error: type[BismoothError]) -> None:
        self.logits = rows.astype(np.float64)
        self.norm2 = _dot(self.logits, self.logits)
        if not np.isfinite(self.norm2).all():
            raise error(
                f"metrics: the logits of {whose} hold NaN or infinity. Expected finite numbers. "
                "Check the graph for overflow, or leave the layers at fault in float."
            )
        self.top = self.logits.argmax(axis=1)
        self.shifted = self.logits - np.take_along_axis(self.logits, self.top[:, None], axis=1)
        self.exp = np.exp(self.shifted)
        self.sum: Rows = self.exp.sum(axis=1)
        self.log_sum = np.log(self.sum)

    def margin(self) -> Rows:
        """Largest minus second largest probability [R]."""
        best = self.top[:, None]
        np.put_along_axis(self.exp, best, 0.0, axis=1)
        second = self.exp.max(axis=1)
        np.put_along_axis(self.exp, best, 1.0, axis=1)
        return np.asarray((1 - second) / self.sum)


def _chunks(ids: Ids, logits: Floats) -> Iterator[tuple[Ids, Floats]]:
    """Next tokens [R] and logits [R, V], a few rows at a time."""
    if logits.ndim != 3 or logits.shape[:2] != ids.shape or ids.shape[1] < 2 or not logits.size:
        raise BismoothError(
            f"metrics: Expected token ids [B, S] with S > 1 and logits [B, S, V], got {list(ids.shape)} and "
            f"{list(logits.shape)}. Export a model that gives logits for all positions."
        )
    targets = np.full_like(ids, _NO_TOKEN)
    targets[:, :-1] = ids[:, 1:]
    flat_targets, rows = targets.reshape(-1), logits.reshape(-1, logits.shape[2])
    step = max(1, _CHUNK // logits.shape[2])
    for start in range(0, len(rows), step):
        yield flat_targets[start : start + step], rows[start : start + step]


def _cosine(p: _Softmax, q: _Softmax) -> Rows:
    """Cosine of the logits [R]: 1 for two zero rows, 0 for one."""
    norms = np.sqrt(p.norm2) * np.sqrt(q.norm2)
    return np.divide(_dot(p.logits, q.logits), norms, out=(p.norm2 == q.norm2).astype(np.float64), where=norms > 0)


def _dot(a: Rows, b: Rows) -> Rows:
    """Σ a b over each row."""
    return np.asarray(np.einsum("ij,ij->i", a, b))


def _exp(x: float) -> float:
    return math.exp(x) if x < math.log(np.finfo(np.float64).max) else math.inf


def _ratio(error: float, scale: float) -> float:
    return error / scale if scale else (math.inf if error else 0.0)
