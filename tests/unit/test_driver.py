"""The driver: passes in order, the graph verified after each, and a record of what was run."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes._gs import Graph, Node, make_node, make_variable, set_type
from bismooth.passes.driver import run_passes, verify
from bismooth.passes.graph import load
from tests.blocks import gated_mlp
from tests.graphs import decoder

FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class Note:
    """Writes down that it was applied, and changes the graph as it is told."""

    log: list[str] = field(compare=False)
    change: Callable[[Graph], object] = field(default=lambda _: None, compare=False)

    name: ClassVar[str] = "note"

    def apply(self, graph: Graph) -> None:
        self.log.append(self.name)
        self.change(graph)


class Second(Note):
    name: ClassVar[str] = "second"


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return load(gated_mlp().save(tmp_path))


def named(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)


def add_identity(graph: Graph) -> None:
    result = make_variable("copy", FLOAT, None)
    graph.nodes.append(make_node("Identity", "copy", [graph.outputs[0]], [result]))


def test_passes_are_applied_checked_and_recorded_in_order(graph: Graph) -> None:
    log, count = list[str](), len(graph.nodes)
    passes = [Note(log), Second(log, add_identity)]
    records = run_passes(graph, passes, lambda _, name: log.append(f"check {name}"))
    assert log == ["note", "check note", "second", "check second"]
    assert [(record.name, record.nodes) for record in records] == [("note", count), ("second", count + 1)]
    assert all(0 <= record.seconds < 5 for record in records)


def test_a_failing_check_stops_the_passes(graph: Graph) -> None:
    log = list[str]()

    def check(_: Graph, name: str) -> None:
        raise ValueError(f"after {name}")

    with pytest.raises(ValueError, match="after note"):
        run_passes(graph, [Note(log), Second(log)], check)
    assert log == ["note"]


def test_no_passes_no_records(graph: Graph) -> None:
    assert run_passes(graph, []) == ()


def _rename(graph: Graph, name: str) -> None:
    named(graph, "up/MatMul").name = name


def _drop(graph: Graph, name: str) -> None:
    graph.nodes.remove(named(graph, name))


def _delay(graph: Graph) -> None:
    node = named(graph, "gate/MatMul")
    graph.nodes.remove(node)
    graph.nodes.append(node)


def _close_a_cycle(graph: Graph) -> None:
    named(graph, "up/MatMul").inputs[0] = graph.outputs[0]


def _compute_twice(graph: Graph) -> None:
    named(graph, "up/MatMul").outputs[0].name = named(graph, "gate/MatMul").outputs[0].name


def _compute_an_input(graph: Graph) -> None:
    named(graph, "up/MatMul").outputs[0].name = "x"


def _forget_a_type(graph: Graph) -> None:
    set_type(named(graph, "up/MatMul").outputs[0], None, None)


BREAKS: dict[str, tuple[Callable[[Graph], None], str]] = {
    "name": (lambda graph: _rename(graph, ""), "node '' (MatMul) broken. Expected a name of its own, got none."),
    "names": (
        lambda graph: _rename(graph, "gate/MatMul"),
        "node 'gate/MatMul' (MatMul) broken. Expected a name of its own, got that of another node.",
    ),
    "dangling": (
        lambda graph: _drop(graph, "gate/MatMul"),
        "Expected inputs that were computed before it, got 'v",
    ),
    "order": (_delay, "Expected inputs that were computed before it, got 'v"),
    "cycle": (_close_a_cycle, "node 'up/MatMul' (MatMul) broken. Expected inputs that were computed before it, got "),
    "sources": (_compute_twice, "Expected outputs of its own, got 'v2_0', which belongs to gate/MatMul."),
    "input": (_compute_an_input, "got 'x', which belongs to the graph's inputs."),
    "type": (_forget_a_type, "node 'up/MatMul' (MatMul) broken. Expected outputs of a known type, got 'v"),
    "output": (
        lambda graph: _drop(graph, "down/MatMul"),
        "left the graph broken. Expected a source for every output of the graph, got none for 'v",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_pass_that_breaks_the_graph_is_named_with_the_node(graph: Graph, what: str) -> None:
    change, words = BREAKS[what]
    log = list[str]()
    with pytest.raises(BismoothError, match=re.escape(words)) as caught:
        run_passes(graph, [Note(log), Second(log, change), Note(log)])
    assert log == ["note", "second"]
    assert str(caught.value).startswith("pass second: it left ")
    assert str(caught.value).endswith("report it.")


def test_types_that_were_unknown_before_are_no_fault_of_a_pass(graph: Graph) -> None:
    _forget_a_type(graph)
    assert len(run_passes(graph, [Note([]), Second([])])) == 2


def test_sound_graphs_are_verified_without_reading_weights(tmp_path: Path) -> None:
    path = decoder().save(tmp_path, external=True)
    graph = load(path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    verify(graph, "load")
