"""A disk that is full in the middle: the error says so, nothing is lost, and the same command goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from bismooth.export.errors import BismoothError
from bismooth.export.state import read_units, state_folder
from bismooth.passes import resuming
from bismooth.passes.gates import Hop
from bismooth.tools import stages
from tests.artifacts import names
from tests.tiny import make_tiny

SIZE = 24 << 20
STEP = 160 << 10


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    """A file system of :data:`SIZE` bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def leave_free(disk: Path, size: int) -> None:
    """Fill the disk but for so many bytes."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - size)


def contents(folder: Path) -> dict[str, Any]:
    """All files but the manifest, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "bismooth.json"}


@pytest.mark.timeout(600)
def test_a_disk_that_is_full(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "COLLECT_SECONDS", 0)
    tiny = make_tiny(tmp_path, num_hidden_layers=4, hidden_size=64, intermediate_size=256)
    artifact = stages.export(tiny.source, tmp_path / "float").artifact
    expected = contents(stages.quantize(artifact, "w8a8-mixed", tmp_path / "q", data_free=True).artifact)
    output, state = disk / "q", state_folder(disk / "q")
    seen: list[int] = []
    for step in range(1, 100):
        leave_free(disk, step * STEP)
        try:
            stages.quantize(artifact, "w8a8-mixed", output, data_free=True)
            break
        except BismoothError as error:
            message = "the disk is full. Free some space and run the command again."
            assert message in str(error)
            kept = any("the same command goes on from there." in note for note in getattr(error, "__notes__", ()))
            assert kept == state.exists()
            assert names(disk) == {"ballast"} | ({state.name} if kept else set())
            seen.append(len(read_units(state)[0]) if kept else 0)
    assert contents(output) == expected
    assert names(disk) == {"ballast", "q"}
    assert seen == sorted(seen), "work was lost"
    assert len(set(seen)) > 2


@pytest.mark.timeout(600)
def test_verify_on_a_disk_that_is_full(disk: Path, tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, num_hidden_layers=2, hidden_size=64, intermediate_size=256)
    artifact = stages.export(tiny.source, tmp_path / "float").artifact
    quantized = stages.quantize(artifact, "w8a8", tmp_path / "q", data_free=True).artifact
    options: dict[str, Any] = {"windows": 3, "length": 24, "hops": [Hop.REFERENCE, Hop.DECODE]}
    expected = stages.verify(quantized, [str(tiny.text)], output=tmp_path / "report.json", **options)
    result, free = None, 0
    while result is None:
        leave_free(disk, free)
        try:
            result = stages.verify(quantized, [str(tiny.text)], output=disk / "report.json", **options)
        except BismoothError as error:
            assert "the disk is full" in str(error)
            free += 16 << 10
    assert free > 48 << 10
    assert names(disk) == {"ballast", "report.json"}
    assert result.layers == expected.layers
    assert [hop.metrics for hop in result.hops] == [hop.metrics for hop in expected.hops]
