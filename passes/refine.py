"""Refine a smoothing factor by gradient descent on the output error that rounding is expected to cause.

Rounding to a grid of step d adds noise of variance d²/12 per element. With X' = X / s and W' = W · s, a token t of a
linear with N outputs and K inputs therefore has the expected squared output error

    e_t = (d_t² · A + B · q_t) / 12,    d_t = maxₖ|x'[t,k]| / 127        step of the token's row, or of the tensor
                                        A  = Σₖ s[k]² ‖W[:,k]‖²          what activation noise is multiplied with
                                        B  = Σₙ (maxₖ|W'[n,k]| / 127)²   steps of the weight's rows
                                        q_t = Σₖ x'[t,k]²                what weight noise is multiplied with

The mean over tokens of log(e_t / ‖y_t‖²) is minimised in log s; no matrix product is needed. Tokens with the largest
activations are a separate group with a weight of its own: they are few, but other tokens attend to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .fold import Factor
from .weights import QMAX

Float = NDArray[np.float32]

SAMPLED_ROWS = 192
"""Rows of a weight that stand for all in B."""

_RATE = 0.05
_DECAY = (0.9, 0.999)


@dataclass(frozen=True, eq=False)
class Tokens:
    """A group of tokens of one linear: |X| [T, K], ‖y_t‖² [T], and the group's weight in the objective."""

    magnitudes: Float
    power: Float
    weight: float


@dataclass(frozen=True, eq=False)
class Operand:
    """A linear behind the site.

    Attributes:
        labels: Which channel of the site each input column reads, −1 for none.
        tokens: Groups of tokens.
        column_power: ‖W[:,k]‖², [K].
        rows: |W| of sampled rows, [R, K].
        row_share: How many rows each sampled row stands for.
        peaks: maxₜ|x[t,k]| if the activation has one constant scale, [K]; None if each token has its own.
    """

    labels: NDArray[np.int32]
    tokens: Sequence[Tokens]
    column_power: Float
    rows: Float
    row_share: float
    peaks: Float | None


def sample(size: int, count: int) -> NDArray[np.intp]:
    """Sorted indices of ``count`` of ``size`` rows, of all if there are no more; the same ones for the same numbers.

    Drawn at random: rows at a regular distance would be the same few positions of every attention head.
    """
    if size <= count:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).choice(size, count, replace=False))


def sampled_rows(weight: Float) -> tuple[Float, float]:
    """|W| of sampled rows of [N, K], and how many rows each stands for."""
    rows = np.abs(weight[sample(len(weight), SAMPLED_ROWS)])
    return rows, weight.shape[0] / rows.shape[0]


def refine(start: Factor, operands: Sequence[Operand], free: NDArray[np.bool_], steps: int) -> Factor:
    """The factor [C] after ``steps`` steps of Adam (arXiv 1412.6980) with a rate that falls to 0; 1 where not free."""
    logarithm = np.log(start)
    first, second = np.zeros_like(logarithm), np.zeros_like(logarithm)
    for step in range(steps):
        slope = np.zeros_like(logarithm)
        for operand in operands:
            _add_gradient(slope, logarithm, operand)
        slope[~free] = 0.0
        first = _DECAY[0] * first + (1 - _DECAY[0]) * slope
        second = _DECAY[1] * second + (1 - _DECAY[1]) * slope**2
        direction = first / (1 - _DECAY[0] ** (step + 1))
        size = np.sqrt(second / (1 - _DECAY[1] ** (step + 1))) + 1e-8
        logarithm -= _RATE * (1 - step / steps) * direction / size
    return np.where(free, np.exp(logarithm).astype(np.float32).astype(np.float64), 1.0)


def expected_error(s: Factor, operands: Sequence[Operand]) -> float:
    """The objective: the weighted mean of log(e_t / ‖y_t‖²) over the groups of tokens of all linears."""
    loss = 0.0
    for operand in operands:
        state = _State.of(np.log(s), operand)
        a, b = float(state.column_noise.sum()), float(state.row_noise.sum())
        for group in operand.tokens:
            x = group.magnitudes / state.s
            step = _step(x, state.s, operand)[0]
            error = (step**2 * a + b * np.einsum("tk,tk->t", x, x)) / 12 / group.power
            loss += group.weight * float(np.log(error).mean())
    return loss


@dataclass(frozen=True, eq=False)
class _State:
    """At one s: s by column, the summands of A [K] and of B [R], and the column that sets each row's scale."""

    s: Float
    column_noise: Float
    row_noise: Float
    row_peaks: NDArray[np.intp]

    @staticmethod
    def of(logarithm: Factor, operand: Operand) -> "_State":
        s = np.exp(np.where(operand.labels < 0, 0.0, logarithm[operand.labels])).astype(np.float32)
        scaled = operand.rows * s
        peaks = scaled.argmax(axis=1)
        row_noise = (scaled[np.arange(len(scaled)), peaks] / np.float32(QMAX)) ** 2 * np.float32(operand.row_share)
        return _State(s, s**2 * operand.column_power, row_noise, peaks)


def _step(x: Float, s: Float, operand: Operand) -> tuple[Float, NDArray[np.intp]]:
    """Step of each token's grid, and the column that sets it."""
    if operand.peaks is None:
        columns = x.argmax(axis=1)
        return x[np.arange(len(x)), columns] / np.float32(QMAX), columns
    scaled = operand.peaks / s
    column = int(scaled.argmax())
    return np.full(len(x), scaled[column] / QMAX, np.float32), np.full(len(x), column)


def _add_gradient(slope: Factor, logarithm: Factor, operand: Operand) -> None:
    """Add ∂/∂log s of the objective for one linear."""
    state = _State.of(logarithm, operand)
    s, a, b = state.s, float(state.column_noise.sum()), float(state.row_noise.sum())
    columns = np.zeros(len(s))
    b_slope = 2 * np.bincount(state.row_peaks, state.row_noise, minlength=len(s))
    for group in operand.tokens:
        x = group.magnitudes / s
        step, peak = _step(x, s, operand)
        squares = x * x
        q, step2 = squares.sum(axis=1), step**2
        inverse = group.weight / len(x) / np.maximum(step2 * a + b * q, 1e-30)
        columns -= 2 * a * np.bincount(peak, inverse * step2, minlength=len(s))
        columns += 2 * state.column_noise * float(inverse @ step2)
        columns += b_slope * float(inverse @ q)
        columns -= 2 * b * (inverse @ squares)
    used = operand.labels >= 0
    np.add.at(slope, operand.labels[used], columns[used])
