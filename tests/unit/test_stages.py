"""Stages refuse what they could only ignore."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.export.artifact import Artifact, Manifest, scan_files, write_manifest
from bismooth.export.errors import BismoothError
from bismooth.export.hashing import file_sha256
from bismooth.passes import quantize
from bismooth.passes.gates import Hop
from bismooth.passes.recipe import Recipe
from bismooth.passes.spec import ComputeType
from bismooth.tools import pipeline, stages
from bismooth.tools.inspect import inspect_path
from tests.graphs import Builder
from tests.quantized import make, save


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "float"
    folder.mkdir()
    write_manifest(folder, Manifest("float", {}, {"float32": "model.onnx"}))
    return folder


@pytest.mark.parametrize(("recipe", "data_free"), [("w8a8", True), ("w8a8-per-channel", False), ("fp16", False)])
def test_an_alpha_without_effect(artifact: Path, tmp_path: Path, recipe: str, data_free: bool) -> None:
    with pytest.raises(BismoothError, match=r"--alpha 0\.5: has no effect"):
        stages.quantize(artifact, recipe, tmp_path / "out", alpha=0.5, data_free=data_free)


def test_a_share_without_effect(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BismoothError, match=r"--max-share 0\.05: has no effect: the recipe w8a8 has no rule for @walls\."
    ):
        stages.quantize(artifact, "w8a8", tmp_path / "out", max_share=0.05)


def test_a_share_that_is_none() -> None:
    with pytest.raises(BismoothError, match=r"--max-share 5: Expected a share from 0 to 1\."):
        stages.load_recipe("w8a8-mixed", max_share=5)


def test_a_share_replaces_that_of_the_recipe() -> None:
    assert stages.load_recipe("w8a8-mixed").max_share is None
    assert stages.load_recipe("w8a8-mixed", max_share=0.05).max_share == 0.05


def test_the_output_is_the_input(artifact: Path) -> None:
    for output in (artifact, artifact.parent):
        with pytest.raises(BismoothError, match="is or holds what is read"):
            stages.quantize(artifact, "w8a8", output, data_free=True, force=True)
    source = artifact / "source.onnx"
    source.touch()
    with pytest.raises(BismoothError, match=r"is or holds what is read, .*source\.onnx\. Choose another output folder"):
        stages.export(source, artifact, force=True)
    assert (artifact / "bismooth.json").is_file()


def test_force_replaces_the_same_kind_alone(linear: Path, tmp_path: Path) -> None:
    quantized = stages.quantize(linear, "w8a16", tmp_path / "q").artifact
    for output in (linear, quantized):
        with pytest.raises(BismoothError, match=r"is or holds what is read|not a bismooth artifact of kind engine"):
            stages.build(quantized, "null", output=output, force=True)
    assert Artifact.load(linear, "float")
    assert Artifact.load(quantized, "quantized")


def test_paths_may_be_text(linear: Path, tmp_path: Path) -> None:
    stages.quantize(str(linear), "w8a16", str(tmp_path / "q"))
    stages.build(str(tmp_path / "q"), "null", output=str(tmp_path / "engine"))
    assert stages.inspect(str(tmp_path / "q"))
    stages.export(str(tmp_path / "source/model.onnx"), str(tmp_path / "again"), dtype=ComputeType.FLOAT32)


def test_files_of_another_kind_are_not_replaced(artifact: Path, tmp_path: Path) -> None:
    for name, text in {"model.onnx": "no JSON", "notes.json": "{}", "list.json": "[]"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(BismoothError, match="exists and is not a statistics file, so it is not replaced"):
            stages.calibrate(artifact, ["nowhere.txt"], output=tmp_path / name)
        with pytest.raises(BismoothError, match="exists and is not a report of 'bismooth verify', so it is not repl"):
            stages.verify(artifact, ["nowhere.txt"], output=tmp_path / name)
        assert (tmp_path / name).read_text() == text


def test_a_hop_of_another_kind_of_artifact(artifact: Path) -> None:
    with pytest.raises(
        BismoothError, match=r"--hop int8: .*float is a float artifact\. Its hops are: float, decode, half"
    ):
        stages.verify(artifact, ["nowhere.txt"], hops=[Hop.INT8])


def test_windows_longer_than_the_model_takes(artifact: Path) -> None:
    write_manifest(artifact, Manifest("float", {}, {"float32": "model.onnx"}, dims={"max_position_embeddings": 64}))
    for stage in (stages.calibrate, stages.verify):
        with pytest.raises(BismoothError, match=r"--length 65: the model has 64 positions \(max_position_embeddings\)"):
            stage(artifact, ["nowhere.txt"], length=65)


def test_statistics_that_are_missing(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match="there are no statistics"):
        stages.quantize(artifact, "w8a8", tmp_path / "out")


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """A float artifact of two linears, whose weights are a link."""
    b = Builder()
    b.outputs.append(b.linear(b.linear(b.tokens("x", 4), "up", 8, 4), "down", 4, 8))
    (tmp_path / "source").mkdir()
    source = b.save(tmp_path / "source", external=True)
    return stages.export(source, tmp_path / "art", dtype=ComputeType.FLOAT32).artifact


@pytest.mark.parametrize("recipe", ["fp16", "w8a8-per-channel"])
def test_quantize_records_the_hashes_of_all_weight_files(linear: Path, tmp_path: Path, recipe: str) -> None:
    quantized = stages.quantize(linear, recipe, tmp_path / "q", data_free=True).artifact
    manifest = Artifact.load(quantized, "quantized").manifest
    assert manifest.hashes == {
        name: file_sha256(quantized / name) for name in ("model.safetensors", "quantized.safetensors")
    }
    assert inspect_path(quantized).document["files_sha256"] == manifest.hashes
    engine = stages.build(quantized, "onnxruntime").folder
    os.utime(tmp_path / "source/model.safetensors")
    for made in (quantized, engine):
        assert Artifact.load(made).manifest.files["model.safetensors"].linked


def test_quantize_takes_the_narrow_graph_that_the_artifact_has(tmp_path: Path) -> None:
    b = Builder()
    b.outputs.append(b.linear(b.tokens("x", 4), "fc", 8, 4))
    (tmp_path / "source").mkdir()
    artifact = stages.export(b.save(tmp_path / "source", external=True), tmp_path / "art").artifact
    narrow = (artifact / "model.float16.onnx").read_bytes()
    same = stages.quantize(artifact, "fp16", tmp_path / "same", data_free=True).artifact
    assert (same / "reference.float16.onnx").read_bytes() == narrow
    recipe = Recipe.from_dict({"extends": "fp16", "compute_dtype": "bfloat16"}, name="other")
    other = stages.quantize(artifact, recipe, tmp_path / "other", data_free=True).artifact
    assert (other / "reference.bfloat16.onnx").read_bytes() != narrow
    assert not (other / "reference.float16.onnx").exists()


def test_quantize_tells_weights_by_what_the_graph_refers_to(tmp_path: Path) -> None:
    graph = "(float[batch, 256] x) => (float[batch, 256] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    weights = {name: np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32) for name in "wv"}
    source = save(make(graph, **weights), tmp_path / "source", "one.txt")
    folder = stages.export(source, tmp_path / "art", dtype=ComputeType.FLOAT32).artifact
    for name in ("LICENSE", "unused.safetensors"):
        (folder / name).write_text("text", "utf-8")
    write_manifest(folder, replace(Artifact.load(folder).manifest, files=scan_files(folder)))
    quantized = stages.quantize(folder, "w8a8", tmp_path / "q", data_free=True).artifact
    manifest = Artifact.load(quantized).manifest
    assert (quantized / "one.txt").samefile(source.parent / "one.txt")
    assert set(manifest.hashes) == {"one.txt", "quantized.safetensors"}
    assert not (quantized / "LICENSE").samefile(folder / "LICENSE")
    assert "unused.safetensors" not in manifest.files


def test_weights_that_are_modified_while_they_are_quantized(
    linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quantize.quantize_graph

    def edit_and_run(*arguments: Any, **options: Any) -> Any:
        os.utime(linear / "model.safetensors")
        return run(*arguments, **options)

    monkeypatch.setattr(quantize, "quantize_graph", edit_and_run)
    with pytest.raises(BismoothError, match="which were modified since"):
        stages.quantize(linear, "fp16", tmp_path / "q", data_free=True)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(("recipe", "data_free"), [("w8a8", True), ("w8a16", False)])
def test_statistics_without_effect(artifact: Path, tmp_path: Path, recipe: str, data_free: bool) -> None:
    with pytest.raises(BismoothError, match=r"--statistics s\.safetensors: has no effect with "):
        stages.quantize(artifact, recipe, tmp_path / "out", statistics=Path("s.safetensors"), data_free=data_free)


def test_a_gate_of_a_hop_that_is_not_run(artifact: Path) -> None:
    message = r"--gate kl: has no effect: it judges the hop reference, .* Its hops are: "
    with pytest.raises(BismoothError, match=f"{message}float, decode, half"):
        stages.verify(artifact, ["nowhere.txt"], thresholds={"kl": 0.1})
    with pytest.raises(BismoothError, match=f"{message}half"):
        stages.verify(artifact, ["nowhere.txt"], thresholds={"kl": None}, hops=[Hop.HALF])


def test_an_unknown_opset_is_found_before_the_source_is_read(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match=r"--opset 12: Expected 23, or 20"):
        stages.export(tmp_path / "nowhere", tmp_path / "out", dtype=ComputeType.FLOAT32, opset=12)


@pytest.mark.parametrize(
    ("engines", "options", "message"),
    [
        (
            ["null"],
            {"capabilities": (86,)},
            r"--capability 86: has no effect without the engine tensorrt-rtx, got null",
        ),
        (["onnxruntime"], {"batch": (1, 2, 3)}, r"--batch: has no effect on engine onnxruntime"),
        ([], {}, r"compile: got no engine\. Expected at least one of tensorrt-rtx, tensorrt, onnxruntime, null"),
        ([], {"capabilities": (86,), "batch": (1, 2, 3)}, r"compile: got no engine"),
        (["null"], {"thresholds": {"kl": 0.1}}, r"--gate kl: has no effect: without text nothing is verified"),
        (["null"], {"thresholds": {"kll": 0.1}}, r"There is no gate 'kll'"),
        (["null"], {"opset": 12}, r"--opset 12"),
    ],
)
def test_compile_refuses_what_it_could_only_ignore(
    tmp_path: Path, engines: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BismoothError, match=message):
        pipeline.compile(tmp_path / "no-model", "w8a8", engines, [], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_capabilities_count_once(linear: Path) -> None:
    built = stages.build(linear, "null", capabilities=(86, 89, 86))
    assert built.folder.name == "null-sm86-sm89"
    assert built.result.record.capabilities == (86, 89)


def test_compile_takes_sizes_if_one_of_its_engines_does(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    weight = np.ones((4, 4), np.float32)
    graph = "(float[rows, 4] x) => (float[rows, 4] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }"
    source.write_bytes(make(graph, w=weight).SerializeToString())
    engines = ["onnxruntime", "null", "null"]
    with pytest.raises(BismoothError, match="'rows' of input 'x' has no sizes"):
        pipeline.compile(source, "w8a8", engines, [], tmp_path / "out")
    assert set((tmp_path / "out").iterdir()) == {tmp_path / "out/float"}
    result = pipeline.compile(source, "w8a8", engines, [], tmp_path / "out", dims={"rows": (1, 2, 3)})
    assert result.kept == ("float",)
    shapes = [engine.result.record.shapes for engine in result.engines]
    assert shapes == [{}, {"x": ((1, 4), (2, 4), (3, 4))}]


def test_copied_weights_stay_copies(tmp_path: Path) -> None:
    """In the artifact, in what is quantized from it, and in the folder for ONNX Runtime."""
    (tmp_path / "source").mkdir()
    graph = "(float[batch, 256] x) => (float[batch, 256] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    weights = {name: np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32) for name in "wv"}
    source = save(make(graph, **weights), tmp_path / "source")
    for name, copy_weights in (("copied", True), ("linked", False)):
        folder = tmp_path / name
        stages.export(source, folder / "float", copy_weights=copy_weights)
        stages.quantize(folder / "float", "w8a8", folder / "int8", data_free=True)
        engine = stages.build(folder / "int8", "onnxruntime").folder
        links = [(path / "weights.bin").stat().st_nlink for path in (folder / "float", folder / "int8", engine)]
        assert [count > 1 for count in links] == [not copy_weights] * 3
        assert all(path.stat().st_nlink == 1 for path in folder.rglob("*") if path.is_file()) == copy_weights


@pytest.mark.parametrize(
    ("recipe", "engine", "data", "message"),
    [
        ("w8a8", "onnx", "random", r"engine 'onnx': Expected one of"),
        ("w8a8", "onnxruntime", "nowhere.txt", r"nowhere\.txt"),
        ("w8a8-static", "onnxruntime", "", r"has static activation scales.*Expected --data FILE"),
    ],
)
def test_compile_refuses_before_it_starts(tmp_path: Path, recipe: str, engine: str, data: str, message: str) -> None:
    with pytest.raises(BismoothError, match=message):
        pipeline.compile(tmp_path / "no-model", recipe, [engine], [data] if data else [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_torch_module_becomes_an_artifact(tmp_path: Path) -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    result = stages.export_module(
        module, tmp_path / "mlp", (torch.zeros(2, 8),), dynamic_shapes=({0: "batch"},), input_names=["x"]
    )
    assert result.linears == 2
    artifact = Artifact.load(tmp_path / "mlp", "float")
    assert set(artifact.manifest.graphs) == {"float32", "float16"}
    quantized = stages.quantize(tmp_path / "mlp", "w8a8", tmp_path / "int8", data_free=True)
    assert len(quantized.result.linears) == 1  # the last linear makes the output: the head stays float


def test_what_lies_beside_an_onnx_file_comes_along(linear: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "tokenizer.json").write_text("{}")
    (source / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}, "model_type": "tiny"}')
    (source / "notes.txt").touch()
    artifact = stages.export(source / "model.onnx", tmp_path / "whole", dtype=ComputeType.FLOAT32).artifact
    assert {path.name for path in artifact.iterdir()} == {path.name for path in linear.iterdir()} | {
        "config.json",
        "tokenizer.json",
    }
    assert json.loads((artifact / "config.json").read_text()) == {"model_type": "tiny"}
    assert set(Artifact.load(artifact).manifest.source["files"]) == {
        "model.onnx",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
    }
