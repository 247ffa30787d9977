"""Folders are put in place in one step, whatever happens."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bismooth.export import folder as atomic
from bismooth.export.artifact import Artifact, new_folder
from bismooth.export.errors import BismoothError
from tests.artifacts import make, names, write

WAYS = pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two renames"])


def without_exchange(_first: Path, _second: Path) -> bool:
    return False


def fail(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.EROFS, "Read-only file system")


def content(path: Path) -> bytes:
    return Artifact.load(path).graph("float32").read_bytes()


def test_a_new_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a/b") as folder:
        assert folder.parent == tmp_path / "a"
        assert folder.name.startswith(".b.tmp-")
        write(folder)
    assert names(tmp_path / "a") == {"b"}
    Artifact.load(tmp_path / "a/b")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "art").mkdir()
    make(tmp_path / "art")
    assert names(tmp_path) == {"art"}


@WAYS
def test_a_folder_is_replaced(tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", without_exchange)
    make(tmp_path / "art", b"old")
    make(tmp_path / "art", b"newer", force=True)
    assert content(tmp_path / "art") == b"newer"
    assert names(tmp_path) == {"art"}


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="renameat2 is Linux's")
def test_linux_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "art", b"old")
    with new_folder(tmp_path / "art", force=True) as folder:
        write(folder, b"newer")
        monkeypatch.setattr(Path, "rename", fail)
    assert content(tmp_path / "art") == b"newer"


def test_systems_that_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", fail)
    make(tmp_path / "art", b"old")
    make(tmp_path / "art", b"newer", force=True)
    assert content(tmp_path / "art") == b"newer"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", b"old")
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "link", b"newer", force=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == b"newer"
    assert names(tmp_path) == {"real", "link"}


def test_a_folder_that_exists_is_not_replaced_unasked(tmp_path: Path) -> None:
    make(tmp_path / "art", b"old")
    expected = r": already exists\. Choose another output folder, or pass --force to replace it\."
    with pytest.raises(BismoothError, match=expected):
        make(tmp_path / "art", b"newer")
    with pytest.raises(BismoothError, match=expected), new_folder(tmp_path / "late") as folder:
        make(tmp_path / "late", b"faster")
        write(folder, b"slower")
    assert content(tmp_path / "late") == b"faster"
    assert names(tmp_path) == {"art", "late"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_force_replaces_nothing_but_artifacts(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "home"
    if kind == "folder":
        target.mkdir()
        (target / "diary.txt").write_text("dear diary", "utf-8")
    else:
        target.write_text("dear diary", "utf-8")
    with pytest.raises(BismoothError, match="home: exists and is not a bismooth artifact, so --force does not replace"):
        make(target, force=True)
    assert (target / "diary.txt" if kind == "folder" else target).read_text("utf-8") == "dear diary"


def test_an_error_leaves_the_previous_folder(tmp_path: Path) -> None:
    make(tmp_path / "art", b"old")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "art", force=True) as folder:
        write(folder, b"newer")
        raise ZeroDivisionError
    assert content(tmp_path / "art") == b"old"
    assert names(tmp_path) == {"art"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path: Path, code: int) -> None:
    make(tmp_path / "art", b"old")
    expected = r"the disk is full\. Free some space and run the command again\.$"
    with pytest.raises(BismoothError, match=expected), new_folder(tmp_path / "art", force=True) as folder:
        write(folder, b"newer")
        raise OSError(code, "No space left on device")
    assert content(tmp_path / "art") == b"old"
    assert names(tmp_path) == {"art"}


def test_a_disk_that_is_full_when_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    make(tmp_path / "art", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BismoothError, match="the disk is full"):
        make(tmp_path / "art", b"newer", force=True)
    assert content(tmp_path / "art") == b"old"


def test_other_errors_of_the_system_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Read-only file system"), new_folder(tmp_path / "art"):
        fail()


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", fail)
    expected = r"cannot be written \(Read-only file system\)\. Choose a place that can be written"
    with pytest.raises(BismoothError, match=expected):
        make(tmp_path / "art")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(BismoothError, match="file/sub/art: cannot be written"):
        make(tmp_path / "file/sub/art")


def test_a_crash_between_two_renames_is_undone_by_the_next_load(tmp_path: Path) -> None:
    make(tmp_path / "art", b"old")
    (tmp_path / "art").rename(tmp_path / ".art.previous")
    assert content(tmp_path / "art") == b"old"
    assert names(tmp_path) == {"art"}


def test_a_crash_between_two_renames_is_undone_by_the_next_writer(tmp_path: Path) -> None:
    make(tmp_path / "art", b"old")
    (tmp_path / "art").rename(tmp_path / ".art.previous")
    with pytest.raises(BismoothError, match="already exists"):
        make(tmp_path / "art", b"newer")
    assert content(tmp_path / "art") == b"old"


def test_a_crash_after_two_renames_leaves_nothing_for_long(tmp_path: Path) -> None:
    make(tmp_path / "art", b"new")
    make(tmp_path / ".art.previous", b"old")
    assert content(tmp_path / "art") == b"new"
    make(tmp_path / "art", b"newer", force=True)
    assert names(tmp_path) == {"art"}


def test_a_second_rename_that_fails_undoes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def rename_but_not_temporaries(self: Path, target: Path) -> Path:
        return fail() if ".tmp-" in self.name else rename(self, target)

    monkeypatch.setattr(atomic, "_exchange", without_exchange)
    make_old = make(tmp_path / "art", b"old")
    monkeypatch.setattr(Path, "rename", rename_but_not_temporaries)
    with pytest.raises(OSError, match="Read-only"):
        make(make_old, b"newer", force=True)
    assert content(make_old) == b"old"
    assert names(tmp_path) == {"art"}


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    others = {".artist.tmp-01234567", ".art.tmp-of-mine"}
    for name in (".art.tmp-01234567", ".[art].tmp-89abcdef", *others):
        make(tmp_path / name)
    make(tmp_path / "art")
    assert names(tmp_path) == {"art", ".[art].tmp-89abcdef", *others}
    make(tmp_path / "[art]")
    assert names(tmp_path) == {"art", "[art]", *others}


def test_folders_that_a_process_still_works_on_stay(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match="already exists"), new_folder(tmp_path / "art") as slow:
        with new_folder(tmp_path / "art") as fast:
            assert slow != fast
            write(fast, b"fast")
        assert slow.is_dir()
    assert content(tmp_path / "art") == b"fast"
    assert names(tmp_path) == {"art"}


def test_a_folder_taken_for_a_leftover_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []
    lock = fcntl.flock

    def remove_first(descriptor: int, operation: int) -> None:
        if not taken:
            (path,) = tmp_path.glob(".art.tmp-*")
            taken.append(path)
            path.rmdir()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    make(tmp_path / "art")
    assert names(tmp_path) == {"art"}


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    make(tmp_path / "art")
    assert names(tmp_path) == {"art"}
