"""Steps of a benchmark: what they print and cost, and how they fail."""

import argparse
import os
import signal
import sys
from pathlib import Path

import pytest

from bismooth.export.errors import BismoothError
from bismooth.tools.bench_steps import Runner, add_texts, texts


def test_a_step_is_a_process_with_its_output_and_its_memory() -> None:
    runner = Runner()
    script = "x = b'1' * 200_000_000; import json; print(json.dumps({'n': 7}))"
    step = runner.process("big", [sys.executable, "-c", script])
    assert step.output == {"n": 7}
    assert step.peak_bytes > 200_000_000
    assert 0 < step.seconds < 60
    assert runner.steps == [step]
    missed = runner.process("gate", [sys.executable, "-c", "print('{}'); raise SystemExit(1)"])
    assert missed.output == {}


@pytest.mark.parametrize(("status", "printed"), [(2, "print('bad input');"), (1, ""), (70, "print('{}');")])
def test_a_step_that_fails_is_named(status: int, printed: str) -> None:
    with pytest.raises(BismoothError, match=rf"^first: ended with status {status}: "):
        Runner().process("first", [sys.executable, "-c", f"{printed} raise SystemExit({status})"])


def test_a_step_ends_with_the_bench(tmp_path: Path) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "process"
    script = (
        "import os, pathlib, signal, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); "
        "os.kill(os.getppid(), signal.SIGUSR1); time.sleep(600)"
    )
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            Runner().process("first", [sys.executable, "-c", script, str(file)])
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_two_texts_or_none(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_texts(parser)
    parser.add_argument("--output", type=Path, default=tmp_path)
    both = parser.parse_args(["--calibration", "a", "b", "--evaluation", "c"])
    assert texts(both) == (["a", "b"], ["c"])
    first, second = texts(parser.parse_args([]))
    halves = [Path(path).read_text("utf-8") for (path,) in (first, second)]
    assert "".join(halves) == (tmp_path / "text.txt").read_text("utf-8")
    with pytest.raises(BismoothError, match=r"^bench: expected both --calibration and --evaluation, or neither"):
        texts(parser.parse_args(["--evaluation", "c"]))
