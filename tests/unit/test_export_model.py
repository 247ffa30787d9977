"""Sources that get as far as the model and no further, and what is copied beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.export.model import export_model
from bismooth.export.safetensors_file import SafetensorsWriter
from bismooth.export.source import HuggingFaceSource, list_side_files, resolve_source


def source(folder: Path, **config: Any) -> Path:
    """A model folder with one tensor, which belongs to no model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with SafetensorsWriter(folder / "model.safetensors", [("w", np.dtype(np.float32), (1,))]) as writer:
        writer.write("w", np.ones(1, np.float32))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "artifact").mkdir()
    return tmp_path / "artifact"


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
}
BROKEN: dict[str, dict[str, Any]] = {
    "no model type": {},
    "unknown model type": {"model_type": "novel"},
    "not a text model": {"model_type": "vit", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2},
    "a size that is text": LLAMA | {"hidden_size": "sixteen"},
    "heads that do not fit": LLAMA | {"num_attention_heads": 3, "hidden_size": 16},
    "an unknown activation": LLAMA | {"hidden_act": "wobble"},
    "an unknown rotary embedding": LLAMA | {"rope_parameters": {"rope_type": "wobble", "rope_theta": 1.0}},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_configuration_that_describes_no_model(tmp_path: Path, target: Path, case: str) -> None:
    path = source(tmp_path / "source", **BROKEN[case])
    with pytest.raises(BismoothError, match=r"config\.json: no model can be made from it: .|cannot be traced"):
        export_model(path, target)


def test_weights_of_another_model(tmp_path: Path, target: Path) -> None:
    path = source(tmp_path / "source", **LLAMA)
    with pytest.raises(
        BismoothError, match=r"source: the checkpoint has no tensor model\..* It has 1 tensors, for exam"
    ):
        export_model(path, target)


def test_files_beside_the_weights(tmp_path: Path, target: Path) -> None:
    """Those that belong to a model are copied; copies can be changed without harm to the source."""
    path = source(tmp_path / "source", **LLAMA)
    wanted = (
        *("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"),
        *("LICENSE", "README.md"),
    )
    for name in (*wanted, "trainer_state.json", "bismooth.json", "model.onnx"):
        (path / name).write_text("{}", "utf-8")
    with pytest.raises(BismoothError, match="has no tensor"):
        export_model(path, target)
    assert all((target / name).read_text("utf-8") == "{}" for name in wanted)
    assert {file.name for file in target.iterdir()} == {*wanted, "config.json", "model.safetensors"}
    assert all((target / name).stat().st_nlink == 1 for name in (*wanted, "config.json"))
    assert (target / "model.safetensors").samefile(path / "model.safetensors")


def test_weights_that_are_called_like_a_file_beside_them_are_placed_once(tmp_path: Path, target: Path) -> None:
    path = source(tmp_path / "source", **LLAMA)
    (path / "model.safetensors").rename(path / "vocab.safetensors")
    (path / "LICENSE").write_text("{}", "utf-8")
    resolved = resolve_source(path)
    assert isinstance(resolved, HuggingFaceSource)
    assert [file.name for file in list_side_files(resolved)] == ["config.json", "LICENSE"]
    with pytest.raises(BismoothError, match="has no tensor"):
        export_model(path, target)
    assert (target / "vocab.safetensors").samefile(path / "vocab.safetensors")
    assert {file.name for file in target.iterdir()} == {"config.json", "LICENSE", "vocab.safetensors"}


def test_references_to_python_code_are_left_out(tmp_path: Path, target: Path) -> None:
    path = source(tmp_path / "source", **LLAMA, auto_map={"AutoConfig": "configuration.Mine"})
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}, "eos_token": "…"}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
    (path / "generation_config.json").write_text("{ no JSON", "utf-8")
    (path / "configuration.py").write_text("raise SystemExit", "utf-8")
    with pytest.raises(BismoothError, match="has no tensor"):
        export_model(path, target)
    assert json.loads((target / "config.json").read_text("utf-8")) == LLAMA
    assert json.loads((target / "tokenizer_config.json").read_text("utf-8")) == {"eos_token": "…"}
    assert (target / "generation_config.json").read_text("utf-8") == "{ no JSON"
    assert not (target / "configuration.py").exists()
