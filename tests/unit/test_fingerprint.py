"""All that decides the result of a run shows in its fingerprint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bismooth.export import fingerprint as module
from bismooth.export import machine
from bismooth.export.artifact import Artifact
from bismooth.export.difference import difference
from bismooth.export.fingerprint import code_sha256, run_fingerprint
from bismooth.export.machine import kind_of_cpu
from bismooth.export.versions import tool_versions
from tests.artifacts import make


def test_what_is_in_it(tmp_path: Path) -> None:
    artifact = Artifact.load(make(tmp_path / "art"))
    found = run_fingerprint(artifact.files, recipe={"alpha": 0.5})
    assert list(found) == ["recipe", "files", "tools", "machine", "code"]
    assert found["files"].keys() == artifact.manifest.files.keys()
    assert found["tools"] == tool_versions()
    assert found["tools"].keys() >= {"numpy", "ml_dtypes", "onnxruntime"}, "what computes"
    assert found["machine"] == kind_of_cpu()
    assert difference("", found, run_fingerprint(artifact.files, recipe={"alpha": 0.5})) is None


def test_what_changes_it(tmp_path: Path) -> None:
    artifact = Artifact.load(make(tmp_path / "art"))
    found = run_fingerprint(artifact.files, seed=0)
    assert difference("", found, run_fingerprint(artifact.files, seed=1)) == "seed is 0, and would be 1"
    name = next(iter(artifact.manifest.files))
    os.utime(artifact.path / name, ns=(0, 1))
    assert str(difference("", found, run_fingerprint(artifact.files, seed=0))).startswith(f"files.{name}.mtime_ns is ")
    (artifact.path / name).write_bytes(b"another size")
    assert str(difference("", found, run_fingerprint(artifact.files, seed=0))).startswith(f"files.{name}.size is ")


def test_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other kind, it rounds sums otherwise."""
    artifact = Artifact.load(make(tmp_path / "art"))
    found = run_fingerprint(artifact.files)
    for name in ("kind of CPU", "BLAS"):
        monkeypatch.setattr(machine, "kind_of_cpu", lambda name=name: kind_of_cpu() | {name: "another"})
        expected = f'machine.{name} is "{kind_of_cpu()[name]}", and would be "another"'
        assert difference("", found, run_fingerprint(artifact.files)) == expected


def test_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all subpackages, which may be links; nothing but Python files counts, and any change of one does."""
    package = Path(module.__file__).parents[1]
    copy = tmp_path / "bismooth"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    expected = code_sha256()
    monkeypatch.setattr(module, "__file__", str(copy / "export/fingerprint.py"))

    def computed() -> str:
        code_sha256.cache_clear()
        return code_sha256()

    try:
        assert computed() == expected
        (copy / "passes/other.txt").touch()
        assert computed() == expected
        file = copy / "tools/cli.py"
        file.write_text(file.read_text("utf-8") + "\n", "utf-8")
        changed = computed()
        assert changed != expected
        file.rename(copy / "tools/other.py")
        assert computed() not in (expected, changed)
    finally:
        monkeypatch.undo()
        assert computed() == expected
