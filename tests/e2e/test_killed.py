"""A run that is killed at any moment goes on, and what it makes is what an uninterrupted one makes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import SIZES, make_tiny

ROOT = Path(__file__).parents[2]
KILLS, VERIFY_KILLS = 20, 8


def bismooth(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "bismooth", *map(str, words), "--quiet"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float artifact of several blocks, with statistics."""
    root = tmp_path_factory.mktemp("killed")
    tiny = make_tiny(root, num_hidden_layers=8)
    bismooth("export", tiny.source, "-o", root / "float")
    bismooth("calibrate", root / "float", "--data", tiny.text, *SIZES)
    return root / "float"


def killed(kills: int, output: Path, *command: str | Path) -> list[dict[str, Any]]:
    """Runs of ``tests/killed.py``, the last one left alone."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/killed.py", str(kills), output, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    runs: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(run["status"] < 0 for run in runs) == kills
    assert {run["status"] for run in runs} <= {0, -9}, [run["errors"] for run in runs if run["status"] > 0]
    assert runs[-1]["differing"] == []
    assert all(run["differing"] == [] for run in runs if run["differing"] is not None)
    return runs


def continued(runs: list[dict[str, Any]]) -> int:
    return sum(bool(re.search(r"continues an earlier run: \d+ units are there", run["errors"])) for run in runs)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", ["w8a8-mixed+bismooth"])
def test_quantize(artifact: Path, tmp_path: Path, recipe: str) -> None:
    output = tmp_path / "quantized"
    runs = killed(KILLS, output, "quantize", artifact, "--recipe", recipe, "-o", output)
    assert continued(runs) >= KILLS // 4


@pytest.mark.timeout(900)
def test_verify(artifact: Path, tmp_path: Path) -> None:
    """Hops that are through are not judged again. The hop ``float`` spends its time on importing PyTorch."""
    bismooth("quantize", artifact, "-o", tmp_path / "w8a8")
    hops = ("--hop", "folded", "reference", "int8", "decode", "half")
    text = artifact.parent / "text.txt"
    output = tmp_path / "verify.json"
    runs = killed(VERIFY_KILLS, output, "verify", tmp_path / "w8a8", "--data", text, *SIZES, *hops, "-o", output)
    assert continued(runs) >= VERIFY_KILLS // 4
