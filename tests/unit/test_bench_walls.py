"""The bench of remedies for walls: limits that are judged."""

from typing import Any

import pytest

from bismooth.tools import bench_walls
from bismooth.tools.bench_walls import Limit


def _row(model: str, recipe: str, kl: float, factor: int = 0, seed: int = 0) -> dict[str, Any]:
    return {"model": model, "recipe": recipe, "kl": kl, "factor": factor, "seed": seed}


ROWS = [
    _row("unmodified", "w8a8", 0.01),
    _row("scale", "w8a8", 0.011, 100),
    _row("scale", "w8a8", 0.02, 300),
    _row("scale", "w8a8-mixed", 0.03, 100),
    _row("scale", "w8a8-mixed", 0.01, 300),
]


@pytest.mark.parametrize(
    ("limit", "worst", "holds"),
    [
        (Limit("scale", None, "w8a8", "w8a8", at_most=2.0), 2.0, True),
        (Limit("scale", 100, "w8a8", "w8a8", at_most=1.05), 1.1, False),
        (Limit("scale", 100, "w8a8", above=0.01), 0.011, True),
        (Limit("scale", None, "w8a8", above=0.011), 0.011, False),
        (Limit("scale", None, "w8a8-mixed", "w8a8", of="scale", at_most=3.0), 0.03 / 0.011, True),
    ],
)
def test_a_limit_is_held_against_the_worst_stand_in(
    monkeypatch: pytest.MonkeyPatch, limit: Limit, worst: float, holds: bool
) -> None:
    other = Limit("rotate", None, "w8a8", at_most=1.0)
    monkeypatch.setattr(bench_walls, "LIMITS", (limit, other))
    (row,) = bench_walls.judged(ROWS)
    assert row["worst"] == pytest.approx(worst)
    assert row["holds"] is holds
