"""What inspect says of artifacts and ONNX files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bismooth.export.artifact import Manifest, write_manifest
from bismooth.export.errors import BismoothError
from bismooth.tools.inspect import inspect_path
from tests.quantized import channel_scaled_activation, make, per_token, save, weight_only

DOCS = Path(__file__).parents[2] / "docs"
GRAPHS = {"float32": "model.onnx"}


def test_a_good_graph(tmp_path: Path) -> None:
    result = inspect_path(save(per_token("q_proj", "k_proj"), tmp_path))
    document = result.to_json()
    assert (document["linears"], document["qdq_mac_share"], document["weight_only_mac_share"]) == (2, 1.0, 0.0)
    assert document["operators"]["MatMul"] == 2
    assert set(document["findings"]) == {"tensorrt-rtx", "onnxruntime"}
    assert result.failures == ()


def test_weights_alone(tmp_path: Path) -> None:
    document = inspect_path(save(weight_only(), tmp_path)).to_json()
    assert (document["qdq_mac_share"], document["weight_only_mac_share"]) == (0.0, 1.0)


def test_a_foreign_graph_fails_by_its_errors_and_an_own_one_does_not(tmp_path: Path) -> None:
    path = save(channel_scaled_activation(), tmp_path)
    result = inspect_path(path)
    assert result.failures
    assert all(re.match(r"tensorrt-rtx.*: .*\[[\w-]+\]$", failure) for failure in result.failures)
    assert result.brief()["failures"] == list(result.failures)
    write_manifest(tmp_path, Manifest("float", {}, GRAPHS))
    assert inspect_path(path).failures == ()


def test_a_broken_verdict(tmp_path: Path) -> None:
    save(per_token("q_proj"), tmp_path)
    write_manifest(tmp_path, Manifest("float", {}, GRAPHS))
    assert inspect_path(tmp_path).to_json()["verify"] is None
    (tmp_path / "verify.json").write_text("[]")
    with pytest.raises(BismoothError, match=r"verify\.json: not a verdict"):
        inspect_path(tmp_path)


def test_an_engine_without_its_audit(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest("engine", {}, {}))
    with pytest.raises(BismoothError, match=r"the engine has no audit beside it. Build the engine again"):
        inspect_path(tmp_path)


def test_neither_file_nor_folder(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match=r"does not exist\. Expected an artifact folder, an engine folder or"):
        inspect_path(tmp_path / "nowhere")
    (tmp_path / "text.onnx").write_text("not ONNX")
    with pytest.raises(BismoothError, match="cannot be read as an ONNX model"):
        inspect_path(tmp_path / "text.onnx")


def test_nothing_to_say_about_an_empty_graph(tmp_path: Path) -> None:
    model = make("(float[2] x) => (float[2] y) { y = Relu(x) }")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert inspect_path(tmp_path / "model.onnx").to_json()["qdq_mac_share"] == 0.0


def test_the_documented_keys_of_the_manifest_are_those_written() -> None:
    text = (DOCS / "artifacts.md").read_text("utf-8").split("## Manifest")[1].split("## Guarantees")[0]
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    keys = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert keys == set(json.loads(json.dumps(Manifest("float", {}, {}).to_json())))
