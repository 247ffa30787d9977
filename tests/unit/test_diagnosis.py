"""Weights that break per-channel INT8 are found, with their channels; healthy ones are not."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.export.errors import BismoothError
from bismooth.passes.diagnosis import Diagnosis, diagnose_weight, output_errors
from bismooth.passes.linears import Linear
from bismooth.passes.refine import sample
from bismooth.passes.walls import AT_RISK, SAMPLED_ROWS
from bismooth.passes.weight_scan import CELLS, WeightScan, scan

Float = NDArray[np.float32]
N, K = 320, 512


def linear(k: int = K, n: int = N) -> Linear:
    return Linear("fc", "fc/MatMul", "x", "y", "fc.weight", "NK", k, n, None, False, ())


def scanned(linear: Linear, weight: NDArray[Any]) -> WeightScan:
    flat = weight.reshape(-1)
    return scan(linear, lambda count: (flat[start : start + count] for start in range(0, flat.size, count)))


def look(linear: Linear, weight: NDArray[Any]) -> Diagnosis:
    return diagnose_weight(linear, scanned(linear, weight))


def weight(seed: int, k: int = K, n: int = N) -> Float:
    """Normal numbers with columns of uneven size, as in trained models."""
    random = np.random.default_rng(seed)
    return random.standard_normal((n, k), np.float32) * np.exp(0.3 * random.standard_normal(k)).astype(np.float32)


def planted(seed: int, factor: float, count: int) -> tuple[Float, list[int]]:
    w = weight(seed)
    peaks = np.abs(w).max(axis=0)
    random = np.random.default_rng(seed)
    channels = np.sort(random.choice(np.flatnonzero(peaks >= np.median(peaks)), count, replace=False))
    w[:, channels] *= np.float32(factor)
    return w, channels.tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("factor", "count"), [(40, 1), (40, 4), (100, 4), (300, 8)])
def test_planted_channels_are_found_exactly(seed: int, factor: float, count: int) -> None:
    w, channels = planted(seed, factor, count)
    found = look(linear(), w)
    assert found.flagged
    assert found.channels == tuple(channels)
    assert found.lost_bits > 2 * AT_RISK
    assert found.absmax == np.abs(w).max()
    assert found.ratio == pytest.approx(np.abs(w).max(axis=0).max() / np.median(np.abs(w).max(axis=0)))


@pytest.mark.parametrize("kind", ["normal", "student 5", "student 4", "uneven", "constant", "zero row", "zero column"])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (48, 768), (768, 3072)])
def test_healthy_weights_are_not_flagged(kind: str, n: int, k: int) -> None:
    random = np.random.default_rng(3)
    w = weight(3, k, n)
    if kind == "normal":
        w = random.standard_normal((n, k), np.float32)
    elif kind.startswith("student"):
        w = random.standard_t(float(kind.split()[1]), (n, k)).astype(np.float32)
    elif kind == "constant":
        w[:] = 1
    elif kind == "zero row":
        w[5] = 0
    elif kind == "zero column":
        w[:, 5] = 0
    found = look(linear(k, n), w)
    assert (found.flagged, found.channels) == (False, ())
    assert found.errors == found.rest_errors


def test_figures_against_float64() -> None:
    w, channels = planted(1, 100, 4)
    found = look(linear(n=64), w[:64])  # few enough for errors to be of all rows
    exact = w[:64].astype(np.float64)
    assert found.kurtosis == pytest.approx((exact**4).mean() / (exact**2).mean() ** 2, rel=1e-4)
    rest = np.setdiff1d(np.arange(K), channels)

    def errors(rounded: NDArray[np.float64], columns: Sequence[int] | NDArray[np.intp]) -> float:
        return float(np.linalg.norm((exact - rounded)[:, columns]) / np.linalg.norm(exact[:, columns]))

    scale = np.abs(exact).max(axis=1, keepdims=True) / 127
    per_channel = np.rint(exact / scale) * scale
    assert found.errors["per_channel"] == pytest.approx(errors(per_channel, range(K)), rel=1e-3)
    assert found.rest_errors["per_channel"] == pytest.approx(errors(per_channel, rest), rel=1e-3)
    blocks = exact.reshape(64, -1, 64)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / 127
    grouped = (np.rint(blocks / scales) * scales).reshape(64, K)
    assert found.rest_errors["per_group_64"] == pytest.approx(errors(grouped, rest), rel=1e-3)
    parted = np.empty_like(exact)
    for part in (rest, channels):
        steps = np.abs(exact[:, part]).max(axis=1, keepdims=True) / 127
        parted[:, part] = np.rint(exact[:, part] / steps * (254 if part is channels else 1)) * steps
    parted[:, channels] /= 254  # two INT8 digits
    assert found.rest_errors["per_magnitude"] == pytest.approx(errors(parted, rest), rel=1e-3)
    assert found.errors["per_magnitude"] == pytest.approx(errors(parted, range(K)), rel=1e-3)
    healthy = look(linear(), weight(1))
    assert found.rest_errors["bismoothed"] == pytest.approx(healthy.errors["per_channel"], rel=0.1)
    assert found.rest_errors["per_channel"] > 20 * found.rest_errors["bismoothed"]


def test_layout_and_type_do_not_matter() -> None:
    w, channels = planted(2, 64, 3)
    narrow = w.astype(ml_dtypes.bfloat16)
    expected = look(linear(), narrow)
    assert expected.channels == tuple(channels)
    stored = look(replace(linear(), layout="KN"), np.ascontiguousarray(narrow.T))
    assert stored.kurtosis == pytest.approx(expected.kurtosis, rel=1e-5)  # summed in another order
    assert replace(stored, kurtosis=expected.kurtosis).to_json() == expected.to_json()
    assert look(linear(), narrow.astype(np.float32)).to_json() == expected.to_json()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_weight_is_named(broken: float) -> None:
    w = weight(0)
    w[7, 3] = broken
    with pytest.raises(BismoothError, match=r"fc\.weight: the weight holds NaN or infinity in row 7\."):
        look(linear(), w)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_magnitude_of_a_weight_does_not_matter(scale: float) -> None:
    w, _ = planted(0, 100, 4)
    expected, found = (look(linear(), x) for x in (w, (w * scale).astype(np.float32)))
    assert found.channels == expected.channels
    assert found.kurtosis == pytest.approx(expected.kurtosis, rel=1e-4)
    assert found.rest_errors == pytest.approx(expected.rest_errors, rel=1e-3)


def test_channels_of_zeros_count_in_no_median() -> None:
    w, _ = planted(0, 100, 4)
    peaks = np.abs(w).max(axis=0)
    w[:, np.argsort(peaks)[:300]] = 0
    found = look(linear(), w)
    assert found.ratio == pytest.approx(np.sort(peaks)[-1] / np.median(np.sort(peaks)[300:]))
    assert found.rest_errors["bismoothed"] < 0.02


def test_zeros() -> None:
    found = look(linear(), np.zeros((N, K), np.float32))
    assert (found.absmax, found.ratio, found.kurtosis, found.lost_bits, found.flagged) == (0, 0, 0, 0, False)
    assert set(found.errors.values()) == {0.0}


@pytest.mark.parametrize("layout", ["NK", "KN"])
@pytest.mark.parametrize(("n", "k"), [(3, 5), (96, 97), (200, 4096), (1111, 300), (40000, 16)])
def test_a_scan_against_the_whole_weight(n: int, k: int, layout: Literal["NK", "KN"]) -> None:
    """Of fewer rows than the outline has cells, and of so many that several blocks make one of its rows."""
    w = weight(5, k, n)
    seen = scanned(replace(linear(k, n), layout=layout), w if layout == "NK" else np.ascontiguousarray(w.T))
    magnitudes = np.abs(w)
    np.testing.assert_array_equal(seen.peaks, magnitudes.max(axis=0))
    rows = magnitudes[sample(n, SAMPLED_ROWS)]
    np.testing.assert_array_equal(np.abs(seen.rows), rows)
    assert seen.nbytes == w.nbytes
    tall, wide = (-(-size // cells) for size, cells in zip(w.shape, seen.outline.shape, strict=True))
    assert max(seen.outline.shape) <= CELLS
    pooled = [[magnitudes[i : i + tall, j : j + wide].max() for j in range(0, k, wide)] for i in range(0, n, tall)]
    np.testing.assert_array_equal(seen.outline, pooled)


@pytest.mark.parametrize("k", [64, 512])
def test_output_errors_against_float64(k: int) -> None:
    """Walls in W and as much smaller activations: rounded per channel, bi-smoothed, and in groups."""
    random = np.random.default_rng(0)
    w, x = weight(1, k, 64), random.standard_normal((40, k), np.float32)
    w[:, [3, 50]] *= 100
    x[:, [3, 50]] /= 100
    found = output_errors(scanned(linear(k, 64), w), x, np.abs(x).max(axis=0))

    def rounded(values: NDArray[np.float64], group: int) -> NDArray[np.float64]:
        parts = values.reshape(len(values), -1, group)
        scale = np.abs(parts).max(axis=2, keepdims=True) / 127
        return (np.rint(parts / scale) * scale).reshape(values.shape)

    exact = x.astype(np.float64) @ w.T.astype(np.float64)

    def error(s: NDArray[np.float64], group: int = k) -> float:
        got = rounded(x / s, group) @ rounded(w * s, group).T
        return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))

    balanced = np.abs(x).max(axis=0) ** 0.5 / np.abs(w).max(axis=0) ** 0.5
    assert found["per_channel"] == pytest.approx(error(np.ones(k)), rel=1e-2)
    assert found["bismoothed"] <= error(balanced.astype(np.float64)) * 1.01
    assert found["bismoothed"] < found["per_channel"] / 10
    parts = [np.array([3, 50]), np.delete(np.arange(k), [3, 50])]
    doubles = x.astype(np.float64), w.astype(np.float64)
    got = sum(rounded(doubles[0][:, part], len(part)) @ rounded(doubles[1][:, part], len(part)).T for part in parts)
    assert found["per_magnitude"] == pytest.approx(np.linalg.norm(got - exact) / np.linalg.norm(exact), rel=1e-2)
    assert ("per_group_64" in found) == (k > 64)
    if k > 64:
        assert found["per_group_64"] == pytest.approx(error(np.ones(k), 64), rel=1e-2)


def test_outputs_of_zeros_have_no_error() -> None:
    seen = scanned(linear(), weight(0))
    assert set(output_errors(seen, np.zeros((4, K), np.float32), np.zeros(K, np.float32)).values()) == {0.0}
