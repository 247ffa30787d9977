"""What an unfinished run leaves, and who may go on from it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bismooth.export import state as module
from bismooth.export.errors import BismoothError, UnfinishedRunError
from bismooth.export.state import (
    State,
    check_left,
    clear_state,
    is_running,
    open_state,
    read_units,
    state_folder,
    target_of,
)
from bismooth.export.state_registry import registered, registry
from tests.artifacts import names

MADE_OF = {"recipe": {"alpha": 0.5}, "blocks": (1, 2)}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out/art"


def leave(target: Path, units: dict[str, Any], made_of: dict[str, Any] = MADE_OF) -> Path:
    """A run that is interrupted after some units; returns its state."""
    with pytest.raises(ZeroDivisionError), open_state(target, "quantize", made_of) as state:
        state.record_all(units)
        raise ZeroDivisionError
    return state.folder


def test_a_run_that_ends_leaves_nothing(target: Path) -> None:
    with open_state(target, "quantize", MADE_OF) as state:
        assert state.folder == state_folder(target) == target.parent / ".art.partial"
        assert target_of(state.folder) == target
        assert (state.resumed, state.done, state.get("a")) == (0, 0, None)
        state.record("a", 1)
        (state.folder / "data").write_text("data", "utf-8")
        assert registered() == [state.folder]
    assert names(target.parent) == set()
    assert registered() == []


def test_an_interrupted_run_is_continued(target: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, open_state(target, "quantize", MADE_OF) as state:
        state.record("a", {"error": 0.1, "list": (1, 2)})
        assert state.progress is None
        state.record_all({"b": None, "c": "text"}, progress=("step", 2, 5))
        assert read_units(state.folder)[1] == state.progress == ("step", 2, 5)
        state.note("position", 1)
        state.note("position", 2)
        (state.folder / "data").write_text("data", "utf-8")
        raise KeyboardInterrupt
    kept = f"What was done is kept in {state.folder} (units of work: 3): the same command goes on from there."
    assert caught.value.__notes__ == [kept]
    with open_state(target, "quantize", MADE_OF) as state:
        assert (state.resumed, state.done) == (3, 3)
        assert (state.get("a"), state.get("b"), state.get("c")) == ({"error": 0.1, "list": [1, 2]}, None, "text")
        assert [key in state for key in "abcd"] == [True, True, True, False]
        assert state.progress == ("step", 2, 5)
        assert (state.noted("position"), state.noted("a"), state.get("position")) == (2, None, None)
        assert (state.folder / "data").read_text("utf-8") == "data"
        state.record("d", 4)
        assert (state.resumed, state.done) == (3, 4)
    assert names(target.parent) == set()


def test_what_cannot_be_continued_is_kept_without_the_promise(target: Path) -> None:
    with pytest.raises(UnfinishedRunError) as caught, open_state(target, "quantize", MADE_OF) as state:
        state.record("a", 1)
        check_left(state.folder / "data", 10)
    assert str(caught.value).endswith("Pass --restart to discard that run.")
    assert not hasattr(caught.value, "__notes__")
    assert read_units(state.folder)[0] == {"a": 1}


def test_a_run_that_fails_before_it_has_done_anything_leaves_nothing(target: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught, open_state(target, "quantize", MADE_OF) as state:
        state.note("position", 1)
        raise ZeroDivisionError
    assert not hasattr(caught.value, "__notes__")
    assert names(target.parent) == set()
    assert registered() == []


@pytest.mark.parametrize(
    ("stage", "made_of", "difference"),
    [
        ("calibrate", MADE_OF, 'stage is "quantize", and would be "calibrate"'),
        ("quantize", MADE_OF | {"recipe": {"alpha": 0.6}}, "recipe.alpha is 0.5, and would be 0.6"),
        ("quantize", MADE_OF | {"blocks": [1]}, "blocks is [1, 2], and would be [1]"),
        ("calibrate", {}, 'stage is "quantize", and would be "calibrate"'),
        ("quantize", MADE_OF | {"seed": 0}, "seed is not set, and would be 0"),
        ("quantize", {"recipe": {"alpha": 0.5}}, "blocks is [1, 2], and would be not set"),
    ],
)
def test_a_run_with_another_result_is_refused(
    target: Path, stage: str, made_of: dict[str, Any], difference: str
) -> None:
    folder = leave(target, {"a": 1})
    (folder / "data").write_text("data", "utf-8")
    with pytest.raises(BismoothError) as caught, open_state(target, stage, made_of):
        raise AssertionError
    assert str(caught.value) == (
        f"{folder}: an unfinished run is there, which would come out differently: {difference}. Expected the same "
        "input, options and code. Choose another output, or pass --restart to discard that run."
    )
    assert read_units(folder)[0] == {"a": 1}
    with open_state(target, stage, made_of, restart=True) as state:
        assert state.resumed == 0
        assert names(folder) == {"state.json", "journal.jsonl"}


def test_a_run_that_was_killed_before_it_has_done_anything_hinders_no_other(target: Path) -> None:
    folder = leave(target, {"a": 1})
    (folder / "journal.jsonl").write_bytes(b'{"note": "position", "value": 1}\n{"key": "a", "va')
    (folder / "data").touch()
    with open_state(target, "calibrate", {}) as state:
        assert (state.resumed, state.noted("position")) == (0, None)
        assert names(folder) == {"state.json", "journal.jsonl"}


def test_restart_discards_the_same_run_too(target: Path) -> None:
    folder = leave(target, {"a": 1})
    (folder / "sub").mkdir()
    (folder / "sub/data").touch()
    with open_state(target, "quantize", MADE_OF, restart=True) as state:
        assert (state.resumed, state.get("a")) == (0, None)
        assert names(folder) == {"state.json", "journal.jsonl"}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_off_is_no_unit(target: Path, cut: int) -> None:
    folder = leave(target, {"a": 1, "b": "text"})
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    leave(target, {"c": 3})
    assert read_units(folder)[0] == {"a": 1, "c": 3}


@pytest.mark.parametrize(
    ("file", "content", "detail"),
    [
        ("journal.jsonl", b'{"key": "a", "value": 1}\n\0\0\0\n{"key": "b", "value": 1}\n', "line 2 of journal.jsonl"),
        ("journal.jsonl", b'{"value": 1}\n', "line 1 of journal.jsonl cannot be read ('note')"),
        ("journal.jsonl", b"[]\n", "line 1 of journal.jsonl"),
        ("state.json", b"{", "state.json cannot be read (Expecting"),
        ("state.json", b"[]", "state.json cannot be read (list indices"),
        ("state.json", b'{"began": 1.0}', "state.json cannot be read ('fingerprint')"),
        ("state.json", b'{"began": 1.0, "fingerprint": {}}', "state.json cannot be read ('stage')"),
        ("state.json", b'{"began": 1, "fingerprint": {"stage": "x"}}', "it has values of other types than expected"),
    ],
)
def test_a_damaged_state_is_refused(target: Path, file: str, content: bytes, detail: str) -> None:
    folder = leave(target, {"a": 1})
    (folder / file).write_bytes(content)
    with pytest.raises(BismoothError) as caught, open_state(target, "quantize", MADE_OF):
        raise AssertionError
    assert str(caught.value).startswith(f"{folder}: what an unfinished run has left is damaged: ")
    assert detail in str(caught.value)
    assert str(caught.value).endswith(" Pass --restart to discard it, or delete the folder.")
    with open_state(target, "quantize", MADE_OF, restart=True) as state:
        assert state.resumed == 0


def test_two_runs_at_once(target: Path) -> None:
    """In two processes: a second descriptor of the same process is refused as well."""
    with open_state(target, "quantize", MADE_OF) as state:
        for restart in (False, True):
            with (
                pytest.raises(BismoothError, match=r"art\.partial: a running process works on it\. Wait until it ends"),
                open_state(target, "quantize", MADE_OF, restart=restart),
            ):
                raise AssertionError
        with pytest.raises(BismoothError, match="a running process works on it"):
            clear_state(state.folder)
        assert is_running(state.folder)
        state.record("a", 1)
        assert read_units(state.folder)[0] == {"a": 1}
    assert not is_running(state.folder)


def test_a_state_that_vanishes_while_it_is_locked_is_made_anew(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run ends between the opening of its journal and the lock on it."""
    folder = leave(target, {"a": 1})
    calls: list[int] = []

    def lock(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            module.shutil.rmtree(folder)
        return True

    monkeypatch.setattr(module, "try_lock", lock)
    with open_state(target, "quantize", MADE_OF) as state:
        assert (len(calls), state.resumed) == (2, 0)
        state.record("b", 2)
        assert read_units(folder)[0] == {"b": 2}


def test_a_link_to_the_target_and_the_target_have_one_state(target: Path) -> None:
    target.mkdir(parents=True)
    link = target.parent / "link"
    link.symlink_to(target)
    folder = leave(target, {"a": 1})
    with open_state(link, "quantize", MADE_OF) as state:
        assert (state.folder, state.resumed) == (folder, 1)


def test_a_full_disk(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line is written, and nothing of it stays; later lines are whole."""
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 20:
            return write(descriptor, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BismoothError) as caught, open_state(target, "quantize", MADE_OF) as state:
        state.record("a", 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                state.note("position", 1)
        state.record("b", 2)
        monkeypatch.setattr(os, "write", full)
        state.record("c", 3)
    message = f"{target}: the disk is full. Free some space and run the command again."
    assert str(caught.value) == message
    assert caught.value.__notes__ == [
        f"What was done is kept in {state.folder} (units of work: 2): the same command goes on from there."
    ]
    monkeypatch.undo()
    assert read_units(state.folder)[0] == {"a": 1, "b": 2}


@pytest.mark.parametrize("function", ["open", "fsync"])
def test_a_disk_that_is_full_at_the_beginning(target: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def full(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(BismoothError, match="the disk is full"), open_state(target, "quantize", MADE_OF):
        raise AssertionError
    assert names(target.parent) == set()


def test_a_target_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(BismoothError, match=r"file/art: cannot be written \(Not a directory\)"),
        open_state(tmp_path / "file/art", "quantize", MADE_OF),
    ):
        raise AssertionError


def test_lines_of_several_threads_are_whole(target: Path) -> None:
    def work(state: State, first: int) -> None:
        for number in range(first, first + 50):
            state.record(f"{number}", number)
            state.note("last", number)

    with open_state(target, "quantize", MADE_OF) as state:
        threads = [threading.Thread(target=work, args=(state, 50 * first)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert read_units(state.folder)[0] == {f"{number}": number for number in range(200)}


KILLED = """
import os, signal, sys
from pathlib import Path
from bismooth.export import state as module
number = int(sys.argv[2])
def hook(event, args):
    global number
    if event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate") or (
        event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        number -= 1
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
with module.open_state(Path(sys.argv[1]), "quantize", {}) as state:
    for name in "abc":
        if state.get(name) is None:
            (state.folder / name).write_text(name)
            state.record(name, name)
        assert (state.folder / name).read_text() == name
"""


def test_killed_at_every_change(target: Path) -> None:
    """Whatever was removed or made last, a unit that counts has its data."""
    killed = 0
    status = -1
    while status != 0:
        killed += 1
        done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(killed)], check=False)
        status = done.returncode
        assert status in (0, -signal.SIGKILL)
    assert killed > 10
    assert names(target.parent) == set()


def test_nothing_is_registered_where_the_cache_cannot_be_written(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with open_state(target, "quantize", MADE_OF) as state:
        state.record("a", 1)
        assert registered() == []


def test_the_registry_forgets_what_was_deleted(target: Path, tmp_path: Path) -> None:
    gone = leave(tmp_path / "deleted/art", {"a": 1})
    unmounted = leave(tmp_path / "disk/art", {"a": 1})
    folder = leave(target, {"a": 1})
    (registry() / "broken.json").write_text(json.dumps([]), "utf-8")
    assert registered() == sorted([gone, unmounted, folder])
    module.shutil.rmtree(gone)
    unmounted.parent.rename(tmp_path / "elsewhere")
    assert registered() == [folder]
    (tmp_path / "elsewhere").rename(unmounted.parent)
    assert registered() == sorted([unmounted, folder])
