"""What ``calibrate`` promises of memory and of being killed, on processes of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bismooth.export.hashing import file_sha256
from tests.graphs import DecoderShape, decoder
from tests.streaming import save_narrow

ROOT = Path(__file__).parents[2]
PLENTY = 10**10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose weights, 100 MB in float16, weigh more than all else in the process."""
    folder = tmp_path_factory.mktemp("model")
    shape = DecoderShape(layers=6, hidden=768, heads=12, kv_heads=4, head_size=64, ffn=2048, vocab=16000)
    save_narrow(decoder(shape), folder)
    return folder


def calibrate(folder: Path, output: Path, memory: int, *options: str) -> dict[str, Any] | str:
    """What a process says of itself, or the message that it ended with."""
    command = [sys.executable, "-m", "tests.calibrating", str(folder), str(output), str(memory), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    return done.stderr if done.returncode else json.loads(done.stdout)


@pytest.mark.parametrize("options", [(), ("histograms=true", "batch_size=12"), ("grams=true",)])
def test_the_least_budget_that_is_named_works_and_is_kept(
    folder: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    refused = calibrate(folder, tmp_path / "least", 10**6, *options)
    assert isinstance(refused, str)
    assert not (tmp_path / "least").exists()
    least = 10**6 * int(re.findall(r"--memory is too small .* Expected (\d+)MB or more\.", refused)[0])
    run = calibrate(folder, tmp_path / "least", least, *options)
    whole = calibrate(folder, tmp_path / "whole", PLENTY, *options)
    assert isinstance(run, dict), run
    assert isinstance(whole, dict), whole
    assert run["peak"] <= least
    assert run["pieces"] > 1 == whole["pieces"]
    assert whole["peak"] > run["peak"]
    assert file_sha256(tmp_path / "least") == file_sha256(tmp_path / "whole")
    between = (least + whole["peak"]) // 2
    run = calibrate(folder, tmp_path / "between", between, *options)
    assert isinstance(run, dict), run
    assert run["peak"] <= between
    assert file_sha256(tmp_path / "between") == file_sha256(tmp_path / "whole")


def test_twenty_kills_and_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """The statistics are those of a run that nothing has stopped."""
    refused = calibrate(folder, tmp_path / "s", 10**6)
    least = int(re.findall(r"Expected (\d+)MB", str(refused))[0])
    whole = calibrate(folder, tmp_path / "whole", PLENTY)
    assert isinstance(whole, dict), whole
    command = [
        sys.executable,
        "-m",
        "tests.killed_calibration",
        str(folder),
        str(tmp_path / "s"),
        str(least * 10**6),
        "20",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == 20
    assert {run["sha256"] for run in runs} == {file_sha256(tmp_path / "whole")}
    assert len({run["done"] for run in runs}) > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "whole"]
