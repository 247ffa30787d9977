"""Processes of engines: what they answer, and how they end."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.tools.bench_process import EngineProcess
from tests.benched import subject, write_engine

OPENED = '{"opened": {"seconds": 0.5, "vocab_size": 7, "capacity": 9}}'
IDS = np.array([[1, 2], [3, 4]])


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file: the shell script that runs in the place of Python."""
    path = tmp_path / "python"
    path.touch(mode=0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines]), "utf-8")


def test_what_a_process_is_asked_and_answers(python: Path) -> None:
    asked = python.with_name("asked")
    timed = '{"timed": {"prefill": 1.5, "first_token": 1.75, "tokens": [0.25], "peak_rss": 1000}}'
    answers = f"case \"$line\" in *open*) echo '{OPENED}';; *) echo '{timed}';; esac"
    script(python, f"while read -r line; do echo \"$line\" >> '{asked}'; {answers}; done")
    with EngineProcess(Path("engine"), 3) as process:
        assert (process.opened.seconds, process.opened.vocab_size, process.opened.capacity) == (0.5, 7, 9)
        assert process.peak_rss is None
        timing = process.time(IDS, 2)
    assert (timing.prefill, timing.first_token, timing.tokens) == (1.5, 1.75, (0.25,))
    assert process.peak_rss == 1000
    assert asked.read_text("utf-8").splitlines() == [
        '{"open": {"path": "engine", "threads": 3}}',
        '{"time": {"ids": [[1, 2], [3, 4]], "new_tokens": 2}}',
    ]


def test_an_engine_that_cannot_be_opened(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "engine", subject(engine="null"))
    with pytest.raises(BismoothError, match=re.escape(f"{path}: engines of null cannot generate text.")):
        EngineProcess(path, None)


def test_a_bug_is_no_bad_input(python: Path) -> None:
    script(python, "read -r line", 'echo \'{"bug": "Traceback …"}\'')
    with pytest.raises(RuntimeError, match="the process of an engine failed:\nTraceback …"):
        EngineProcess(Path("engine"), None)


def test_a_process_that_ends(python: Path) -> None:
    script(python, "read -r line", f"echo '{OPENED}'", "read -r line", "echo 'out of luck' >&2", "exit 3")
    message = "engine: the process of the engine ended (exit status 3). Its last words: out of luck."
    with EngineProcess(Path("engine"), None) as process, pytest.raises(BismoothError, match=re.escape(message)):
        process.time(IDS, 2)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_a_process_that_the_system_ends(python: Path) -> None:
    script(python, f"kill -{int(signal.SIGKILL)} $$")
    message = (
        "engine: the process of the engine ended (SIGKILL). The system ended it, most likely for lack of memory: "
        "open --one-at-a-time. Its last words: none."
    )
    with pytest.raises(BismoothError, match=re.escape(message)):
        EngineProcess(Path("engine"), None)
