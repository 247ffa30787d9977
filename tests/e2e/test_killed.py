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
KILLS = 20


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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", ["w8a8-mixed+bismooth"])
def test_kill_9_at_random_moments(artifact: Path, tmp_path: Path, recipe: str) -> None:
    output = tmp_path / "quantized"
    command = ["quantize", str(artifact), "--recipe", recipe, "-o", str(output)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/killed.py"), str(KILLS), str(output), *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    runs: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(run["status"] < 0 for run in runs) == KILLS
    assert {run["status"] for run in runs} <= {0, -9}, [run["errors"] for run in runs if run["status"] > 0]
    assert runs[-1]["differing"] == []
    assert all(run["differing"] == [] for run in runs if run["differing"] is not None)
    continued = [run for run in runs if re.search(r"continues an earlier run: \d+ units are there \(", run["errors"])]
    assert len(continued) >= KILLS // 4
