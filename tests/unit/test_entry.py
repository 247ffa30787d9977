"""SIGTERM and SIGHUP end a command as Ctrl-C does, in a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bismooth.tools import entry
from tests.artifacts import names

ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
WORK = """
import sys
from pathlib import Path
from types import SimpleNamespace
from bismooth.export.replacing import scratch_folder
from bismooth.export.state import open_state
from bismooth.tools import entry, stages

def work(path):
    with open_state(path, "inspect", {}) as state, scratch_folder(path) as folder:
        state.record("a", 1)
        try:
            print("works", flush=True)
            sys.stdin.read(1)
        finally:
            print("unwinds", flush=True)
            sys.stdin.read(1)
    return SimpleNamespace(to_json=lambda: {"done": True})

stages.inspect = lambda path: work(Path(path))
sys.exit(entry.main())
"""


def start(target: Path, *arguments: str, ignored: int | None = None) -> subprocess.Popen[str]:
    """A process that works on ``target``, and goes on, and unwinds, when it gets a letter each."""
    ignore = "" if ignored is None else f"import signal; signal.signal({int(ignored)}, signal.SIG_IGN)"
    command = [sys.executable, "-c", f"{ignore}\n{WORK}", "inspect", str(target), *arguments]
    pipe = subprocess.PIPE
    environment = os.environ | {"XDG_CACHE_HOME": str(target.parent / "cache")}
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    assert any(".tmp-" in name for name in names(target.parent))
    return process


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_command_is_interrupted(tmp_path: Path, number: int, as_json: bool) -> None:
    process = start(tmp_path / "art", *(["--json"] if as_json else []))
    process.send_signal(number)
    out, err = process.communicate("x", timeout=60)
    assert process.returncode == 128 + number, err
    shown = out.removeprefix("unwinds\n")
    if as_json:
        assert json.loads(shown) == {"error": {"status": 128 + number, "message": entry.MESSAGE}}
        assert err == ""
    else:
        assert (shown, err) == ("", f"error: {entry.MESSAGE}\n")
    assert names(tmp_path) == {".art.partial", "cache"}


def test_further_signals_do_not_break_off_the_unwinding(tmp_path: Path) -> None:
    process = start(tmp_path / "art")
    assert process.stdout is not None
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "unwinds\n"
    for number in (signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
    assert process.communicate("x", timeout=60) == ("", f"error: {entry.MESSAGE}\n")
    assert process.returncode == 129
    assert names(tmp_path) == {".art.partial", "cache"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_ignored_stays_ignored(tmp_path: Path, number: int) -> None:
    """As under nohup."""
    process = start(tmp_path / "art", ignored=number)
    process.send_signal(number)
    out, err = process.communicate("xx", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "done" in out
    assert names(tmp_path) == {"cache"}


def test_while_the_command_is_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "bismooth", "recipes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", f"error: {entry.MESSAGE}\n")
