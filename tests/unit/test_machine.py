"""What of a machine decides the last bits: its kind of CPU, and the number of its cores."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from bismooth.engines.streaming import Streamed
from bismooth.export import cores
from bismooth.export.cores import default_threads
from bismooth.export.machine import kind_of_cpu
from tests.graphs import decoder
from tests.streaming import divide, streamed


def test_it_names_instructions_and_kernels() -> None:
    found = kind_of_cpu()
    assert set(found) == {"kind of CPU", "BLAS"}
    assert all(found.values())


def may_run_on(monkeypatch: pytest.MonkeyPatch, cpus: set[int]) -> None:
    def affinity(_: int) -> set[int]:
        return cpus

    monkeypatch.setattr(os, "sched_getaffinity", affinity)


def test_a_thread_per_core_that_the_process_may_run_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Logical CPUs 0 and 4 are one core, 1 and 5 the next, and so on; of 8 nothing is said."""
    monkeypatch.setattr(cores, "_CPUS", tmp_path)
    for cpu in range(8):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n", "ascii")
    for cpus, count in (({0, 1, 2, 3, 4, 5, 6, 7}, 4), ({0, 4}, 1), ({1, 4}, 2), ({0, 4, 8}, 2)):
        may_run_on(monkeypatch, cpus)
        assert default_threads() == count


def test_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert default_threads() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_threads() == 1


def test_pieces_take_that_many_wherever_they_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The number travels with the piece: ONNX Runtime's own default would be that of the machine it comes to."""
    run: Streamed = streamed(decoder().save(tmp_path), np.zeros((2, 8), np.int64))
    (piece,) = divide(run.stop)
    may_run_on(monkeypatch, set(range(1000, 1003)))
    with run.running(piece, tmp_path) as opened:
        assert opened.threads == 3
    with run.running(piece, tmp_path, threads=5) as opened:
        assert opened.threads == 5
