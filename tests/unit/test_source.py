"""What a model may be made from, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.export.safetensors_file import SafetensorsWriter
from bismooth.export.source import (
    INDEX,
    WEIGHTS,
    GgufSource,
    HuggingFaceSource,
    OnnxSource,
    identify,
    list_files,
    read_weights,
    resolve_source,
)
from tests.quantized import make
from tests.quantized import save as save_graph

CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def save(path: Path, *names: str, size: int = 2) -> None:
    declared = [(name, np.dtype(np.float32), (size,)) for name in names]
    with SafetensorsWriter(path, declared) as writer:
        for name in names:
            writer.write(name, np.ones(size, np.float32))


def model(folder: Path, **config: Any) -> Path:
    """A folder with a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config), "utf-8")
    return folder


def whole_model(folder: Path, **config: Any) -> Path:
    model(folder, **config)
    save(folder / WEIGHTS, "a", "b")
    return folder


def sharded(folder: Path, weight_map: Any) -> Path:
    model(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return folder


def test_a_folder(tmp_path: Path) -> None:
    source = resolve_source(whole_model(tmp_path / "m"))
    assert isinstance(source, HuggingFaceSource)
    assert source.weights.entries.keys() == {"a", "b"}
    assert source.weights.files == [tmp_path / "m" / WEIGHTS]


def test_a_sharded_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    save(folder / "1.safetensors", "a", "not in the index")
    save(folder / "2.safetensors", "b")
    source = resolve_source(folder)
    assert isinstance(source, HuggingFaceSource)
    assert {name: path.name for name, (path, _) in source.weights.entries.items()} == {
        "a": "1.safetensors",
        "b": "2.safetensors",
    }


def test_weights_of_any_name(tmp_path: Path) -> None:
    save(model(tmp_path) / "weights.safetensors", "a")
    source = resolve_source(tmp_path)
    assert isinstance(source, HuggingFaceSource)
    assert source.weights.files == [tmp_path / "weights.safetensors"]


def test_the_fingerprint_changes_with_the_headers(tmp_path: Path) -> None:
    prints: set[str] = set()
    for number, (names, size) in enumerate([("ab", 2), ("ab", 2), ("ac", 2), ("ab", 3)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder / WEIGHTS, *names, size=size)
        prints.add(read_weights([folder / WEIGHTS]).fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize(("name", "kind"), [("m.gguf", GgufSource), ("m.onnx", OnnxSource)])
def test_files(tmp_path: Path, name: str, kind: type[GgufSource | OnnxSource]) -> None:
    (tmp_path / name).write_bytes(b"")
    assert resolve_source(str(tmp_path / name)) == kind(tmp_path / name)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(
        BismoothError, match=r"m.bin: expected a model folder, a .gguf or a .onnx file, got a file with suffix '.bin'\."
    ):
        resolve_source(tmp_path / "m.bin")


@pytest.mark.parametrize(
    "name", ["/missing/folder", "./missing", "a/b/c", "missing.gguf", "org/m.onnx", "m.safetensors"]
)
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(BismoothError, match=f"{name}: no such file or folder.$"):
        resolve_source(name)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match=r"there is no config.json\. Expected a Hugging Face model folder\."):
        resolve_source(tmp_path)


@pytest.mark.parametrize(("text", "reason"), [("{", "Expecting property name"), ("[]", "it is not an object")])
def test_a_configuration_that_is_no_json(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(BismoothError, match=rf"config.json: not valid JSON: {reason}"):
        resolve_source(tmp_path)


def test_code_that_the_model_brings_along(tmp_path: Path) -> None:
    folder = whole_model(tmp_path, model_type="novel", auto_map={"AutoModel": "modeling.Novel"})
    with pytest.raises(
        BismoothError,
        match=r"its own Python code \(auto_map in config.json\), and transformers has none for model type 'novel'\. "
        r"Read that code, then pass --trust-remote-code",
    ):
        resolve_source(folder)
    resolve_source(folder, trust_remote_code=True)


def test_code_that_transformers_has_itself_is_not_needed(tmp_path: Path) -> None:
    resolve_source(whole_model(tmp_path, model_type="phi3", auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}))


@pytest.mark.parametrize(
    ("key", "value", "method"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"bits": 4}, "an unnamed method"),
        ("quantization_config", "fp8", "an unnamed method"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_a_quantized_checkpoint(tmp_path: Path, key: str, value: Any, method: str) -> None:
    folder = whole_model(tmp_path, **{key: value})
    with pytest.raises(
        BismoothError, match=rf"already quantized \({method}\)\. Expected float weights: export the model"
    ):
        resolve_source(folder)


def test_pickled_weights(tmp_path: Path) -> None:
    (model(tmp_path) / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        BismoothError,
        match=r"weights are pickled \(pytorch_model.bin\), and loading a pickle can run any code\. Expected",
    ):
        resolve_source(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(
        BismoothError, match=r"there are no weights\. Expected model.safetensors, or model.safetensors.i"
    ):
        resolve_source(model(tmp_path))


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "sub/m.safetensors"])
def test_an_index_that_points_outside(tmp_path: Path, name: str) -> None:
    save(tmp_path / "m.safetensors", "a")
    folder = sharded(tmp_path / "m", {"a": name})
    with pytest.raises(BismoothError, match=rf"names a weight file outside the model's folder: {name}\."):
        resolve_source(folder)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"})
    save(folder / "2.safetensors", "b")
    expected = r"weight files are missing: 1.safetensors, 3.safetensors\. Download the model again\."
    with pytest.raises(BismoothError, match=expected):
        resolve_source(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (model(tmp_path) / INDEX).write_text(content, "utf-8")
    with pytest.raises(BismoothError, match=rf"{INDEX}: the index of the weight files cannot be read \("):
        resolve_source(tmp_path)


def test_a_tensor_that_is_not_where_the_index_says(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"})
    save(folder / "1.safetensors", "a")
    with pytest.raises(
        BismoothError, match=r"1.safetensors: the index says that tensor b is in this file, but it is not"
    ):
        resolve_source(folder)


def test_weights_that_are_called_like_files_of_an_artifact(tmp_path: Path) -> None:
    save(model(tmp_path) / "quantized.safetensors", "a")
    with pytest.raises(
        BismoothError, match=r"weights in quantized.safetensors, a name that an artifact needs for itself"
    ):
        resolve_source(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    save(model(tmp_path) / "1.safetensors", "a")
    save(tmp_path / "2.safetensors", "a")
    with pytest.raises(
        BismoothError, match=r"2.safetensors: tensor a is also in 1.safetensors\. Expected each tensor onc"
    ):
        resolve_source(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model in an otherwise empty cache of the hub; nothing can be downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0123", "utf-8")
    return folder / "snapshots/0123"


@pytest.mark.parametrize("shards", [(), ("1.safetensors", "2.safetensors")])
def test_a_model_in_the_cache_of_the_hub(hub: Path, shards: tuple[str, ...]) -> None:
    if shards:
        sharded(hub, {"a": shards[0], "b": shards[1]})
        save(hub / shards[0], "a")
        save(hub / shards[1], "b")
    else:
        whole_model(hub)
    source = resolve_source("org/tiny")
    assert isinstance(source, HuggingFaceSource)
    assert source.folder == hub
    assert source.weights.entries.keys() == {"a", "b"}


def test_a_model_that_is_not_in_the_cache_of_the_hub(hub: Path) -> None:
    with pytest.raises(
        BismoothError,
        match=r"org/absent: no such file or folder, and the Hugging Face hub does not give it: .* Check the name, or",
    ):
        resolve_source("org/absent")


def test_what_is_downloaded(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights by their exact names: repositories hold copies of them in other formats and folders."""
    sharded(hub, {"a": "1.safetensors"})
    save(hub / "1.safetensors", "a")
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append([pattern for pattern in allow_patterns if "safetensors" in pattern or ".py" in pattern])
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve_source("org/tiny")
    assert asked == [[WEIGHTS, INDEX], [WEIGHTS, INDEX, "1.safetensors"]]
    resolve_source("org/tiny", trust_remote_code=True)
    assert asked[2:] == [[WEIGHTS, "*.py", INDEX], [WEIGHTS, "*.py", INDEX, "1.safetensors"]]


def test_a_source_is_known_by_all_of_its_files(tmp_path: Path) -> None:
    folder = whole_model(tmp_path / "m")
    for name in ("tokenizer.json", "trainer_state.json", "modeling_novel.py"):
        (folder / name).write_text("{}")
    found = identify(folder, resolve_source(folder))
    assert (found["path"], found["format"]) == (str(folder), "huggingface")
    assert set(found["files"]) == {WEIGHTS, "config.json", "tokenizer.json", "modeling_novel.py"}
    assert folder / "modeling_novel.py" not in list_files(HuggingFaceSource(folder, read_weights([folder / WEIGHTS])))
    status = (folder / WEIGHTS).stat()
    assert found["files"][WEIGHTS] == {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    assert found == identify(folder, resolve_source(folder)) == json.loads(json.dumps(found))
    (folder / "vocab.json").write_text("{}")
    assert found != identify(folder, resolve_source(folder))


def test_code_that_lies_elsewhere_is_named(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "org/repo--configuration.Novel", "AutoModel": "modeling.Novel"}
    folder = whole_model(tmp_path / "m", auto_map=auto_map)
    tokenizer = {"auto_map": {"AutoTokenizer": [None, "code/tokenization.Fast"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "adapter_config.json").write_text("[]")
    (folder / "image_config.json").write_text("{")
    found = identify(folder, resolve_source(folder, trust_remote_code=True))
    assert found["foreign_code"] == ["code/tokenization.Fast", "org/repo--configuration.Novel"]
    plain = whole_model(tmp_path / "plain", auto_map={"AutoModel": "modeling.Novel"})
    assert "foreign_code" not in identify(plain, resolve_source(plain, trust_remote_code=True))


def test_an_onnx_file_is_known_by_its_weights_too(tmp_path: Path) -> None:
    graph = make("(float[rows, 256] x) => (float[rows, 256] y) { y = MatMul(x, w) }", w=np.ones((256, 256), np.float32))
    path = save_graph(graph, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    found = identify(path, resolve_source(path))
    assert found["format"] == "onnx"
    assert set(found["files"]) == {"model.onnx", "weights.bin", "config.json"}
    (tmp_path / "model.gguf").touch()
    gguf = tmp_path / "model.gguf"
    assert set(identify(gguf, resolve_source(gguf))["files"]) == {"model.gguf"}
