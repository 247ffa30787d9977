"""Steps of quantization in other hands: tasks, items and results travel, and the output stays the same bytes."""

import json
import pickle
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from bismooth.passes.executor import LOCAL, Executor, ItemT, ResultT, Task, each
from bismooth.passes.open_graph import OpenGraph
from bismooth.passes.quantize import QuantizeResult, quantize_graph
from bismooth.passes.recipe import Recipe
from tests.graphs import Builder, decoder
from tests.norm_and_linears import feeds, inputs_of_linears
from tests.quantizing import Seen, watch

STEPS = [
    "smooth",
    "look for walls",
    "smooth again",
    "check folds",
    "lay out",
    "store 16-bit weights",
    "store folded weights",
    "quantize weights",
]
WALL, PROJECTION = 3, "model.layers.0.self_attn"


@dataclass
class Elsewhere:
    """Runs a copy of the task on copies of the items, and gives what is left of the results in a journal."""

    seen: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def map(self, task: Task[ItemT, ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
        there: Task[ItemT, ResultT] = pickle.loads(pickle.dumps(task))
        for item in items:
            self.seen.setdefault(task.step, []).append(item.name)
            yield task.decode(json.loads(json.dumps(there.encode(there(pickle.loads(pickle.dumps(item)))))))


class Processes:
    """Each step in new processes."""

    def map(self, task: Task[ItemT, ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            yield from pool.map(task, items)


def walled() -> Builder:
    """A decoder with a wall in what q, k and v read, so that they are quantized in groups, and smoothed again."""
    b = decoder(tied=False)
    for name in "qkv":
        b.initializers[f"{PROJECTION}.{name}_proj.weight"][:, WALL] *= 300
    return b


def walls_and_float() -> Recipe:
    walls = [rule for rule in Recipe.load("w8a8-mixed").to_dict()["layers"] if rule["match"] == "@walls"]
    rules = [{"match": "model.layers.1.self_attn.v_proj", "weights": None}, *walls]
    smoothing = {"alphas": [0.5], "refine_steps": 0}
    return Recipe.from_dict({"extends": "w8a8-mixed", "smoothing": smoothing, "layers": rules}, name="test")


def run(folder: Path, executor: Executor) -> tuple[QuantizeResult, dict[str, bytes]]:
    b, target = walled(), folder / "quantized"
    target.mkdir(parents=True)
    source = b.save(folder, external=True)
    seen: Seen = watch(b, folder / "seen", feeds(b), *inputs_of_linears(b, folder / "inputs"))
    result = quantize_graph(source, target, walls_and_float(), seen, executor=executor)
    return result, {path.name: path.read_bytes() for path in target.iterdir()}


def plain(result: QuantizeResult) -> dict[str, Any]:
    return {name: value for name, value in vars(result).items() if name != "passes"}


def test_every_step_runs_on_copies_and_gives_the_same_bytes(tmp_path: Path) -> None:
    there = Elsewhere()
    expected, files = run(tmp_path / "local", LOCAL)
    result, copied = run(tmp_path / "copied", there)
    assert list(there.seen) == STEPS
    assert all(len(set(names)) == len(names) > 0 for names in there.seen.values())
    assert copied == files
    assert plain(result) == plain(expected)
    assert expected.broken is not None
    assert f"{PROJECTION}.q_proj" in expected.broken


@pytest.mark.timeout(180)
def test_other_processes_give_the_same_bytes(tmp_path: Path) -> None:
    assert run(tmp_path / "there", Processes())[1] == run(tmp_path / "local", LOCAL)[1]


def test_a_graph_is_opened_once_while_its_file_stays_the_same(tmp_path: Path) -> None:
    path = decoder().save(tmp_path)
    first = OpenGraph.load(path)
    assert OpenGraph.load(path) is first
    assert pickle.loads(pickle.dumps(first)) is first
    again = decoder(tied=False).save(tmp_path)
    assert again == path
    assert OpenGraph.load(path) is not first


def test_a_graph_without_a_file_does_not_travel(tmp_path: Path) -> None:
    graph = OpenGraph(OpenGraph.load(decoder().save(tmp_path)).graph)
    with pytest.raises(TypeError, match="a graph without a file cannot be pickled"):
        pickle.dumps(graph)


def test_items_that_are_done_are_named(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Named:
        name: str

    class Length:
        step = "count"

        def __call__(self, item: Named) -> int:
            return len(item.name)

        def encode(self, result: int) -> int:
            return result

        def decode(self, plain: int) -> int:
            return plain

    done: list[str] = []
    items = [Named("a"), Named("bc")]
    assert list(each(LOCAL, Length(), items, done.append)) == [(items[0], 1), (items[1], 2)]
    assert done == ["a", "bc"]
