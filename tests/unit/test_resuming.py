"""Results on record are not computed again, and those that are new are recorded when they are on disk."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bismooth.export.errors import BismoothError
from bismooth.export.state import State, open_state, read_units, state_folder
from bismooth.passes import resuming
from bismooth.passes.executor import LOCAL
from bismooth.passes.resuming import ResumingExecutor
from tests.artifacts import names


@dataclass(frozen=True)
class Named:
    name: str


@dataclass
class Double:
    """Doubles letters, writes them to a file, and remembers whose turn it was."""

    file: Path
    step: str = "double"
    fails_at: str = ""
    calls: list[str] = field(default_factory=list[str])

    def __call__(self, item: Named) -> tuple[str, ...]:
        if item.name == self.fails_at:
            raise ZeroDivisionError
        self.calls.append(item.name)
        with self.file.open("a") as file:
            file.write(item.name)
        return (item.name * 2,)

    def encode(self, result: tuple[str, ...]) -> Any:
        return list(result)

    def decode(self, plain: Any) -> tuple[str, ...]:
        return tuple(plain)


LETTERS = [Named(letter) for letter in "abcdef"]
DOUBLED = [(letter * 2,) for letter in "abcdef"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "art"


def test_an_uninterrupted_run(target: Path) -> None:
    with open_state(target, "quantize", {}) as state:
        task = Double(state.folder / "data")
        with ResumingExecutor(LOCAL, state, task.file) as executor:
            assert list(executor.map(task, iter(LETTERS))) == DOUBLED
        assert read_units(state.folder) == (
            {f"double: {letter}": [letter * 2] for letter in "abcdef"},
            ("double", 6, 6),
        )
        assert sorted(task.calls) == list("abcdef")


def test_what_an_earlier_run_did_is_not_done_again(target: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_state(target, "quantize", {}) as state:
        first = Double(state.folder / "data", fails_at="d")
        with ResumingExecutor(LOCAL, state, first.file) as executor:
            list(executor.map(first, LETTERS))
    done = {name.removeprefix("double: ") for name in read_units(state.folder)[0]}
    assert done == set("abc")
    with open_state(target, "quantize", {}) as state:
        second = Double(state.folder / "data")
        with ResumingExecutor(LOCAL, state, second.file) as executor:
            assert list(executor.map(second, LETTERS)) == DOUBLED
            assert state.progress in (("double", 3, 6), ("double", 6, 6))
            other = Double(state.folder / "data", step="double again")
            assert list(executor.map(other, LETTERS[:2])) == DOUBLED[:2]
        assert sorted(second.calls) == list("def")
        assert sorted(other.calls) == list("ab")


def test_data_are_on_disk_before_results_are_on_record(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    record_all = State.record_all

    def record(state: State, units: dict[str, Any], progress: Any = None) -> None:
        events.append(sorted(units))
        record_all(state, units, progress)

    def flush(path: Path) -> None:
        events.append(path.name)

    monkeypatch.setattr(State, "record_all", record)
    monkeypatch.setattr(resuming, "flush", flush)
    monkeypatch.setattr(resuming, "COLLECT_SECONDS", 60)
    with open_state(target, "quantize", {}) as state:
        task = Double(state.folder / "data")
        with ResumingExecutor(LOCAL, state, task.file) as executor:
            list(executor.map(task, LETTERS))
            assert events == []
        assert events == ["data", ".art.partial", [f"double: {letter}" for letter in "abcdef"]]


def test_results_are_recorded_while_the_work_goes_on(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "COLLECT_SECONDS", 0.01)
    recorded = threading.Event()
    record_all = State.record_all

    def record(state: State, units: dict[str, Any], progress: Any = None) -> None:
        record_all(state, units, progress)
        recorded.set()

    monkeypatch.setattr(State, "record_all", record)
    with open_state(target, "quantize", {}) as state:
        task = Double(state.folder / "data")
        with ResumingExecutor(LOCAL, state, task.file) as executor:
            results = executor.map(task, LETTERS)
            assert next(results) == ("aa",)
            assert recorded.wait(10)
            assert "double: a" in state
            assert list(results) == DOUBLED[1:]


@pytest.mark.parametrize("fails", ["flush", "end"])
def test_a_disk_that_is_full(target: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """It ends the run at the next result, or at the end; what was recorded before stays."""
    monkeypatch.setattr(resuming, "COLLECT_SECONDS", 0 if fails == "flush" else 60)
    full = False

    def flush(path: Path) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(resuming, "flush", flush)

    def endless() -> Iterator[Named]:
        return (Named(f"{number}") for number in range(100_000))

    task = Double(state_folder(target) / "data")
    with pytest.raises(BismoothError, match="the disk is full") as caught, open_state(target, "quantize", {}) as state:
        state.record("before", 1)
        with ResumingExecutor(LOCAL, state, task.file) as executor:
            full = True
            for _ in executor.map(task, endless() if fails == "flush" else LETTERS):
                pass
    assert len(task.calls) < 100_000
    assert read_units(state.folder)[0] == {"before": 1}
    kept = f"What was done is kept in {state.folder} (units of work: 1): the same command goes on from there."
    assert caught.value.__notes__ == [kept]
    assert names(target.parent) == {".art.partial"}


def test_the_error_that_ends_a_run_is_told(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the disk is full as well."""
    monkeypatch.setattr(resuming, "COLLECT_SECONDS", 60)

    def flush(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(resuming, "flush", flush)
    with pytest.raises(ZeroDivisionError), open_state(target, "quantize", {}) as state:
        task = Double(state.folder / "data", fails_at="d")
        with ResumingExecutor(LOCAL, state, task.file) as executor:
            list(executor.map(task, LETTERS))
    assert names(target.parent) == set()
