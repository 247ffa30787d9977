"""A calibration that was broken off goes on behind the last segment that is done, to the same bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.calibrators.run import Observe, calibrate
from bismooth.engines.budget import base_memory
from bismooth.engines.piece_run import Batch
from bismooth.engines.pieces import Piece
from bismooth.engines.streaming import Streamed
from bismooth.export.errors import BismoothError
from bismooth.export.state import State, state_folder
from bismooth.passes.graph import load
from bismooth.passes.linears import find_linears
from tests.graphs import DecoderShape, decoder
from tests.streaming import divide, streamed

SHAPE = DecoderShape(layers=2)
SEGMENTS = 6
"""The embedding, two parts of each layer, and the last norm."""
WINDOWS = np.random.default_rng(0).integers(0, SHAPE.vocab, (6, 8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    decoder(SHAPE, tied=False).save(tmp_path / "model", external=True)
    return tmp_path / "model"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "s.safetensors"


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segment is a piece."""

    def plan(self: Streamed, _budget: int | None, first: int = 0) -> list[Piece]:
        return divide(self.stop, *range(self.stop))[first:]

    monkeypatch.setattr(Streamed, "plan", plan)


def run(folder: Path, output: Path, **options: Any) -> bytes:
    values = {linear.x: linear.k for linear in find_linears(load(folder / "model.onnx"))}
    settings: dict[str, Any] = {"rows": 9, "threads": 1, "batch_size": 2, "histograms": True}
    return calibrate(folder, values, WINDOWS, output, **(settings | options)).path.read_bytes()


def broken_off(folder: Path, output: Path, tasks: int, **options: Any) -> None:
    """Run until so many batches are done."""
    left = tasks

    def spread(task: Observe, batches: Iterable[Batch]) -> Iterator[Mapping[str, NDArray[Any]]]:
        nonlocal left
        for batch in batches:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            yield task(batch)

    with pytest.raises(KeyboardInterrupt):
        run(folder, output, spread=spread, **options)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("tasks", [1, 3, 5, 9, 14])
@pytest.mark.parametrize("grams", [False, True])
def test_it_goes_on_to_the_same_bytes(folder: Path, output: Path, tmp_path: Path, tasks: int, grams: bool) -> None:
    expected = run(folder, tmp_path / "expected.safetensors", grams=grams)
    broken_off(folder, output, tasks, grams=grams)
    assert not output.exists()
    assert state_folder(output).exists() == (tasks >= 3)
    told: list[tuple[int, Any]] = []

    def resumed(units: int, where: Any) -> None:
        told.append((units, where))

    again = run(folder, output, grams=grams, resumed=resumed)
    assert again == expected
    done = tasks // 3  # each segment has three batches
    assert told == [(done, ("calibrate", done, SEGMENTS) if done else None)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.safetensors", "model", output.name]


def test_pieces_do_not_matter(folder: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(folder, tmp_path / "expected.safetensors")
    for ends in ((1,), (2, 3), (1, 2, 3, 4)):

        def plan(self: Streamed, *_: Any, ends: tuple[int, ...] = ends) -> list[Piece]:
            return divide(self.stop, *ends)

        monkeypatch.setattr(Streamed, "plan", plan)
        assert run(folder, output) == expected


@pytest.mark.usefixtures("one_by_one")
def test_hidden_states_are_deleted_when_they_are_read(folder: Path, output: Path) -> None:
    broken_off(folder, output, 14)
    names = {path.name for path in state_folder(output).iterdir()}
    assert len(names - {"state.json", "journal.jsonl", "statistics"}) == 2  # one is read, and one is being written


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed is 0, and would be 1"),
        ({"rows": 8}, "rows is 9, and would be 8"),
        ({"grams": True}, "grams is false, and would be true"),
        ({"batch_size": 3}, "batch_size is 2, and would be 3"),
        ({"threads": 2}, "threads is 1, and would be 2"),
    ],
)
def test_another_run_is_refused_unless_it_begins_anew(
    folder: Path, output: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    broken_off(folder, output, 5)
    with pytest.raises(BismoothError, match=rf"an unfinished run is there, which would come out differently: {named}"):
        run(folder, output, **options)
    expected = run(folder, tmp_path / "expected.safetensors", **options)
    assert run(folder, output, restart=True, **options) == expected


@pytest.mark.usefixtures("one_by_one")
def test_weights_that_were_touched_are_refused(folder: Path, output: Path) -> None:
    broken_off(folder, output, 5)
    os.utime(folder / "model.safetensors")
    with pytest.raises(BismoothError, match=r"come out differently: .*model\.safetensors.*mtime_ns"):
        run(folder, output)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("damage", ["lost", "cut off", "other header"])
def test_a_statistics_file_that_is_not_as_it_was_left(folder: Path, output: Path, tmp_path: Path, damage: str) -> None:
    """What is on record of it would be zeros."""
    expected = run(folder, tmp_path / "expected.safetensors")
    broken_off(folder, output, 5)
    file = state_folder(output) / "statistics"
    size = file.stat().st_size
    if damage == "lost":
        file.unlink()
    elif damage == "cut off":
        os.truncate(file, size - 1)
    else:
        file.write_bytes(bytes(size))
    message = rf"statistics: is not what an unfinished run has left there\. Expected a file of {size} bytes"
    for _ in range(2):
        with pytest.raises(BismoothError, match=message):
            run(folder, output)
    assert run(folder, output, restart=True) == expected


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("damage", ["lost", "cut off"])
def test_hidden_states_that_are_not_as_they_were_left(folder: Path, output: Path, damage: str) -> None:
    broken_off(folder, output, 3)
    for file in state_folder(output).glob("*.bin"):
        if damage == "lost":
            file.unlink()
        else:
            os.truncate(file, 5)
    with pytest.raises(BismoothError, match=r"\.bin: is not what an unfinished run has left there\."):
        run(folder, output)


@pytest.mark.usefixtures("one_by_one")
def test_files_are_on_disk_before_a_segment_is_on_record(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bytes, and their names in the folder."""
    unsynced, record_all, fsync = set[str](), State.record_all, os.fsync
    state, known = state_folder(output), set[str]()

    def sync(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), state.stat()):
            known.update(path.name for path in state.iterdir())
        fsync(descriptor)

    def record(self: State, units: dict[str, Any], progress: Any = None) -> None:
        unsynced.update({path.name for path in state.iterdir()} - known)
        record_all(self, units, progress)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(State, "record_all", record)
    run(folder, output)
    assert known >= {"statistics", "state.json", "journal.jsonl"}
    assert not unsynced


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_full_disk(folder: Path, output: Path, tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics file is allocated first, then the hidden states between pieces."""
    expected = run(folder, tmp_path / "expected.safetensors")
    left = call

    def allocate(*_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    with pytest.raises(BismoothError, match=r"s\.safetensors: the disk is full\. Free some space and run the command"):
        run(folder, output)
    assert not output.exists()
    assert run(folder, output) == expected


def test_batches_are_as_small_as_the_memory_asks_for(folder: Path) -> None:
    large = streamed(folder / "model.onnx", np.zeros((8, 2000), np.int64), batch_size=8)
    small = streamed(folder / "model.onnx", np.zeros((8, 2000), np.int64), batch_size=2)
    least = small.least(0, small.stop)
    assert large.least(0, large.stop) > least
    assert large.fitted(None).batch_size == 8
    assert large.fitted(10**12).batch_size == 8
    assert large.fitted(base_memory() + least + 10**6).batch_size == 2
    assert large.fitted(1).batch_size == 1


@pytest.mark.usefixtures("one_by_one")
def test_batches_of_an_earlier_run_are_kept(
    folder: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(folder, tmp_path / "expected.safetensors", batch_size=3)
    fits = 3

    def fitted(self: Streamed, _budget: int | None) -> Streamed:
        return replace(self, batch_size=fits)

    monkeypatch.setattr(Streamed, "fitted", fitted)
    broken_off(folder, output, 3, batch_size=None)
    fits = 1
    assert run(folder, output, batch_size=None) == expected
