"""Hashes of files and arrays."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np

from bismooth.export.hashing import array_sha256, file_sha256


def test_a_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_an_array() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    first = array_sha256(array)
    assert first == hashlib.sha256(b"int32 2 3 " + array.tobytes()).hexdigest()
    assert first == array_sha256(np.asfortranarray(array)) == array_sha256(array.astype(">i4"))
    others = [array.T, array.reshape(3, 2), array.astype(np.int64), array + 1, array.view(np.uint32)]
    assert len({first, *map(array_sha256, others)}) == 6


def test_types_that_numpy_does_not_know() -> None:
    array = np.ones(2, ml_dtypes.bfloat16)
    assert array_sha256(array) == hashlib.sha256(b"bfloat16 2 " + array.tobytes()).hexdigest()
    assert array_sha256(np.array(1.0)) != array_sha256(np.array([1.0]))
