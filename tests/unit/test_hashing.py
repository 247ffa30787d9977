"""Hashes of files and arrays."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import CancelledError
from pathlib import Path
from signal import SIGINT, pthread_kill
from threading import Timer, main_thread
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bismooth.export import hashing as module
from bismooth.export.errors import UnfinishedRunError
from bismooth.export.hashing import WrittenHash, array_sha256, file_sha256, hashing
from bismooth.export.state import State, open_state


def test_a_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_an_array() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    first = array_sha256(array)
    assert first == hashlib.sha256(b"int32 2 3 " + array.tobytes()).hexdigest()
    assert first == array_sha256(np.asfortranarray(array)) == array_sha256(array.astype(">i4"))
    others = [array.T, array.reshape(3, 2), array.astype(np.int64), array + 1, array.view(np.uint32)]
    assert len({first, *map(array_sha256, others)}) == 6


def test_types_that_numpy_does_not_know() -> None:
    array = np.ones(2, ml_dtypes.bfloat16)
    assert array_sha256(array) == hashlib.sha256(b"bfloat16 2 " + array.tobytes()).hexdigest()
    assert array_sha256(np.array(1.0)) != array_sha256(np.array([1.0]))


def test_files_in_the_background(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in "abc"}
    for path in paths.values():
        path.write_text(path.name, "utf-8")
    with hashing(paths) as hashes:
        pass
    assert hashes() == {name: hashlib.sha256(name.encode()).hexdigest() for name in paths}
    with pytest.raises(FileNotFoundError, match="missing"), hashing({"missing": tmp_path / "missing"}) as hashes:
        hashes()


def test_a_file_that_is_being_written(tmp_path: Path) -> None:
    parts = {"a": b"first" * 700_000, "b": b"", "c": b"last"}
    path, header = tmp_path / "x", b"header"
    path.write_bytes(header + b"\0" * sum(map(len, parts.values())))
    ends, end = dict[str, int](), len(header)
    for name, part in parts.items():
        ends[name] = end = end + len(part)
    with WrittenHash(path, ends) as written:
        for name in reversed(parts):
            with path.open("r+b") as file:
                file.seek(ends[name] - len(parts[name]))
                file.write(parts[name])
            written.add([name])
        assert written.hexdigest() == file_sha256(path)
    assert path.read_bytes() == header + b"".join(parts.values())


def test_an_error_ends_the_wait_for_parts(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"some bytes")
    with pytest.raises(ZeroDivisionError), WrittenHash(path, {"a": 4, "b": 10}) as written:
        written.add(["a"])
        raise ZeroDivisionError
    with pytest.raises(CancelledError):
        written.hexdigest()


ENDLESS = {name: Path("/dev/zero") for name in "ab"}


def test_an_error_ends_the_file_that_is_being_read() -> None:
    with pytest.raises(ZeroDivisionError), hashing(ENDLESS) as hashes:
        raise ZeroDivisionError
    with pytest.raises(CancelledError):
        hashes()


def test_an_interrupt_ends_the_wait_at_the_end() -> None:
    thread = main_thread().ident
    assert thread is not None
    Timer(0.2, pthread_kill, (thread, SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), hashing(ENDLESS):
        pass


@pytest.fixture
def small_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(module, "_MARK_BYTES", 40)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


CONTENT = bytes(range(100))


def test_what_was_read_is_noted(small_marks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[str, Any]] = []

    def note(_: State, key: str, value: Any) -> None:
        noted.append((key, value))

    monkeypatch.setattr(State, "note", note)
    (tmp_path / "a").write_bytes(CONTENT)
    (tmp_path / "empty").touch()
    with open_state(tmp_path / "art", "quantize", {}) as state:
        with hashing({name: tmp_path / name for name in ("a", "empty")}, state) as hashes:
            pass
        assert hashes() == {"a": sha256(CONTENT), "empty": sha256(b"")}
    assert noted == [("read a", (end, sha256(CONTENT[:end]))) for end in (48, 96, 100)]


@pytest.mark.parametrize("known", [0, 1, 16, 50, 99, 100])
def test_an_earlier_run_has_read_the_same(small_marks: None, tmp_path: Path, known: int) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    with open_state(tmp_path / "art", "quantize", {}) as state:
        state.note("read a", (known, sha256(CONTENT[:known])))
        with hashing({"a": tmp_path / "a"}, state) as hashes:
            pass
        assert hashes() == {"a": sha256(CONTENT)}
        assert state.noted("read a") == (100, sha256(CONTENT))


@pytest.mark.parametrize(("known", "size"), [(1, 100), (50, 100), (100, 100), (100, 60), (100, 0)])
def test_an_earlier_run_has_read_something_else(small_marks: None, tmp_path: Path, known: int, size: int) -> None:
    changed = (bytes([255]) + CONTENT[1:])[:size]
    (tmp_path / "a").write_bytes(changed)
    with open_state(tmp_path / "art", "quantize", {}) as state:
        state.note("read a", (known, sha256(CONTENT[:known])))
        with pytest.raises(UnfinishedRunError) as caught, hashing({"a": tmp_path / "a"}, state) as hashes:
            hashes()
        assert state.noted("read a") == (known, sha256(CONTENT[:known]))
    read = min(known, size)
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: was changed since an unfinished run began to read it. Expected SHA-256 "
        f"{sha256(CONTENT[:known])} of its first {known} bytes, got {sha256(changed[:read])} of {read}. Pass --restart "
        "to discard that run."
    )


def test_an_interrupted_run_notes_how_far_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MARK_BYTES", 1 << 60)
    with open_state(tmp_path / "art", "quantize", {}) as state:
        with pytest.raises(ZeroDivisionError), hashing({"a": Path("/dev/zero")}, state):
            time.sleep(0.1)
            raise ZeroDivisionError
        position, digest = state.noted("read a")
        assert position > 0
        assert digest == sha256(bytes(position))
