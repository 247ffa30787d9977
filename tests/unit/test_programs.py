"""What is said of memory before programs run, and in which batches a run that was broken off goes on."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from bismooth.engines.memory import current_rss
from bismooth.engines.pieces import Piece
from bismooth.engines.streaming import Streamed
from bismooth.export.artifact import Artifact
from bismooth.export.errors import BismoothError
from bismooth.export.state import open_state
from bismooth.passes.gates import Gates, Hop
from bismooth.passes.graph import load, save
from bismooth.passes.precision import SetPrecision
from bismooth.passes.progress import silent
from bismooth.tools import hop_programs, programs
from bismooth.tools.halfsim import HalfSimulation
from bismooth.tools.hop_programs import HopPrograms
from bismooth.tools.programs import Needed, Program, Programs, scratch
from bismooth.tools.verify import verify_artifact
from tests.models import VOCAB, exported, tokens

IDS = tokens(3, 9)["input_ids"]
KEY = "model.onnx plain 3 windows"


def segments(self: Streamed, _budget: int | None, first: int = 0, stop: int | None = None) -> list[Piece]:
    """The most pieces that there can be."""
    return [Piece(segment, segment + 1) for segment in range(first, self.stop if stop is None else stop)]


@dataclass
class Takes:
    """Something that takes memory."""

    size: int

    def least(self, programs: Programs) -> int:
        assert programs.ids is IDS
        return self.size


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A Llama with a graph in float16."""
    model, folder = exported("llama"), tmp_path_factory.mktemp("llama") / "artifact"
    shutil.copytree(model.folder, folder)
    graph = load(folder / "model.onnx")
    SetPrecision("float16").apply(graph)
    save(graph, folder / "half.onnx")
    return Artifact(folder, replace(model.manifest, graphs={**model.manifest.graphs, "float16": "half.onnx"}))


def refuse(*_arguments: object) -> None:
    raise AssertionError


def test_the_budget_that_is_named_is_enough_for_all(tmp_path: Path) -> None:
    def check(memory: int, *sizes: int) -> None:
        needed: list[Needed] = [Takes(size) for size in sizes]
        Programs(IDS, tmp_path, silent, memory).check(tmp_path, needed, "or less text")

    check(current_rss() + 10**9, 5 * 10**8, 1)
    with pytest.raises(BismoothError) as raised:
        check(10**6, 10**9, 3 * 10**9, 2 * 10**9)
    words = r": --memory is too small for what is run on windows of 9 tokens. Expected (\d+)MB or more, or less text."
    match = re.fullmatch(re.escape(str(tmp_path)) + words, str(raised.value))
    assert match is not None
    least = int(match[1]) * 10**6
    assert least > 3 * 10**9
    check(least, 10**9, 3 * 10**9, 2 * 10**9)


def test_where_there_is_plenty_nothing_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def budget_of(_memory: int | None) -> int:
        return 10**10

    monkeypatch.setattr(programs, "find_budget", budget_of)
    (tmp_path / "weights").write_bytes(bytes(1000))
    Programs(IDS, tmp_path, silent).check(tmp_path, [Takes(10**11)], "or less text")
    for memory, size in ((10**10, 1000), (None, 10**9)):
        os.truncate(tmp_path / "weights", size)
        with pytest.raises(BismoothError, match="--memory is too small"):
            Programs(IDS, tmp_path, silent, memory).check(tmp_path, [Takes(10**11)], "or less text")


@pytest.mark.parametrize("hop", [Hop.FLOAT, Hop.DECODE, Hop.HALF])
def test_verify_refuses_before_anything_runs(artifact: Artifact, hop: Hop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is the last that would run."""

    def huge(_self: object, programs: Programs) -> int:
        assert programs.ids is IDS
        return 10**12

    monkeypatch.setattr(Programs, "runs", refuse)
    kind = {Hop.FLOAT: "TorchModel", Hop.DECODE: "Program", Hop.HALF: "Simulated"}[hop]
    monkeypatch.setattr(getattr(programs if kind == "Program" else hop_programs, kind), "least", huge)
    with pytest.raises(BismoothError, match=r"--memory is too small .* Expected 100\d{4}MB or more, a shorter --le"):
        verify_artifact(artifact, IDS, Gates(), [hop], memory=10**10)


def test_what_each_hop_runs(artifact: Artifact, tmp_path: Path) -> None:
    table = HopPrograms(artifact, 3, 9)
    names = {hop: [type(item).__name__ for item in table.of([hop])] for hop in Hop}
    assert names == {
        Hop.FLOAT: ["Program", "TorchModel"],
        Hop.FOLDED: ["Program"],
        Hop.REFERENCE: ["Program", "Program"],
        Hop.INT8: ["Program", "Program", "Program"],
        Hop.DECODE: ["Program", "Program"],
        Hop.HALF: ["Program", "Simulated"],
        Hop.AUDIT: [],
        Hop.DEVICE: [],
    }
    needs = {item.least(Programs(IDS, tmp_path, silent)) for hop in Hop for item in table.of([hop])}
    assert min(needs) > 2**20
    assert len(needs) >= 4  # whole windows, with a cache, simulated, in torch


def test_a_simulation_takes_smaller_batches_before_it_refuses(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def need(self: Streamed, _piece: Piece) -> int:
        return self.windows_per_run * 10**12

    def run(self: Programs, streamed: Streamed, _key: str, _step: str) -> Iterator[None]:
        sizes.append(streamed.batch_size)
        return iter(())

    monkeypatch.setattr(Streamed, "need", need)
    monkeypatch.setattr(Programs, "runs", run)
    with HalfSimulation(artifact.graph("float16")) as simulation:
        list(simulation.outputs(Programs(IDS, tmp_path, silent, 11 * 10**11), 3))
    assert sizes == [1]


def test_the_last_batch_is_held_while_the_next_one_runs(tmp_path: Path) -> None:
    program = Program(exported("llama").graph, "plain", 3)
    streamed = Programs(IDS, tmp_path, silent).streamed(program)
    last = Piece(streamed.stop - 1, streamed.stop)
    without = replace(streamed, held_per_window=0)
    assert streamed.need(last) - without.need(last) == 3 * 9 * VOCAB * 4
    cached = Programs(IDS, tmp_path, silent).streamed(replace(program, prefill=4))
    assert cached.need(last) - replace(cached, held_per_window=0).need(last) == 2 * 3 * 9 * VOCAB * 4


def test_a_refusal_names_the_windows_that_there_are(tmp_path: Path) -> None:
    streamed = Programs(IDS, tmp_path, silent).streamed(Program(exported("llama").graph, "plain", 3))
    assert streamed.batch_size > 3
    with pytest.raises(BismoothError, match=r"one part of the model on 3 x 9 tokens at once\. Expected \d+MB or more"):
        streamed.plan(10**6)


def test_a_run_that_was_broken_off_goes_on_in_batches_of_the_same_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(exported("llama").graph, "plain", 3)
    monkeypatch.setattr(Streamed, "plan", segments)
    sizes: list[int] = []

    def fitted(self: Streamed, _budget: int | None, _first: int = 0) -> Streamed:
        return replace(self, batch_size=2 - len(sizes))

    def stop(_step: str, done: int, _total: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    running = Streamed.running

    def noted(self: Streamed, piece: Piece, folder: Path, threads: int | None = None) -> object:
        sizes.append(self.batch_size)
        return running(self, piece, folder, threads)

    monkeypatch.setattr(Streamed, "fitted", fitted)
    monkeypatch.setattr(Streamed, "running", noted)
    with pytest.raises(KeyboardInterrupt), open_state(tmp_path / "report", "verify", {}) as state:
        list(Programs(IDS, state.folder, stop, state=state).outputs(program, "run"))
    assert sizes == [2, 2]
    with open_state(tmp_path / "report", "verify", {}) as state:
        assert state.get(KEY) == {"stop": 1, "batch": 2}
        resumed = Programs(IDS, state.folder, silent, state=state)
        assert resumed.fitted(resumed.streamed(program), KEY).batch_size == 2
        assert len(list(resumed.outputs(program, "run"))) == 3
    assert set(sizes) == {2}


def test_a_graph_that_is_widened_when_it_is_opened_counts_as_such(tmp_path: Path) -> None:
    """The weights of the larger graph as they are stored, folded to float32, and packed."""
    program = Program(exported("llama").graph, "plain", 3)
    streamed = Programs(IDS, tmp_path, silent).streamed(program)
    weights = sum(np.prod(tensor.dims) for tensor in streamed.maker.model.graph.initializer)
    need = streamed.need(Piece(0, streamed.stop)) + 8 * int(weights)

    def fits(room: int, *graphs: Program) -> bool:
        return Programs(IDS, tmp_path, silent, current_rss() + room).fit_whole(*graphs)

    assert fits(need + 10**8, program, program)
    assert not fits(need - 10**8, program)
    assert Programs(IDS, tmp_path, silent, None).fit_whole(program)


def test_what_a_killed_process_has_left_in_the_artifact_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".hidden-states.tmp-0123abcd"
    (left / "deep").mkdir(parents=True)
    with scratch(tmp_path) as folder:
        assert folder.parent == tmp_path
        assert list(tmp_path.iterdir()) == [folder]
        with scratch(tmp_path) as other:  # of a process that is running
            assert folder.is_dir()
            assert other != folder
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(_path: Path, _mode: int) -> bool:
        return False

    monkeypatch.setattr("os.access", cannot)
    with scratch(tmp_path) as folder:
        assert folder.is_dir()
        assert tmp_path not in folder.parents
    assert not folder.exists()
