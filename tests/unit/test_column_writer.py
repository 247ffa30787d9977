"""Columns of a tensor, from rows of its transpose: whatever the sizes, the file is the same."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bismooth.export import column_writer
from bismooth.export.column_writer import ColumnWriter
from bismooth.export.placed_tensors import PlacedTensors
from bismooth.export.safetensors_file import read_tensor


@pytest.mark.parametrize("dtype", [np.int8, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(5, 300), (2, 3, 300), (7, 1), (1, 129)])
@pytest.mark.parametrize("step", [1, 7, 128, 300])
@pytest.mark.parametrize("most", [1, 700, 1 << 20])
def test_rows_become_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type, shape: tuple[int, ...], step: int, most: int
) -> None:
    monkeypatch.setattr(column_writer, "MOST", most)
    kind, n = np.dtype(dtype), shape[-1]
    rows = np.arange(n * math.prod(shape[:-1])).reshape(n, -1).astype(np.int8).astype(kind)
    placed = PlacedTensors.create(tmp_path / "w", [("before", kind, (3,)), ("w", kind, shape)])
    with placed.writing(["w"]) as writer:
        columns = ColumnWriter(writer, "w", shape, kind)
        for start in range(0, n, step):
            columns.add(rows[start : start + step])
        columns.close()
    got = read_tensor(tmp_path / "w", placed.entries["w"])
    np.testing.assert_array_equal(got.reshape(-1, n), rows.T)
