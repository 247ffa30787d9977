"""GGUF files: a tiny model written with llama.cpp's own package comes out as transformers loads it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf as _gguf
import numpy as np
import pytest
import transformers as _transformers
from numpy.typing import NDArray

from bismooth.export import gguf_file
from bismooth.export.errors import BismoothError
from bismooth.export.gguf_file import convert_gguf
from bismooth.export.safetensors_file import read_header, read_tensor
from tests.gguf_models import KV_HEADS, llama, write_gguf
from tests.models import VOCAB

gguf: Any = _gguf
transformers: Any = _transformers
Array = NDArray[Any]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def converted(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Array]]:
    """The GGUF file, the folder that it was converted to, and the expected tensors."""
    root = tmp_path_factory.mktemp("gguf")
    expected = write_gguf(model, root / "tiny.gguf")
    (root / "out").mkdir()
    convert_gguf(root / "tiny.gguf", root / "out")
    return root / "tiny.gguf", root / "out", expected


def tensors(folder: Path) -> dict[str, Array]:
    path = folder / "model.safetensors"
    return {name: read_tensor(path, entry) for name, entry in read_header(path).items()}


def test_tensors_are_dequantized_and_in_the_order_of_transformers(
    converted: tuple[Path, Path, dict[str, Array]], model: Any
) -> None:
    _, folder, expected = converted
    actual = tensors(folder)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    exact = {name for name, tensor in model.state_dict().items() if np.array_equal(actual[name], tensor.numpy())}
    assert {name for name in exact if name.endswith("_proj.weight")} == {
        f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in ("self_attn.v_proj", "mlp.down_proj")
    }


@pytest.mark.skipif(find_spec("accelerate") is None, reason="transformers loads GGUF files with accelerate only")
def test_transformers_loads_the_same(converted: tuple[Path, Path, dict[str, Array]]) -> None:
    path, folder, _ = converted
    reference = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).state_dict()
    for name, tensor in tensors(folder).items():
        np.testing.assert_array_equal(tensor, reference[name].numpy(), err_msg=name)


def test_the_folder_is_a_model(converted: tuple[Path, Path, dict[str, Array]]) -> None:
    _, folder, expected = converted
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_key_value_heads, config.tie_word_embeddings) == (KV_HEADS, False)
    assert not hasattr(config, "quantization_config")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    np.testing.assert_array_equal(model.state_dict()["lm_head.weight"].numpy(), expected["lm_head.weight"])
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("ab!") == [VOCAB - 2, 0]
    assert (folder / "tokenizer.json").is_file()


def test_progress(model: Any, tmp_path: Path) -> None:
    expected = write_gguf(model, tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    steps: list[tuple[str, int, int]] = []
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", lambda step, done, total: steps.append((step, done, total)))
    assert steps == [("dequantize", number + 1, len(expected)) for number in range(len(expected))]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not a GGUF" * 10])
def test_a_file_that_is_no_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(
        BismoothError, match=r"m\.gguf: this GGUF file cannot be read: .* Expected a whole file of a model"
    ):
        convert_gguf(tmp_path / "m.gguf", tmp_path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_file_that_is_cut_off(converted: tuple[Path, Path, dict[str, Array]], tmp_path: Path, share: float) -> None:
    content = converted[0].read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(BismoothError, match="this GGUF file cannot be read"):
        convert_gguf(tmp_path / "m.gguf", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_unknown_architecture(model: Any, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "m.gguf", architecture="novel")
    with pytest.raises(
        BismoothError, match=r"cannot be read: .*novel.* Expected a whole file of a model that transformers"
    ):
        convert_gguf(tmp_path / "m.gguf", tmp_path)


def test_a_tensor_of_another_shape(model: Any, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "m.gguf", shapes={"model.norm.weight": (16,)})
    with pytest.raises(
        BismoothError,
        match=r"tensor output_norm\.weight has shape \[16\], but the model's configuration makes it \[32\]\. Download",
    ):
        convert_gguf(tmp_path / "m.gguf", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_file_is_not_changed(converted: tuple[Path, Path, dict[str, Array]], tmp_path: Path) -> None:
    path = converted[0]
    before = path.read_bytes(), path.stat().st_mtime_ns
    convert_gguf(path, tmp_path)
    assert before == (path.read_bytes(), path.stat().st_mtime_ns)


def test_one_tensor_at_a_time(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is written before the next one is dequantized."""
    write_gguf(model, tmp_path / "m.gguf")
    order: list[str] = []
    dequantize, write = gguf.dequantize, gguf_file.SafetensorsWriter.write

    def noted_dequantize(data: Any, kind: Any) -> Any:
        order.append("dequantize")
        return dequantize(data, kind)

    def noted_write(self: Any, name: str, array: Array) -> None:
        order.append("write")
        write(self, name, array)

    monkeypatch.setattr(gguf, "dequantize", noted_dequantize)
    monkeypatch.setattr(gguf_file.SafetensorsWriter, "write", noted_write)
    convert_gguf(tmp_path / "m.gguf", tmp_path)
    assert order == ["dequantize", "write"] * (len(order) // 2)
