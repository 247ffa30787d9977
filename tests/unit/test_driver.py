"""The driver: passes in order, a check after each, and a record of what was run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from bismooth.passes._gs import Graph
from bismooth.passes.driver import run_passes
from bismooth.passes.graph import load
from tests.blocks import gated_mlp


@dataclass(frozen=True)
class Note:
    """Writes down that it was applied, and drops nodes from the end."""

    log: list[str] = field(compare=False)
    dropped: int = 0

    name: ClassVar[str] = "note"

    def apply(self, graph: Graph) -> None:
        self.log.append(self.name)
        del graph.nodes[len(graph.nodes) - self.dropped :]


class Second(Note):
    name: ClassVar[str] = "second"


def test_passes_are_applied_checked_and_recorded_in_order(tmp_path: Path) -> None:
    graph, log = load(gated_mlp().save(tmp_path)), list[str]()
    count = len(graph.nodes)
    records = run_passes(graph, [Note(log), Second(log, dropped=2)], lambda _, name: log.append(f"check {name}"))
    assert log == ["note", "check note", "second", "check second"]
    assert [(record.name, record.nodes) for record in records] == [("note", count), ("second", count - 2)]
    assert all(0 <= record.seconds < 5 for record in records)


def test_a_failing_check_stops_the_passes(tmp_path: Path) -> None:
    graph, log = load(gated_mlp().save(tmp_path)), list[str]()

    def check(_: Graph, name: str) -> None:
        raise ValueError(f"after {name}")

    with pytest.raises(ValueError, match="after note"):
        run_passes(graph, [Note(log), Second(log)], check)
    assert log == ["note"]


def test_no_passes_no_records(tmp_path: Path) -> None:
    assert run_passes(load(gated_mlp().save(tmp_path)), []) == ()
