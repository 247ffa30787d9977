"""The bench of a bundle's start, on the smallest model."""

from __future__ import annotations

from pathlib import Path

import pytest

from bismooth.engines.bundle_manifest import write_manifest
from bismooth.tools.bench_bundle import CHECKS, main, measure
from tests.bundles import engine, manifest
from tests.language_model import language_model


def make(folder: Path) -> Path:
    place = folder / "engines/onnxruntime"
    place.mkdir(parents=True)
    language_model(place)
    files = {f"engines/onnxruntime/{path.name}": path.read_bytes() for path in place.iterdir()}
    write_manifest(folder, manifest(files, engines={"onnxruntime": engine("onnxruntime", files=[*files])}))
    return folder


def test_each_way_to_check_is_timed(tmp_path: Path) -> None:
    result = measure(make(tmp_path), rounds=1)
    assert [row["check"] for row in result.rows] == list(CHECKS)
    for row in result.rows:
        steps = [row[f"{step}_seconds"] for step in ("import", "load", "first_token")]
        assert 0 < steps[0] < steps[1] < steps[2]
        assert ("check_seconds" in row) == (row["check"] != "none")
        assert row["cpu_seconds"] > 0


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "not a bundle: there is no bundle.json" in capsys.readouterr().err
