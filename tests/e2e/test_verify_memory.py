"""What ``verify`` promises of memory, on processes of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.tiny import SIZES, make_tiny

ROOT = Path(__file__).parents[2]


def bismooth(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bismooth", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_budget_that_is_named_is_enough_for_every_hop(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, num_hidden_layers=2)
    artifact, report = tmp_path / "quantized", tmp_path / "report.json"
    assert bismooth("export", tiny.source, "-o", tmp_path / "float").returncode == 0
    assert bismooth("quantize", tmp_path / "float", "--data", "none", "-o", artifact).returncode == 0
    words = ("verify", artifact, "--data", tiny.text, *SIZES, "-o", report)
    refused = bismooth(*words, "--memory", "1MB")
    assert refused.returncode == 2, refused.stderr
    assert "run the float32 graph" not in refused.stderr
    (least,) = re.findall(r"--memory is too small for what is run .* Expected (\d+)MB or more", refused.stderr)
    done = bismooth(*words, "--memory", f"{least}MB", "--gate", "kl=none")
    assert done.returncode in (0, 1), done.stderr
    hops = {hop["hop"]: hop["verdict"] for hop in json.loads(report.read_text())["hops"]}
    assert {hops["float"], hops["int8"], hops["decode"], hops["half"]} <= {"passed", "measured", "failed"}
