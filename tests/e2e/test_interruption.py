"""Whatever stops a command, the artifact that was there stays, and no half of a new one is accepted."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from bismooth.export.artifact import MANIFEST, Artifact
from tests.interrupted import snapshot
from tests.models import VOCAB, make_model

INTERRUPTED = Path(__file__).parents[1] / "interrupted.py"
STATE = ".quantized.partial"
Files = Mapping[str, Any]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")


def bismooth(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "bismooth", *map(str, arguments), "--quiet", "--json"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source``: a tiny llama with a tokenizer; ``float`` and ``quantized``: artifacts made of it by the commands."""
    root = tmp_path_factory.mktemp("interruption")
    make_model("llama", root / "source", num_hidden_layers=1)
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(root / "source/tokenizer.json"))
    subprocess.run(bismooth("export", root / "source", "-o", root / "float"), check=True, capture_output=True)
    quantize = bismooth("quantize", root / "float", "--data", "none", "-o", root / "quantized")
    subprocess.run(quantize, check=True, capture_output=True)
    return root


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    """The same folders for one test, linked to each other as they were."""
    links: dict[int, Path] = {}

    def copy(source: str, target: str) -> None:
        inode = Path(source).stat().st_ino
        if inode in links:
            Path(target).hardlink_to(links[inode])
        else:
            shutil.copy2(source, target)
            links[inode] = Path(target)

    shutil.copytree(prepared, tmp_path / "root", copy_function=copy)
    for name in ("float", "quantized"):
        Artifact.load(tmp_path / "root" / name)
    return tmp_path / "root"


@dataclass(frozen=True)
class Run:
    """One line of ``interrupted.py``."""

    status: int
    errors: str
    files: dict[str, list[Any]]
    artifacts: dict[str, list[str] | None]

    def below(self, folder: str) -> Files:
        return {name: record for name, record in self.files.items() if name.startswith(f"{folder}/")}


def interrupted(mode: str, root: Path, *command: str | Path) -> list[Run]:
    done = subprocess.run(
        [sys.executable, str(INTERRUPTED), mode, str(root), *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return [Run(**json.loads(line)) for line in done.stdout.splitlines()]


def commands(root: Path) -> dict[str, tuple[str, list[str | Path]]]:
    """Name → what it replaces, and the command. An ONNX file is exported in no time."""
    return {
        "quantize": ("quantized", ["quantize", root / "float", "--data", "none", "-o", root / "quantized", "--force"]),
        "export": ("float", ["export", root / "quantized/reference.onnx", "-o", root / "float", "--force"]),
    }


def as_json(files: Files) -> Files:
    return json.loads(json.dumps(files))


def others(run: Run, target: str) -> Files:
    """All files but those of the target and of temporary folders."""
    return {name: value for name, value in run.files.items() if not name.startswith((f"{target}/", "."))}


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_kill_at_every_change(root: Path, command: str) -> None:
    target, arguments = commands(root)[command]
    before = as_json(snapshot(root))
    untouched = {name: value for name, value in before.items() if not name.startswith(f"{target}/")}
    *killed, last = interrupted("kill", root, *arguments)
    complete = last.artifacts[target]
    assert len(killed) > 15
    assert {run.status for run in killed} == {-signal.SIGKILL}
    assert last.status == 0
    replaced = sorted({name.partition("/")[2] for name in before.keys() - untouched.keys()} - {MANIFEST})
    old = {name: value for name, value in before.items() if name not in untouched}
    for number, run in enumerate([*killed, last], 1):
        assert others(run, target) == untouched, f"run {number} changed another file"
        assert run.artifacts[target] is not None, f"run {number} left no artifact"
        if run.below(target) != old:  # the new one is in place, so all of it is there
            assert run.artifacts[target] == complete, f"run {number} left half of an artifact"
            old = run.below(target)
        temporary = [files for name, files in run.artifacts.items() if name.startswith(".") and name != STATE]
        assert len(temporary) <= 1, f"run {number} did not remove what the one before left"
        assert all(files in (None, complete, replaced) for files in temporary), (
            f"half an artifact of run {number} loads"
        )
    assert any(name.startswith(".") for run in killed for name in run.artifacts)
    assert set(last.artifacts) == {"source", "float", "quantized"}


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_a_disk_that_is_full_at_every_change(root: Path, command: str) -> None:
    _, arguments = commands(root)[command]
    before = as_json(snapshot(root))
    *full, last = interrupted("full", root, *arguments)
    assert len(full) >= 10
    for run in full:
        assert run.status == 2
        kept = run.below(STATE)
        assert {name: value for name, value in run.files.items() if name not in kept} == before
        assert ("the same command goes on from there." in run.errors) == bool(kept)
        assert "the disk is full. Free some space and run the command again." in run.errors
        assert "Traceback" not in run.errors
    assert last.status == 0


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_kill_9_at_any_time(root: Path, command: str) -> None:
    """The real commands, at random moments; the last run is left alone."""
    arguments = {
        "export": bismooth("export", root / "source", "-o", root / "float", "--force"),
        "quantize": bismooth("quantize", root / "float", "--data", "none", "-o", root / "quantized", "--force"),
    }[command]
    target = "float" if command == "export" else "quantized"
    moments = random.Random(0)
    longest = {"export": 6.0, "quantize": 1.5}[command]
    source = snapshot(root / "source")
    for _ in range(3):
        before = snapshot(root / target)
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(moments.uniform(0.2, 1) * longest)
            process.kill()
        Artifact.load(root / target)
        after = snapshot(root / target)
        assert after == before or after.keys() == before.keys(), "neither the old one nor the new one"
        assert snapshot(root / "source") == source
    subprocess.run(arguments, check=True, capture_output=True)
    Artifact.load(root / target)
    assert snapshot(root / "source") == source
    assert {path.name for path in root.iterdir()} == {"source", "float", "quantized"}
