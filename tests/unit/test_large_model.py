"""Random models of LLaMA's shapes: their files, and their sizes against what is published."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.export.safetensors_file import read_header, read_tensor
from bismooth.tools import large_model
from bismooth.tools.large_model import LLAMA3_70B, LLAMA3_405B, Shape, write_large_model

SMALL = Shape(blocks=2, hidden=32, intermediate=48, heads=4, kv_heads=2, head=8, vocabulary=64)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_model_is_one_that_transformers_reads(tokenizer: Path, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, shape = tokenizer / "model", replace(SMALL, tied=tied)
    write_large_model(folder, tokenizer, shape)
    config = LlamaConfig(**json.loads((folder / "config.json").read_text("utf-8")))
    model: Any = LlamaForCausalLM(config)
    path = folder / "model.safetensors"
    entries = read_header(path)
    assert {name: entry.shape for name, entry in entries.items()} == {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    assert shape.parameters == sum(math.prod(entry.shape) for entry in entries.values()) == model.num_parameters()
    down = read_tensor(path, entries["model.layers.1.mlp.down_proj.weight"]).astype(np.float64)
    assert 0.018 < down.std() < 0.022
    assert abs(down.mean()) < 0.003
    gamma = read_tensor(path, entries["model.norm.weight"]).astype(np.float64)
    assert 0.98 < gamma.mean() < 1.02


def test_weights_are_written_in_pieces_and_repeatable(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_model, "_PIECE", 100)
    files: list[bytes] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_large_model(tokenizer / name, tokenizer, SMALL, seed=seed)
        files.append((tokenizer / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    entries = read_header(tokenizer / "a/model.safetensors")
    gate, up = (
        read_tensor(tokenizer / "a/model.safetensors", entries[f"model.layers.0.mlp.{name}_proj.weight"])
        for name in ("gate", "up")
    )
    assert not np.array_equal(gate, up)
    assert np.linalg.matrix_rank(gate.astype(np.float64)) == 32


def test_a_sparse_model_takes_no_disk(tokenizer: Path) -> None:
    folder, shape = tokenizer / "model", replace(SMALL, vocabulary=10**6)
    write_large_model(folder, tokenizer, shape, sparse=True)
    path = folder / "model.safetensors"
    assert {name: entry.shape for name, entry in read_header(path).items()} == shape.tensors
    assert path.stat().st_size > 2 * shape.parameters > 10**8
    assert path.stat().st_blocks * 512 < 10**6
    assert not read_tensor(path, read_header(path)["model.norm.weight"]).astype(np.float64).any()


def test_the_published_sizes() -> None:
    assert LLAMA3_70B.parameters == 70_553_706_496
    assert LLAMA3_405B.parameters == 405_853_388_800
    assert LLAMA3_70B.block_channels == 3 * 8192 + 28672
