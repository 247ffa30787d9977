"""What differs is named: all of it, first what explains the rest."""

from __future__ import annotations

from typing import Any

import pytest

from bismooth.export.difference import difference

TEXT = {"data_sha256": "e19a", "windows": 4, "length": 16, "seed": 0}
MODEL = {"weights": "00", "source": {"path": "a"}, "files": {"w": {"size": 1, "mtime_ns": 1}}}


@pytest.mark.parametrize(
    ("name", "found", "wanted", "expected"),
    [
        ("", TEXT, dict(TEXT), None),
        ("seed", 1, 1, None),
        ("blocks", (1, 2), [1], "blocks is [1, 2], and would be [1]"),
        ("", {"seed": 1}, {"rows": 2}, "seed is 1, and would be not set; rows is not set, and would be 2"),
        ("recipe", {"a": {"b": 1, "c": 1}}, {"a": {"b": 2, "c": 2}}, "recipe.a.b is 1, and would be 2"),
        ("", TEXT, TEXT | {"data_sha256": "26da"}, 'data_sha256 is "e19a", and would be "26da"'),
        ("", TEXT, TEXT | {"data_sha256": "26da", "windows": 5}, "windows is 4, and would be 5"),
        (
            "calibrate",
            TEXT,
            TEXT | {"data_sha256": "26da", "windows": 5, "length": 17},
            "calibrate.windows is 4, and would be 5; calibrate.length is 16, and would be 17",
        ),
        (
            "",
            TEXT | {"rows": 1},
            TEXT | {"data_sha256": "26da", "rows": 2},
            'data_sha256 is "e19a", and would be "26da"; rows is 1, and would be 2',
        ),
        ("", {"s": TEXT}, {"s": TEXT | {"data_sha256": "26da", "windows": 5}}, "s.windows is 4, and would be 5"),
        ("source", {"path": "a", "files": 1}, {"path": "b", "files": 1}, 'source.path is "a", and would be "b"'),
        (
            "",
            {"source": {"path": "a", "files": 1}},
            {"source": {"path": "b", "files": 2}},
            'source.path is "a", and would be "b"',
        ),
        ("", MODEL, MODEL | {"weights": "11"}, 'weights is "00", and would be "11"'),
        (
            "",
            {"recipe": 1} | MODEL,
            {"recipe": 2, "weights": "11", "source": {"path": "b"}, "files": {"w": {"size": 2, "mtime_ns": 2}}},
            'source.path is "a", and would be "b"; files.w.size is 1, and would be 2; recipe is 1, and would be 2',
        ),
    ],
)
def test_what_differs(name: str, found: Any, wanted: Any, expected: str | None) -> None:
    assert difference(name, found, wanted) == expected
