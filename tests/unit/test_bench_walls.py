"""The benches: limits that are judged, and the large model's files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.export.safetensors_file import read_header, read_tensor
from bismooth.tools import bench_walls, large_model
from bismooth.tools.bench_walls import Limit
from bismooth.tools.large_model import write_large_model


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


def test_a_large_model_is_one_that_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, size in (("HIDDEN", 32), ("INTERMEDIATE", 48), ("HEADS", 4), ("KV_HEADS", 2), ("HEAD", 8)):
        monkeypatch.setattr(large_model, name, size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    folder = tmp_path / "model"
    write_large_model(folder, tmp_path, blocks=2, vocabulary=64)
    config = LlamaConfig(**json.loads((folder / "config.json").read_text("utf-8")))
    loaded: Any = LlamaForCausalLM(config).state_dict()
    path = folder / "model.safetensors"
    entries = read_header(path)
    assert {name: entry.shape for name, entry in entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in loaded.items() if name != "lm_head.weight"
    }
    down = read_tensor(path, entries["model.layers.1.mlp.down_proj.weight"]).astype(np.float64)
    assert 0.018 < down.std() < 0.022
