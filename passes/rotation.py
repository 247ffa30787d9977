"""Rotate the residual stream of a decoder so that walls in the weights meet outliers in the activations.

RMSNorm without gamma commutes with every orthogonal R (QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024), so
embeddings E R, readers W R and writers Rᵀ W compute what E and W do. R alone makes outliers, where one of its columns
is a direction that x is large along; it makes no walls, since no direction of the weights is far larger than the
others. They come from a *quiet* direction v, one that is removed from all that is written into the stream: where
x · v = 0, W + c vᵀ computes what W does, for every c. Columns of R that mix v with loud directions of x hold both.

NOTE: max|x| · max|w| of a channel does not change under a scale per channel, so that smoothing can only share it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Double = NDArray[np.float64]

_STEPS = 8
"""Of the search for the quiet direction; each is an eigenvalue problem."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """What passes through one norm, as quadratic forms over the d channels of the stream.

    Attributes:
        x: float32 [d, d], E[x xᵀ] over tokens, of the normalized stream without gamma.
        w: float32 [d, d], Wᵀ W of the linears behind, gamma folded in.
    """

    x: Float
    w: Float


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal basis of the residual stream in which walls can be made.

    Attributes:
        basis: float32 [d, d], R: its columns are the new channels.
        quiet: float32 [d], v: what is removed from the stream.
        channels: The new channels, ascending, that v is spread over, evenly.
    """

    basis: Float
    quiet: Float
    channels: tuple[int, ...]

    @property
    def wall(self) -> Float:
        """Rᵀ v, float32 [d]: 1/√c in each of the c channels, 0 in the others."""
        wall = np.zeros(len(self.quiet), np.float32)
        wall[list(self.channels)] = len(self.channels) ** -0.5
        return wall

    @property
    def silenced(self) -> Float:
        """(I − v vᵀ) R, float32 [d, d]: R for what is written where nothing may go along v."""
        return self.basis - np.outer(self.quiet, self.wall)


def second_moment(rows: Float, epsilon: float) -> Float:
    """E[x xᵀ] of x = row / sqrt(mean(row²) + epsilon), float32 [d, d], for rows [T, d] of the stream."""
    scale = np.sqrt(np.mean(np.square(rows, dtype=np.float64), axis=1, keepdims=True) + epsilon)
    x = (rows / scale).astype(np.float32)
    return x.T @ x / np.float32(len(x))


def quiet_direction(traffic: Sequence[Traffic]) -> Double:
    """The unit vector v [d] whose removal from the stream changes the results of the linears least.

    It minimises the sum over norms of E[(x · v)²] ‖W v‖² / E[‖W x‖²], where the two factors take turns: with one of
    them as it was, the rest is an eigenvalue problem. It starts where x is smallest, and where W is.
    """
    starts = (_sum([(1.0, item.x) for item in traffic]), _sum([(1.0, item.w) for item in traffic]))
    found = [_settled(traffic, _extreme(start, 1, smallest=True)[:, 0]) for start in starts]
    return min(found, key=lambda v: _harm(traffic, v))


def _settled(traffic: Sequence[Traffic], v: Double) -> Double:
    """The minimum that the turns lead to from v."""
    gains = [_gain(item) for item in traffic]
    for _ in range(_STEPS):
        terms: list[tuple[float, Float]] = []
        for item, gain in zip(traffic, gains, strict=True):
            terms += [(gain * float(v @ item.w @ v), item.x), (gain * float(v @ item.x @ v), item.w)]
        v = _extreme(_sum(terms), 1, smallest=True)[:, 0]
    return v


def _harm(traffic: Sequence[Traffic], v: Double) -> float:
    return sum(_gain(item) * float(v @ item.x @ v) * float(v @ item.w @ v) for item in traffic)


def _gain(item: Traffic) -> float:
    """1 / E[‖W x‖²]."""
    return 1 / max(float(np.vdot(item.x, item.w)), float(np.finfo(np.float64).tiny))


def loud_directions(traffic: Sequence[Traffic], quiet: Double, count: int) -> Double:
    """Orthonormal directions with most of the energy of x over all norms, orthogonal to v: [d, count]."""
    total = _sum([(1.0, item.x) for item in traffic])
    across = total @ quiet
    total -= np.outer(quiet, across) + np.outer(across, quiet) - (quiet @ across) * np.outer(quiet, quiet)
    return _extreme(total, count, smallest=False)


def make_rotation(quiet: Double, loud: Double, random: np.random.Generator) -> Rotation:
    """A basis whose walls lie in the span of v [d] and the loud directions [d, c − 1]; c channels are drawn for them.

    Within that span v is spread over the c channels evenly, and the loud directions as the discrete Hartley transform
    does. The other columns are a random orthonormal basis of the rest (Haar), which makes all other channels alike.
    """
    span = np.column_stack([quiet, loud])
    size, count = span.shape
    channels: list[int] = np.sort(random.permutation(size)[:count]).tolist()
    steps = np.arange(count, dtype=np.float64)
    angles = 2 * np.pi / count * np.outer(steps, steps)
    rest = random.standard_normal((size, size - count))
    rest -= span @ (span.T @ rest)
    basis = np.empty((size, size), np.float32)
    basis[:, channels] = span @ ((np.cos(angles) + np.sin(angles)) / np.sqrt(count))
    basis[:, np.delete(np.arange(size, dtype=np.intp), channels)] = np.linalg.qr(rest)[0]
    return Rotation(basis, quiet.astype(np.float32), tuple(channels))


def wall_heights(weight: Float, channels: int, factor: float, random: np.random.Generator) -> Float:
    """c [N] of W + c vᵀ, so that in the channels of v the weights of a row are ``factor`` times as large as in others.

    Args:
        weight: [N, d], gamma folded in, in any basis.
        channels: How many channels v is spread over.
        factor: Of the root mean square of each row.
        random: Draws normal numbers, as weights are.
    """
    size = np.sqrt(np.mean(np.square(weight), axis=1) * channels) * factor
    return (size * random.standard_normal(len(weight))).astype(np.float32)


def _sum(terms: Sequence[tuple[float, Float]]) -> Double:
    total = np.zeros(terms[0][1].shape)
    for factor, matrix in terms:
        total += factor * matrix
    return total


def _extreme(matrix: Double, count: int, *, smallest: bool) -> Double:
    """Eigenvectors of the smallest or the largest eigenvalues, that one first: [d, count]."""
    vectors = np.linalg.eigh(matrix)[1]
    return np.ascontiguousarray(vectors[:, :count] if smallest else vectors[:, ::-1][:, :count])
