"""What inspect says of artifacts and ONNX files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.calibrators.statistics import Provenance
from bismooth.calibrators.writer import StatisticsWriter
from bismooth.engines.audit import Audit, Figures
from bismooth.engines.base import BuildRequest, EngineRecord
from bismooth.engines.publish import publish, read_record
from bismooth.export.artifact import FileRecord, Manifest, write_manifest
from bismooth.export.errors import BismoothError
from bismooth.export.hashing import file_sha256
from bismooth.export.safetensors_file import SafetensorsWriter
from bismooth.tools.engine_folder import engine_file
from bismooth.tools.engines import find_builder
from bismooth.tools.inspect import inspect_path
from tests.fake_decoding import CAPACITY, write_decoding_engine
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


def built(tmp_path: Path, engine: str) -> Path:
    """An engine folder without its manifest."""
    graph = save(per_token("q_proj"), tmp_path)
    target = tmp_path / "engine"
    find_builder(engine).build(BuildRequest(graph, target / engine_file(engine), source={"architecture": "Tiny"}))
    return target


def test_an_engine_file_is_known_by_its_audit(tmp_path: Path) -> None:
    folder = built(tmp_path, "null")
    result = inspect_path(folder / "model.engine")
    assert result.to_json()["model"] == "Tiny"
    assert result.to_json()["engine"]["runtime"] == "null"
    write_manifest(folder, Manifest("engine", {}, {}, architecture="Tiny", tools={"python": "3"}))
    whole = inspect_path(folder).to_json()
    assert whole == {**result.to_json(), "path": str(folder), "tools": {"python": "3"}}
    (folder / "model.audit.json").unlink()
    with pytest.raises(BismoothError, match=r"there is no model\.audit\.json beside it"):
        inspect_path(folder / "model.engine")


def test_a_changed_engine_or_weight_is_named(tmp_path: Path) -> None:
    folder = built(tmp_path, "null")
    (folder / "weights.bin").write_bytes(b"weights")
    record = FileRecord(7, sha256=file_sha256(folder / "weights.bin"))
    write_manifest(folder, Manifest("engine", {}, {}, files={"weights.bin": record}))
    assert inspect_path(folder).failures == ()
    for name in ("weights.bin", "model.engine"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b"?")
        (failure,) = inspect_path(folder).failures
        assert re.fullmatch(rf"{folder / name}: expected SHA-256 \w+, got \w+\. Build the engine again\.", failure)
        (folder / name).write_bytes(content)


def test_an_engine_with_caches(tmp_path: Path) -> None:
    """Its capacity is told once, instead of the shape of each cache."""
    engine = write_decoding_engine(tmp_path)
    staged = tmp_path / "staged"
    staged.write_bytes(engine.read_bytes())
    audit = Audit({"kgen": 9}, 0, 0, 2, others=(Figures({"kgen": 7, "shape_call": 1}, 0, 0, 2),))
    publish(staged, engine, read_record(engine), audit)
    inspection = inspect_path(engine)
    brief = inspection.brief()
    assert brief["shapes"].keys() == {"input_ids", "attention_mask", "position_ids", "write_indices", "logits_at"}
    assert (brief["capacity"], brief["kernels"]) == (CAPACITY, 9)
    assert (brief["decode_kernels"], brief["decode_fused_attention"]) == (7, 2)
    assert "past_key_values.0.key" in inspection.to_json()["engine"]["shapes"]


def test_a_graph_for_onnx_runtime_is_judged_for_that_alone(tmp_path: Path) -> None:
    """As an engine TensorRT's rules do not concern it; anywhere else they do."""
    path = save(channel_scaled_activation(), tmp_path)
    assert inspect_path(path).failures
    record = EngineRecord("onnxruntime", "1", (), {}, 1, "", {})
    publish(save(channel_scaled_activation(), tmp_path), path, record, Audit({}, 0, 0, 0))
    result = inspect_path(path)
    assert set(result.to_json()["findings"]) == {"onnxruntime"}
    assert result.failures == ()


def test_statistics_say_what_they_were_taken_from(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    with path.open("wb") as file:
        provenance = Provenance("graph", "tokenizer", "data", 2, 8, 1)
        writer = StatisticsWriter(file, provenance, {"x": 4}, np.arange(3), histograms=False)
        writer.rows("x", 0, np.zeros((3, 4), np.float32))
    document = inspect_path(path).to_json()
    assert (document["kind"], document["values"], document["rows"], document["histograms"]) == (
        "statistics",
        1,
        3,
        False,
    )
    assert (document["data_sha256"], document["windows"], document["length"], document["seed"]) == ("data", 2, 8, 1)


@pytest.mark.parametrize(
    ("file", "path", "message"),
    [
        ("model.gguf", "model.gguf", r"is a GGUF model\. Make an artifact of it: bismooth export .*model\.gguf -o ART"),
        ("config.json", "", r"not a bismooth artifact, but a Hugging Face model\. Make an artifact .* bismooth export"),
        ("model.engine", "", r"an engine without its bismooth\.json\. Look at the file: .*model\.engine"),
        ("notes.txt", "", r"not a bismooth artifact: there is no bismooth\.json"),
    ],
)
def test_what_is_something_else(tmp_path: Path, file: str, path: str, message: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(BismoothError, match=message):
        inspect_path(tmp_path / path)


def test_a_folder_of_artifacts_names_them(tmp_path: Path) -> None:
    for name in ("quantized", "float"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, Manifest("float", {}, {}))
    with pytest.raises(BismoothError, match=r"but holds float, quantized\. Look at one: bismooth inspect .*/float"):
        inspect_path(tmp_path)


def test_weights_are_not_statistics(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "w.safetensors", [("w", np.dtype(np.float32), (1,))]) as writer:
        writer.write("w", np.ones(1, np.float32))
    with pytest.raises(BismoothError, match=r"holds weights, not statistics\. Expected a file of 'bismooth calibrate'"):
        inspect_path(tmp_path / "w.safetensors")


def test_an_artifact_of_another_version(tmp_path: Path) -> None:
    linear = {"name": "q", "node": "q/MatMul", "int8": True}
    stage = {
        "stage": "quantize",
        "recipe": {"name": "r"},
        "fingerprint": "",
        "quantized": [linear],
    }

    def inspected(**changes: Any) -> str:
        write_manifest(tmp_path, Manifest("quantized", {}, {}, stages=({**stage, **changes},)))
        with pytest.raises(BismoothError, match="was quantized by another version of bismooth") as error:
            inspect_path(tmp_path)
        return str(error.value)

    assert "its manifest lacks node, int8. Run 'bismooth quantize' again" in inspected(quantized=[{"name": "q"}])
    assert "its manifest lacks float. Run" in inspected()
