"""Blocks and columns of a part of a file."""

from pathlib import Path

import numpy as np
import pytest

from bismooth.export import read_ahead
from bismooth.export.errors import BismoothError
from bismooth.export.read_ahead import read_blocks, read_columns, read_rows

CONTENT = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(CONTENT.tobytes())
    return tmp_path / "f"


@pytest.mark.parametrize("step", [1, 7, 100, 2000])
@pytest.mark.parametrize("window", [1, 50, 5000])
def test_blocks_follow_each_other(path: Path, monkeypatch: pytest.MonkeyPatch, step: int, window: int) -> None:
    monkeypatch.setattr(read_ahead, "WINDOW", window)
    blocks = [block.copy() for block in read_blocks(path, 11, 700, step)]
    np.testing.assert_array_equal(np.concatenate(blocks), CONTENT[11:711])
    assert {len(block) for block in blocks[:-1]} <= {step}


def test_the_system_is_asked_once_for_each_byte_and_for_no_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def note(_file: object, offset: int, size: int) -> None:
        asked.append((offset, size))

    monkeypatch.setattr(read_ahead, "WINDOW", 200)
    monkeypatch.setattr(read_ahead, "_will_need", note)
    blocks = read_blocks(path, 11, 700, 10)
    next(blocks)
    assert asked == [(11, 200), (211, 200)]
    assert len(list(blocks)) == 69
    assert asked == [(11, 200), (211, 200), (411, 200), (611, 100)]


def test_columns_of_a_matrix(path: Path) -> None:
    got = read_columns(path, 100, (9, 100), slice(30, 33))
    np.testing.assert_array_equal(got, CONTENT[100:].reshape(9, 100)[:, 30:33])


def test_rows_of_a_matrix(path: Path) -> None:
    rows = np.array([8, 0, 3])
    np.testing.assert_array_equal(read_rows(path, 100, 100, rows), CONTENT[100:].reshape(9, 100)[rows])


def test_a_file_that_ends_too_soon(path: Path) -> None:
    with pytest.raises(BismoothError, match=r"f: is cut off at byte 1000\. Get the whole file\."):
        list(read_blocks(path, 900, 200, 30))
    with pytest.raises(BismoothError, match=r"f: is cut off at byte 1000\."):
        read_columns(path, 900, (2, 100), slice(0, 10))
    with pytest.raises(BismoothError, match=r"f: is cut off at byte 1000\."):
        read_rows(path, 900, 100, np.array([1]))
