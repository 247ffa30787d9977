"""``bismooth cache``: what unfinished runs have left is found, shown and deleted."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from bismooth.export.errors import BismoothError
from bismooth.export.state import open_state, state_folder
from bismooth.export.state_registry import registered
from bismooth.tools.cache import Unfinished, cache
from bismooth.tools.cli import main
from tests.artifacts import names


@pytest.fixture(autouse=True)
def _own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def leave(target: Path, stage: str = "quantize", progress: tuple[str, int, int] | None = None) -> Path:
    with pytest.raises(KeyboardInterrupt), open_state(target, stage, {}) as state:
        state.record_all({"a": 1, "b": 2}, progress)
        (state.folder / "data").write_bytes(bytes(100_000))
        raise KeyboardInterrupt
    return state.folder


def test_unfinished_runs_are_listed(tmp_path: Path) -> None:
    assert cache().to_json() == {"unfinished_bytes": 0, "cleared_bytes": 0, "unfinished": [], "cleared": []}
    first = leave(tmp_path / "first", progress=("write weights", 20, 42))
    leave(tmp_path / "second", "calibrate")
    hour_ago = time.time() - 3600
    for path in first.iterdir():
        os.utime(path, (hour_ago, hour_ago))
    result = cache()
    assert [(run.target, run.stage, run.progress, run.running) for run in result.unfinished] == [
        (str(tmp_path / "first"), "quantize", "write weights: 20 of 42", False),
        (str(tmp_path / "second"), "calibrate", "2 units", False),
    ]
    assert all(100_000 <= run.size_bytes < 130_000 for run in result.unfinished)
    assert 3599 < result.unfinished[0].age_seconds < 3660
    assert 0 <= result.unfinished[1].age_seconds < 60
    assert cache([tmp_path / "second", first]).unfinished[1].target == str(tmp_path / "first")


def test_files_that_vanish_meanwhile_are_not_counted(tmp_path: Path) -> None:
    folder = leave(tmp_path / "first")
    (folder / "gone").symlink_to("nothing")  # is listed, and cannot be looked at
    assert [run.target for run in cache().unfinished] == [str(tmp_path / "first")]


def test_temporary_folders_of_killed_runs_count_and_are_cleared(tmp_path: Path) -> None:
    """Not so those of other targets, nor files in them that have another name: most likely a source's weights."""
    leave(tmp_path / "art")
    alone = cache().unfinished[0].size_bytes
    (tmp_path / "weights").write_bytes(bytes(500_000))
    folders = [tmp_path / name / "below" for name in (".art.tmp-01234567", ".other.tmp-01234567")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "graph").write_bytes(bytes(200_000))
        (folder / "linked").hardlink_to(tmp_path / "weights")
    assert 200_000 <= cache().unfinished[0].size_bytes - alone < 230_000
    cache([tmp_path / "art"], clear=True)
    assert names(tmp_path) == {"weights", ".other.tmp-01234567"}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (7200, "2 h"), (86400 * 12, "12 d")],
)
def test_ages_are_words(seconds: float, words: str) -> None:
    run = Unfinished("art", "quantize", "2 units", 1, seconds, False)
    assert run.brief()["age"] == words


def test_all_or_some_are_cleared(tmp_path: Path) -> None:
    folders = [leave(tmp_path / name) for name in "abc"]
    result = cache([tmp_path / "a"], clear=True)
    assert ([run.target for run in result.cleared], result.unfinished) == ([str(tmp_path / "a")], ())
    assert registered() == folders[1:]
    result = cache(clear=True)
    assert [run.target for run in result.cleared] == [str(tmp_path / "b"), str(tmp_path / "c")]
    assert names(tmp_path) == set()
    assert registered() == []


def test_what_a_process_works_on_is_not_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = leave(tmp_path / "other")
    with open_state(tmp_path / "art", "quantize", {}) as state:
        state.record("a", 1)
        with pytest.raises(BismoothError, match=r"\.art\.partial: a running process works on it"):
            cache([tmp_path / "art"], clear=True)
        result = cache(clear=True)
        assert [(run.target, run.running) for run in result.unfinished] == [(str(tmp_path / "art"), True)]
        assert main(["cache", "--clear"]) == 0
        note = f"{tmp_path / 'art'}: a running process works on it, so it is left alone\n"
        assert capsys.readouterr().err == note
        assert state.get("a") == 1
        assert registered() == [state.folder]
    assert not other.exists()


@pytest.mark.parametrize("missing", ["state.json", "journal.jsonl"])
def test_a_damaged_one_can_be_cleared(tmp_path: Path, missing: str) -> None:
    """Such as one whose deletion was cut off."""
    folder = leave(tmp_path / "art")
    (folder / missing).unlink()
    run = cache().unfinished[0]
    assert (run.stage, run.progress) == (None, "damaged")
    cache(clear=True)
    assert not folder.exists()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    """Whatever their names, and whatever is in them."""
    leave(tmp_path / "art").rename(tmp_path / "art")
    (tmp_path / ".empty.partial").mkdir()
    for path in (tmp_path / "art", tmp_path / "empty", tmp_path / "nowhere", tmp_path):
        with pytest.raises(BismoothError) as caught:
            cache([path], clear=True)
        assert str(caught.value) == (
            f"{path}: there is no unfinished run. Expected its output, or the folder that it has left. 'bismooth "
            "cache' lists them."
        )
    assert names(tmp_path) == {"art", ".empty.partial"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = leave(tmp_path / "art", progress=("write weights", 20, 42))
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "write weights: 20 of 42" in shown
    assert re.search(r"\b\d+ s\b", shown)
    assert "cleared" not in shown
    assert main(["cache", "--clear", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["target"] for run in document["cleared"]] == [str(tmp_path / "art")]
    assert document["unfinished"] == []
    leave(tmp_path / "other")
    assert main(["cache", "--clear"]) == 0
    assert re.search(r"^ unfinished +none *$.*^cleared *$", capsys.readouterr().out, re.DOTALL | re.MULTILINE)
    assert main(["cache", str(tmp_path / "art")]) == 2
    assert "there is no unfinished run" in capsys.readouterr().err
    assert not state_folder(tmp_path / "art").exists()
