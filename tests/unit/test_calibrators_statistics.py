"""Statistics files: what is written is read back, official readers agree, and damaged files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

from bismooth.calibrators.histogram import BINS
from bismooth.calibrators.statistics import Provenance, Statistics
from bismooth.calibrators.writer import StatisticsWriter
from bismooth.export.errors import BismoothError

PROVENANCE = Provenance("g" * 64, "", "d" * 64, windows=2, length=8, seed=3)
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def write(path: Path, *, histograms: bool = True) -> Path:
    with path.open("wb") as file:
        numbers = np.array([1, 5, 9])
        writer = StatisticsWriter(file, PROVENANCE, {"b/x": 4, "a": 2}, numbers, histograms=histograms)
        writer.rows("b/x", 1, ROWS[1:])
        writer.rows("b/x", 0, ROWS[:1])
        writer.absmax("b/x", ROWS.max(axis=0))
        if histograms:
            writer.histogram("b/x", np.arange(BINS))
    return path


def test_round_trip(tmp_path: Path) -> None:
    statistics = Statistics.load(write(tmp_path / "s.safetensors"))
    assert statistics.provenance == PROVENANCE
    assert statistics.names == ("b/x", "a")
    assert statistics.row_numbers.tolist() == [1, 5, 9]
    assert (statistics.rows("b/x") == ROWS).all()
    assert statistics.rows("a").shape == (3, 2)
    assert statistics.absmax("b/x").tolist() == [8, 9, 10, 11]
    histogram = statistics.histogram("b/x")
    assert (histogram.absmax, histogram.total) == (11, BINS * (BINS - 1) // 2)


def test_official_reader_agrees(tmp_path: Path) -> None:
    statistics = Statistics.load(write(tmp_path / "s.safetensors"))
    tensors = load_file(statistics.path)
    assert set(tensors) == set(statistics.entries)
    assert (tensors["b/x/rows"] == ROWS).all()
    assert tensors["a/outliers"].dtype == np.float32


def test_reading_one_tensor_holds_no_other(tmp_path: Path) -> None:
    statistics = Statistics.load(write(tmp_path / "s.safetensors"))
    rows = statistics.rows("b/x")
    assert rows.base is None or rows.base.nbytes == rows.nbytes
    statistics.path.unlink()
    assert (rows == ROWS).all()


def test_save_is_a_copy_in_one_step(tmp_path: Path) -> None:
    statistics = Statistics.load(write(tmp_path / "s.safetensors"))
    copy = statistics.save(tmp_path / "new" / "copy.safetensors")
    assert copy.path.read_bytes() == statistics.path.read_bytes()
    assert [path.name for path in copy.path.parent.iterdir()] == ["copy.safetensors"]


def test_other_graph(tmp_path: Path) -> None:
    statistics = Statistics.load(write(tmp_path / "s.safetensors"))
    statistics.check_graph("g" * 64)
    with pytest.raises(
        BismoothError, match=r"belong to another graph: expected the hash ffffffffffff…, got gggggggggggg…"
    ):
        statistics.check_graph("f" * 64)


def test_unknown_value(tmp_path: Path) -> None:
    statistics = Statistics.load(write(tmp_path / "s.safetensors"))
    with pytest.raises(BismoothError, match=r"has no statistics of value 'q/x'\. It has 2 values, first b/x, a\."):
        statistics.rows("q/x")


def rewrite(path: Path, **changes: Any) -> None:
    """Change header entries (``None`` drops one); the data stays."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8:end]) | changes
    text = json.dumps({key: value for key, value in header.items() if value is not None}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"__metadata__": None}, r"expected a file of format bismooth-statistics 1, got no format"),
        ({"__metadata__": {"format": "bismooth-statistics", "version": "9"}}, r"got bismooth-statistics 9\. Run 'bism"),
        (
            {"__metadata__": {"format": "bismooth-statistics", "version": "1"}},
            r"metadata are damaged \(KeyError\('graph_",
        ),
    ],
)
def test_file_of_another_kind(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "s.safetensors")
    rewrite(path, **changes)
    with pytest.raises(BismoothError, match=message):
        Statistics.load(path)


def test_metadata_that_are_no_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "s.safetensors")
    path.write_bytes(path.read_bytes().replace(b'"windows":"2"', b'"windows":"x"'))
    with pytest.raises(BismoothError, match=r"metadata are damaged \(ValueError"):
        Statistics.load(path)


def test_tensor_of_another_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "s.safetensors", histograms=False)
    path.write_bytes(path.read_bytes().replace(b'"shape":[3,4]', b'"shape":[4,3]'))
    with pytest.raises(BismoothError, match=r"b/x/rows: expected \('F32', \(3, 4\)\), got \('F32', \(4, 3\)\)"):
        Statistics.load(path)


def test_tensor_that_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "s.safetensors", histograms=False)
    path.write_bytes(path.read_bytes().replace(b'"a/outliers"', b'"a/anything"'))
    with pytest.raises(BismoothError, match=r"a/outliers: expected \('F32', \(16, 2\)\), got None"):
        Statistics.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"not a valid safetensors file"),
        (b"\xff" * 100, r"not a valid safetensors file"),
        (None, r"s\.safetensors: cannot be read \(No such file"),
    ],
)
def test_file_that_is_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "s.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BismoothError, match=message):
        Statistics.load(path)


def test_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "s.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BismoothError, match=r"not a valid safetensors file: its tensors end at"):
        Statistics.load(path)
