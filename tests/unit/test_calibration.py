"""What quantization asks of statistics, answered from a file."""

from pathlib import Path

import numpy as np
import pytest

from bismooth.calibrators.calibration import StatisticsCalibration
from bismooth.calibrators.histogram import Histogram
from bismooth.calibrators.ranges import threshold
from bismooth.calibrators.run import calibrate
from bismooth.calibrators.statistics import Statistics
from bismooth.engines.onnxruntime import Session
from bismooth.export.errors import BismoothError
from bismooth.passes.spec import RangeMethod, StaticActivation
from tests.graphs import DecoderShape, decoder
from tests.quantizing import Array

SHAPE = DecoderShape(layers=1)
METHODS = [
    StaticActivation(RangeMethod.MINMAX),
    StaticActivation(RangeMethod.PERCENTILE, 99.0),
    StaticActivation(RangeMethod.ENTROPY),
    StaticActivation(RangeMethod.MSE),
]


def _calibrated(folder: Path, *, histograms: bool = True) -> tuple[Statistics, str, Array]:
    """Statistics of the first norm's output on 6 windows, and that output [T, K] itself."""
    builder = decoder(SHAPE)
    path = builder.save(folder)
    value = next(node.output[0] for node in builder.nodes if node.op_type == "RMSNormalization")
    ids = np.random.default_rng(0).integers(0, SHAPE.vocab, (6, 12))
    statistics = calibrate(
        folder, {value: SHAPE.hidden}, ids, folder / "s.safetensors", rows=200, histograms=histograms
    )
    with Session(path, mode="plain", values=[value]) as session:
        found = session.run(session.token_feeds(ids), [value])[value]
    return statistics, value, found.reshape(-1, found.shape[-1])


def test_maxima_rows_and_outliers_are_those_of_the_file(tmp_path: Path) -> None:
    statistics, value, rows = _calibrated(tmp_path)
    calibration = StatisticsCalibration(statistics)
    np.testing.assert_allclose(calibration.absmax(value), np.abs(rows).max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(calibration.rows(value), rows, rtol=1e-4, atol=1e-5)  # 72 tokens: all are kept
    peaks = np.abs(calibration.outliers(value)).max(axis=1)
    np.testing.assert_allclose(peaks, np.sort(np.abs(rows).max(axis=1))[::-1][:16], rtol=1e-5)


@pytest.mark.parametrize("activation", METHODS, ids=[str(method.method) for method in METHODS])
def test_the_range_is_that_of_the_whole_distribution(tmp_path: Path, activation: StaticActivation) -> None:
    statistics, value, rows = _calibrated(tmp_path)
    limit = StatisticsCalibration(statistics).limit(value, activation, None)
    assert limit == pytest.approx(threshold(Histogram.of(rows), activation), rel=0.02)
    assert 0 < limit <= np.abs(rows).max() * (1 + 1e-5)


@pytest.mark.parametrize("activation", METHODS, ids=[str(method.method) for method in METHODS])
def test_after_a_division_the_range_is_that_of_the_divided_values(tmp_path: Path, activation: StaticActivation) -> None:
    statistics, value, rows = _calibrated(tmp_path)
    divisor = np.linspace(0.2, 5, rows.shape[1], dtype=np.float32)
    limit = StatisticsCalibration(statistics).limit(value, activation, divisor)
    assert limit == pytest.approx(threshold(Histogram.of(rows / divisor), activation), rel=0.02)


@pytest.mark.parametrize("activation", METHODS, ids=[str(method.method) for method in METHODS])
@pytest.mark.parametrize("divided", [False, True])
def test_the_range_of_some_channels_is_that_of_their_values(
    tmp_path: Path, activation: StaticActivation, divided: bool
) -> None:
    statistics, value, rows = _calibrated(tmp_path)
    channels = np.argsort(np.abs(rows).max(axis=0))[: rows.shape[1] // 2]  # not the largest ones
    divisor = np.linspace(0.2, 5, rows.shape[1], dtype=np.float32) if divided else None
    limit = StatisticsCalibration(statistics).limit(value, activation, divisor, channels)
    expected = (rows if divisor is None else rows / divisor)[:, channels]
    assert limit == pytest.approx(threshold(Histogram.of(expected), activation), rel=0.02)


def test_percentile_clips_and_minmax_does_not(tmp_path: Path) -> None:
    statistics, value, rows = _calibrated(tmp_path)
    calibration = StatisticsCalibration(statistics)
    assert calibration.limit(value, METHODS[0], None) == pytest.approx(float(np.abs(rows).max()), rel=1e-5)
    share = float((np.abs(rows) <= calibration.limit(value, METHODS[1], None)).mean())
    assert share == pytest.approx(0.99, abs=0.004)


def test_minmax_needs_no_histogram_and_the_others_say_so(tmp_path: Path) -> None:
    statistics, value, _ = _calibrated(tmp_path, histograms=False)
    calibration = StatisticsCalibration(statistics)
    assert calibration.limit(value, METHODS[0], None) > 0
    with pytest.raises(BismoothError, match=r"has no histograms\. Expected some\. Run 'bismooth calibrate' with"):
        calibration.limit(value, METHODS[3], None)
