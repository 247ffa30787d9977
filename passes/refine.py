"""Refine a smoothing factor by gradient descent on the output error that rounding is expected to cause.

Rounding to a grid of step d adds noise of variance d²/12 per element. With X' = X / s and W' = W · s, a token t of a
linear with N outputs and K inputs therefore has the expected squared output error

    e_t = (d_t² · A + B · q_t) / 12,    d_t = maxₖ|x'[t,k]| / 127        step of the token's row, or of the tensor
                                        A  = Σₖ s[k]² ‖W[:,k]‖²          what activation noise is multiplied with
                                        B  = Σₙ (maxₖ|W'[n,k]| / 127)²   steps of the weight's rows
                                        q_t = Σₖ x'[t,k]²                what weight noise is multiplied with

The weighted mean over tokens of log(e_t / ‖y_t‖²) is minimised in log s; no matrix product is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .fold import Factor
from .weights import QMAX

Float = NDArray[np.float32]

SAMPLED_ROWS = 192
"""Rows of a weight that stand for all in B."""

_RATE = 0.05
_DECAY = (0.9, 0.999)
_LEAST = np.float32(1e-30)
"""Floor of an error, so that tokens which hardly lose anything do not decide."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """X² [T, K], ‖y_t‖² of all rows of W [T], above 0, and how much each token counts in the objective [T]."""

    squares: Float
    power: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Operand:
    """Linears behind the site that read one tensor: W [N, K] holds the rows of all of them.

    Attributes:
        labels: Which channel of the site each input column reads, −1 for none.
        tokens: What they read.
        column_power: ‖W[:,k]‖², [K].
        rows: W² of sampled rows, [R, K].
        row_share: How many rows each sampled row stands for.
        peaks: [K], maxₜ|x[t,k]| if the activation has one constant scale, zeros if it is not rounded; None if each
            token has a scale of its own.
    """

    labels: NDArray[np.int32]
    tokens: Tokens
    column_power: Float
    rows: Float
    row_share: float
    peaks: Float | None


@cache
def sample(size: int, count: int) -> NDArray[np.intp]:
    """Sorted indices of ``count`` of ``size`` rows, of all if there are no more; the same ones for the same numbers.

    Drawn at random: rows at a regular distance would be the same few positions of every attention head.
    """
    rows = np.sort(np.random.default_rng(0).choice(size, count, replace=False)) if size > count else np.arange(size)
    rows.flags.writeable = False  # it is shared
    return rows


def sampled_rows(weight: Float) -> tuple[Float, float]:
    """W² of sampled rows of [N, K], and how many rows each stands for."""
    rows = np.square(weight[sample(len(weight), SAMPLED_ROWS)])
    return rows, weight.shape[0] / rows.shape[0]


def refine(start: Factor, operands: Sequence[Operand], free: NDArray[np.bool_], steps: int) -> Factor:
    """The factor [C] after ``steps`` steps of Adam (arXiv 1412.6980) with a rate that falls to 0; 1 where not free."""
    logarithm = np.log(start)
    scratch = [_Scratch.like(operand) for operand in operands]
    first, second = np.zeros_like(logarithm), np.zeros_like(logarithm)
    for step in range(steps):
        slope = np.zeros_like(logarithm)
        for operand, arrays in zip(operands, scratch, strict=True):
            _add_gradient(slope, logarithm, operand, arrays)
        slope[~free] = 0.0
        first = _DECAY[0] * first + (1 - _DECAY[0]) * slope
        second = _DECAY[1] * second + (1 - _DECAY[1]) * slope**2
        direction = first / (1 - _DECAY[0] ** (step + 1))
        size = np.sqrt(second / (1 - _DECAY[1] ** (step + 1))) + 1e-8
        logarithm -= _RATE * (1 - step / steps) * direction / size
    return np.where(free, np.exp(logarithm).astype(np.float32).astype(np.float64), 1.0)


def expected_error(s: Factor, operands: Sequence[Operand]) -> float:
    """The objective: the weighted mean over tokens of log(e_t / ‖y_t‖²), summed over the operands."""
    loss = 0.0
    for operand in operands:
        tokens, scratch = operand.tokens, _Scratch.like(operand)
        state = _State.of(np.log(s), operand, scratch)
        a, b = float(state.column_noise.sum()), float(state.row_noise.sum())
        step2 = _squared_steps(operand, state, scratch)[0]
        error = np.maximum(step2 * a + b * (tokens.squares @ state.shrunk), _LEAST)
        loss += float(tokens.weights @ np.log(error / 12 / tokens.power))
    return loss


@dataclass(frozen=True, eq=False)
class _Scratch:
    """Room for the scaled squares of one operand, since new memory for them in every step costs more than the step."""

    rows: Float
    tokens: Float

    @staticmethod
    def like(operand: Operand) -> "_Scratch":
        return _Scratch(np.empty_like(operand.rows), np.empty_like(operand.tokens.squares))


@dataclass(frozen=True, eq=False)
class _State:
    """At one s: s² and 1 / s² by column, the summands of A [K] and B [R], and the column that sets each row's scale."""

    grown: Float
    shrunk: Float
    column_noise: Float
    row_noise: Float
    row_peaks: NDArray[np.intp]

    @staticmethod
    def of(logarithm: Factor, operand: Operand, scratch: _Scratch) -> "_State":
        by_column = np.where(operand.labels < 0, 0.0, logarithm[operand.labels])
        grown = np.exp(2 * by_column).astype(np.float32)
        row_noise, peaks = _largest(operand.rows, grown, scratch.rows)
        row_noise *= np.float32(operand.row_share / QMAX**2)
        shrunk = np.exp(-2 * by_column).astype(np.float32)
        return _State(grown, shrunk, grown * operand.column_power, row_noise, peaks)


def _largest(squares: Float, by_column: Float, room: Float) -> tuple[Float, NDArray[np.intp]]:
    """The largest scaled square of each row, and its column."""
    np.multiply(squares, by_column, out=room)
    columns = room.argmax(axis=1)
    return room[np.arange(len(room)), columns], columns


def _squared_steps(operand: Operand, state: _State, scratch: _Scratch) -> tuple[Float, NDArray[np.intp]]:
    """d² of each token's grid, and the column that sets it."""
    if operand.peaks is None:
        squares, columns = _largest(operand.tokens.squares, state.shrunk, scratch.tokens)
        return squares / np.float32(QMAX**2), columns
    scaled = np.square(operand.peaks) * state.shrunk
    column, count = int(scaled.argmax()), len(operand.tokens.squares)
    return np.full(count, scaled[column] / QMAX**2, np.float32), np.full(count, column)


def _add_gradient(slope: Factor, logarithm: Factor, operand: Operand, scratch: _Scratch) -> None:
    """Add ∂/∂log s of the objective for one operand."""
    state, squares = _State.of(logarithm, operand, scratch), operand.tokens.squares
    a, b = float(state.column_noise.sum()), float(state.row_noise.sum())
    step2, peak = _squared_steps(operand, state, scratch)
    q = squares @ state.shrunk
    inverse = operand.tokens.weights / np.maximum(step2 * a + b * q, _LEAST)
    on_steps = inverse * step2
    columns = state.column_noise * on_steps.sum()
    columns += np.bincount(state.row_peaks, state.row_noise, len(columns)) * float(inverse @ q)
    columns -= np.bincount(peak, on_steps, len(columns)) * a
    columns -= (inverse.astype(np.float32) @ squares) * state.shrunk * np.float32(b)
    used = operand.labels >= 0
    slope += 2 * np.bincount(operand.labels[used], columns[used], len(slope))
