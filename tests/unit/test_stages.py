"""Stages refuse what they could only ignore."""

from pathlib import Path

import pytest

from bismooth.export.artifact import Artifact, Manifest, write_manifest
from bismooth.export.errors import BismoothError
from bismooth.passes.spec import ComputeType
from bismooth.tools import pipeline, stages


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


def test_the_output_is_the_input(artifact: Path) -> None:
    with pytest.raises(BismoothError, match="is the artifact that is read"):
        stages.quantize(artifact, "w8a8", artifact, force=True)
    assert (artifact / "bismooth.json").is_file()


def test_statistics_that_are_missing(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match="there are no statistics"):
        stages.quantize(artifact, "w8a8", tmp_path / "out")


def test_an_unknown_opset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.textgraphs import make

    source = tmp_path / "model.onnx"
    source.write_bytes(make("(float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }").SerializeToString())
    with pytest.raises(BismoothError, match=r"--opset 12: Expected 23, or 20"):
        stages.export(source, tmp_path / "out", dtype=ComputeType.FLOAT32, opset=12)
    assert not (tmp_path / "out").exists()


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
