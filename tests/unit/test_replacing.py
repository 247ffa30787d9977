"""Files are put in place in one step, whatever happens."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from bismooth.export.errors import BismoothError
from bismooth.export.replacing import leftovers, put_in_place, replacing, scratch_folder
from tests.artifacts import names


def test_a_new_file_in_a_new_folder(tmp_path: Path) -> None:
    with replacing(tmp_path / "a/b") as file:
        assert file.parent == tmp_path / "a"
        assert file.name.startswith(".b.tmp-")
        file.write_text("new", "utf-8")
        assert not (tmp_path / "a/b").exists()
    assert (tmp_path / "a/b").read_text("utf-8") == "new"
    assert names(tmp_path / "a") == {"b"}


def test_a_link_is_replaced_and_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious", "utf-8")
    os.link(tmp_path / "precious", tmp_path / "file")
    with replacing(tmp_path / "file") as file:
        file.write_text("new", "utf-8")
    assert (tmp_path / "precious").read_text("utf-8") == "precious"
    assert (tmp_path / "file").read_text("utf-8") == "new"


def test_a_symbolic_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("new", "old"):
        (tmp_path / f"{name}.json").symlink_to(f"sub/{name}.json")
    (tmp_path / "sub/old.json").write_text("old", "utf-8")
    for name in ("new", "old"):
        with replacing(tmp_path / f"{name}.json") as file:
            assert file.parent == tmp_path / "sub"
            file.write_text(name * 2, "utf-8")
        assert (tmp_path / f"{name}.json").is_symlink()
        assert (tmp_path / f"sub/{name}.json").read_text("utf-8") == name * 2
    assert names(tmp_path / "sub") == {"new.json", "old.json"}


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for path in (fifo, link):
        with replacing(path) as file:
            file.write_text("new", "utf-8")
        assert os.read(reader, 10) == b"new"
        assert fifo.is_fifo()
    os.close(reader)
    assert names(tmp_path) == {"fifo", "link"}


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_devices_are_written_to(tmp_path: Path) -> None:
    """Through links, so that a failure of this test harms no device."""
    for name in ("null", "full"):
        (tmp_path / name).symlink_to(f"/dev/{name}")
    with replacing(tmp_path / "null") as file:
        file.write_text("new", "utf-8")
    with (
        pytest.raises(BismoothError, match=r"/full: the disk is full"),
        replacing(tmp_path / "full") as file,
    ):
        file.write_text("new", "utf-8")
    assert all((tmp_path / name).is_symlink() for name in ("null", "full"))
    assert names(tmp_path) == {"null", "full"}


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_file_that_messages_go_to_is_left_alone(tmp_path: Path, stream: str) -> None:
    program = f"""
import sys
from pathlib import Path
from bismooth.export.errors import BismoothError
from bismooth.export.replacing import leftovers, replacing
print("before", file=sys.{stream}, flush=True)
for path in ("/dev/{stream}", {str(tmp_path / "log")!r}):
    try:
        with replacing(Path(path)) as file:
            raise AssertionError
    except BismoothError as error:
        print(error, file=sys.{stream}, flush=True)
"""
    with (tmp_path / "log").open("w") as log:
        streams = (log, None) if stream == "stdout" else (None, log)
        subprocess.run([sys.executable, "-c", program], stdout=streams[0], stderr=streams[1], check=True)
    first, *others = (tmp_path / "log").read_text("utf-8").splitlines()
    assert first == "before"
    reason = "cannot be written (The messages of this command go to that file). Choose a place that can be written"
    assert [reason in line for line in others] == [True, True]


def test_closed_streams_are_no_file(tmp_path: Path) -> None:
    program = "import os, sys; from pathlib import Path; from bismooth.export.replacing import replacing; os.close(1)"
    program += "\nwith replacing(Path(sys.argv[1])) as file: file.write_text('new')"
    (tmp_path / "file").touch()
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], check=True)
    assert (tmp_path / "file").read_text("utf-8") == "new"


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for name, reason in (("socket", "Neither a file nor a pipe"), ("loop", "Too many levels of symbolic links")):
        with (
            pytest.raises(BismoothError, match=rf"/{name}: cannot be written \({reason}\)\. Choose a place"),
            replacing(tmp_path / name),
        ):
            raise AssertionError
    assert (tmp_path / "socket").is_socket()
    assert names(tmp_path) == {"loop", "socket"}


def test_an_error_leaves_the_previous_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old", "utf-8")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file") as file:
        file.write_text("half", "utf-8")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text("utf-8") == "old"
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path: Path, code: int) -> None:
    (tmp_path / "file").write_text("old", "utf-8")
    expected = r"/file: the disk is full\. Free some space and run the command again\.$"
    with pytest.raises(BismoothError, match=expected), replacing(tmp_path / "file") as file:
        file.write_text("half", "utf-8")
        raise OSError(code, "No space left on device")
    with pytest.raises(BismoothError, match=expected), scratch_folder(tmp_path / "file"):
        raise OSError(code, "No space left on device")
    assert (tmp_path / "file").read_text("utf-8") == "old"
    assert names(tmp_path) == {"file"}


def test_the_file_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(BismoothError, match=r"/file: cannot be written \(Input/output error\)\. Choose a place"),
        replacing(tmp_path / "file"),
    ):
        pass
    assert not names(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for make in (replacing, scratch_folder):
        with (
            pytest.raises(BismoothError, match=r"file/x: cannot be written \(.*\)\. Choose a place that can be"),
            make(tmp_path / "file/x"),
        ):
            pass
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(BismoothError, match=r"/folder: cannot be written \(Is a directory\)"),
        replacing(tmp_path / "folder"),
    ):
        pass
    assert names(tmp_path) == {"file", "folder"}


def test_errors_of_other_files_are_not_taken_for_its_own(tmp_path: Path) -> None:
    for make in (replacing, scratch_folder):
        with pytest.raises(FileNotFoundError, match="missing"), make(tmp_path / "file"):
            (tmp_path / "missing").read_bytes()
    assert not names(tmp_path)


def test_messages_name_the_folder_that_is_being_made_as_it_will_be_called(tmp_path: Path) -> None:
    with (
        pytest.raises(BismoothError, match=rf"^{tmp_path}/art/file: the disk is full"),
        scratch_folder(tmp_path / "art") as folder,
        replacing(folder / "file"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_leftovers_are_removed_and_what_is_being_made_stays(tmp_path: Path) -> None:
    others = {".files.tmp-01234567", ".file.tmp-of-mine"}
    for name in (".file.tmp-01234567", *others):
        (tmp_path / name).touch()
    (tmp_path / ".file.tmp-89abcdef").mkdir()
    (tmp_path / ".file.tmp-89abcdef/inside").touch()
    with replacing(tmp_path / "file") as slow:
        slow.write_text("slow", "utf-8")
        with replacing(tmp_path / "file") as fast:
            fast.write_text("fast", "utf-8")
        assert (tmp_path / "file").read_text("utf-8") == "fast"
    assert (tmp_path / "file").read_text("utf-8") == "slow"
    assert names(tmp_path) == {"file", *others}


def test_leftovers_are_listed(tmp_path: Path) -> None:
    for name in (".file.tmp-01234567", ".files.tmp-01234567"):
        (tmp_path / name).touch()
    folder = tmp_path / ".folder.tmp-01234567"
    folder.mkdir()
    assert leftovers(tmp_path / "folder") == [folder]
    with scratch_folder(tmp_path / "folder") as used:
        assert not folder.exists()
        assert leftovers(tmp_path / "folder", remove=True) == []
        assert used.exists()
    assert leftovers(tmp_path / "file") == [tmp_path / ".file.tmp-01234567"]
    assert leftovers(tmp_path / "file", remove=True) == [tmp_path / ".file.tmp-01234567"]
    assert names(tmp_path) == {".files.tmp-01234567"}


def test_a_scratch_folder(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "a/engine") as folder:
        (folder / "log").touch()
        assert folder.parent == tmp_path / "a"
    assert not names(tmp_path / "a")


@pytest.mark.parametrize("links", [True, False])
def test_a_finished_file_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """It is not lost if the process is killed before it has noticed: its old name stays, where that is possible."""

    def link(*_: object) -> NoReturn:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    (tmp_path / "made").write_text("new", "utf-8")
    (tmp_path / "target").write_text("old", "utf-8")
    if not links:
        monkeypatch.setattr(os, "link", link)
    put_in_place(tmp_path / "made", tmp_path / "target")
    assert (tmp_path / "target").read_text("utf-8") == "new"
    assert names(tmp_path) == ({"made", "target"} if links else {"target"})


def test_a_finished_file_goes_into_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("new", "utf-8")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    put_in_place(tmp_path / "made", tmp_path / "pipe")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
