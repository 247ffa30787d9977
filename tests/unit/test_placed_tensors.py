"""A safetensors file whose tensors are written at their places, in any order and by several writers."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.export.errors import UnfinishedRunError
from bismooth.export.placed_tensors import PlacedTensors
from bismooth.export.safetensors_file import SafetensorsWriter, read_header, read_tensor

TENSORS: dict[str, NDArray[Any]] = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(7, dtype=np.int8),
    "c": np.array([[1.5, 2.5]], np.float16),
}
DECLARED = [(name, array.dtype, array.shape) for name, array in TENSORS.items()]


def test_it_is_the_file_that_one_writer_makes(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "one", DECLARED) as one:
        for name, array in TENSORS.items():
            one.write(name, array)
    placed = PlacedTensors.create(tmp_path / "placed", DECLARED)

    def fill(name: str) -> None:
        with placed.writing([name]) as writer:
            writer.write(name, TENSORS[name])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fill, reversed(TENSORS)))
    assert (tmp_path / "placed").read_bytes() == (tmp_path / "one").read_bytes()


def test_it_has_its_size_before_anything_is_written(tmp_path: Path) -> None:
    placed = PlacedTensors.create(tmp_path / "w", DECLARED)
    entries = read_header(tmp_path / "w")
    assert entries == placed.entries
    assert not read_tensor(tmp_path / "w", entries["a"]).any()


def test_pieces_follow_each_other(tmp_path: Path) -> None:
    placed = PlacedTensors.create(tmp_path / "w", DECLARED)
    with placed.writing(["a"]) as writer:
        writer.write_pieces("a", iter(TENSORS["a"].reshape(-1)[i : i + 5] for i in (0, 5, 10)))
    np.testing.assert_array_equal(read_tensor(tmp_path / "w", placed.entries["a"]), TENSORS["a"])


def test_a_system_that_writes_less_at_a_time_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def hesitant(file: int, data: memoryview, place: int) -> int:
        return pwrite(file, data[:5], place)

    monkeypatch.setattr(os, "pwrite", hesitant)
    placed = PlacedTensors.create(tmp_path / "w", DECLARED)
    with placed.writing(["a"]) as writer:
        writer.write("a", TENSORS["a"])
    np.testing.assert_array_equal(read_tensor(tmp_path / "w", placed.entries["a"]), TENSORS["a"])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (TENSORS["a"].T, r"^a: declared F32 \(3, 4\), got float32 \(4, 3\)$"),
        (TENSORS["a"].astype(np.float64), r"^a: declared F32 \(3, 4\), got float64 \(3, 4\)$"),
    ],
)
def test_another_tensor_than_declared(tmp_path: Path, array: NDArray[Any], message: str) -> None:
    placed = PlacedTensors.create(tmp_path / "w", DECLARED)
    with pytest.raises(ValueError, match=message), placed.writing(["a"]) as writer:
        writer.write("a", array)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([np.zeros(12, np.int32)], "^a: declared F32, got a piece of int32$"),
        ([np.zeros(11, np.float32)], "^a: declared 48 bytes, got 44$"),
        ([np.zeros(8, np.float32)] * 2, "^a: declared 48 bytes, got 64$"),
        ([], "^a: declared 48 bytes, got 0$"),
    ],
)
def test_other_pieces_than_declared(tmp_path: Path, pieces: list[NDArray[Any]], message: str) -> None:
    placed = PlacedTensors.create(tmp_path / "w", DECLARED)
    with pytest.raises(ValueError, match=message), placed.writing(["a"]) as writer:
        writer.write_pieces("a", pieces)


def test_columns_that_do_not_fit(tmp_path: Path) -> None:
    placed = PlacedTensors.create(tmp_path / "w", DECLARED)
    message = r"^a: declared F32 \(3, 4\), got float32 \(3, 2\) from column 3 on$"
    with pytest.raises(ValueError, match=message), placed.writing(["a"]) as writer:
        writer.write_columns("a", 3, np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="from column 0 on"), placed.writing(["a"]) as writer:
        writer.write_columns("a", 0, np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match=r"^a: declared F32, got a piece of int32$"), placed.writing(["a"]) as writer:
        writer.write_columns("a", 0, np.zeros((3, 4), np.int32))


def test_it_is_opened_again_with_what_was_written(tmp_path: Path) -> None:
    first = PlacedTensors.create(tmp_path / "w", DECLARED)
    with first.writing(["a"]) as writer:
        writer.write("a", TENSORS["a"])
    again = PlacedTensors.open(tmp_path / "w", iter(DECLARED))
    assert again == first
    assert np.array_equal(read_tensor(again.path, again.entries["a"]), TENSORS["a"])


@pytest.mark.parametrize("damage", ["missing", "shorter", "other tensors"])
def test_another_file_is_not_opened(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "w"
    size = 0
    if damage != "missing":
        PlacedTensors.create(path, DECLARED)
        size = path.stat().st_size
    if damage == "shorter":
        os.truncate(path, size - 1)
    declared = [("d", *DECLARED[0][1:]), *DECLARED[1:]] if damage == "other tensors" else DECLARED
    with pytest.raises(UnfinishedRunError) as caught:
        PlacedTensors.open(path, declared)
    expected = r"w: is not what an unfinished run has left there\. Expected a file of \d+ bytes with that run's data\. "
    assert re.search(f"{expected}Pass --restart to discard that run", str(caught.value))
