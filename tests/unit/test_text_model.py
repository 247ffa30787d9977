"""Opening an engine with its tokenizer, template and stop tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bismooth.engines import bundle
from bismooth.export.errors import BismoothError
from bismooth.tools.text_model import open_decoder, open_text_model, stop_tokens
from tests import artifacts, fake_decoding
from tests import toy_tokenizers as toy
from tests.bundles import FILES, make_bundle
from tests.cached_model import VOCAB
from tests.chat_engine import make_engine, run_on, words_engine
from tests.numpy_decoder import NumpyDecoder


def test_an_engine_folder_is_opened_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = NumpyDecoder(6)
    opened = run_on(decoder, monkeypatch)
    path = words_engine(tmp_path / "engine", files={"config.json": {"eos_token_id": 4}})
    with open_text_model(path, 3) as model:
        assert opened == [(path / "model.onnx", 3, None)]
        assert (model.decoder, model.stop, model.path) == (decoder, {4}, path)
        assert model.encode("red blue") == [1, 3]
        assert model.encode_chat([{"role": "user", "content": "green"}]) == [5, 2, 4, 5]
        assert not decoder.is_closed
    assert decoder.is_closed
    assert open_decoder(path) is decoder
    assert opened[1:] == [(path / "model.onnx", None, None)]


def test_a_bundle_is_opened_with_its_best_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = NumpyDecoder(6)
    opened = run_on(decoder, monkeypatch)
    monkeypatch.setattr(bundle, "SMALL_BYTES", 8)
    files = {**FILES, "tokenizer.json": toy.words().to_str().encode(), "config.json": b'{"eos_token_id": 4}'}
    path = make_bundle(tmp_path / "bundle", files)
    with open_text_model(path, 3) as model:
        assert opened == [(path / "engines/onnxruntime/model.onnx", 3, 64)]
        assert (model.decoder, model.stop, model.path) == (decoder, {4}, path)
        assert not decoder.is_closed
    assert decoder.is_closed
    assert open_decoder(path) is decoder
    decoder.is_closed = False
    (path / "engines/onnxruntime/weights.bin").write_bytes(b"weights of equal lengt")
    with pytest.raises(BismoothError, match=r"weights\.bin: was changed: expected SHA-256"), open_text_model(path):
        pass
    assert decoder.is_closed, "an engine whose weights were changed computes nothing"


def test_special_tokens_are_added_to_texts_but_not_to_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers.processors import TemplateProcessing

    run_on(NumpyDecoder(6), monkeypatch)
    tokenizer = toy.words()
    tokenizer.post_processor = TemplateProcessing(single=f"{toy.END} $0", special_tokens=[(toy.END, 4)])
    with open_text_model(make_engine(tmp_path / "engine", tokenizer)) as model:
        assert model.encode("red") == [4, 1]
        assert model.encode_chat([{"role": "user", "content": "red"}]) == [5, 1, 4, 5]


STOPS: list[tuple[dict[str, Any], set[int]]] = [
    ({}, set()),
    ({"config.json": {"eos_token_id": 2}}, {2}),
    ({"config.json": {"eos_token_id": None, "text_config": {"eos_token_id": [2, 3]}}}, {2, 3}),
    ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [1, 3]}}, {1, 3}),
    ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"top_p": 0.9}}, {2}),
    ({"tokenizer_config.json": {"eos_token": toy.END}}, {4}),
    ({"tokenizer_config.json": {"eos_token": {"content": toy.END}}, "config.json": {"eos_token_id": 0}}, {0}),
    ({"tokenizer_config.json": {"eos_token": "</s>"}}, set()),
    ({"config.json": {"text_config": None}}, set()),
]


@pytest.mark.parametrize(("files", "expected"), STOPS)
def test_stop_tokens_are_those_of_the_model(files: dict[str, Any], expected: set[int], tmp_path: Path) -> None:
    path = words_engine(tmp_path / "engine", files=files)
    assert stop_tokens(path, toy.words()) == expected


@pytest.mark.parametrize("value", ["2", [1, None], True, 2.5])
def test_stop_tokens_that_are_no_numbers(value: object, tmp_path: Path) -> None:
    path = words_engine(tmp_path / "engine", files={"generation_config.json": {"eos_token_id": value}})
    message = f"generation_config.json: eos_token_id is {value!r}. Expected a number, or a list of numbers."
    with pytest.raises(BismoothError, match=re.escape(message)):
        stop_tokens(path, toy.words())


@pytest.mark.parametrize("engine", ["tensorrt-rtx", "tensorrt"])
def test_an_engine_for_a_gpu(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decoding.install(monkeypatch)
    path = words_engine(tmp_path / "engine", engine=engine)
    fake_decoding.write_decoding_engine(path, runtime=engine)
    with open_decoder(path) as decoder:
        assert (decoder.capacity, decoder.vocab_size) == (fake_decoding.CAPACITY, VOCAB)
    with pytest.raises(BismoothError, match=r"--threads: has no effect: .* runs on a GPU"):
        open_decoder(path, 2)


def test_an_engine_that_cannot_decode(tmp_path: Path) -> None:
    path = words_engine(tmp_path / "engine", engine="null")
    message = (
        f"{path}: engines of null cannot generate text. Expected one of: onnxruntime, tensorrt-rtx, tensorrt. "
        "Run 'bismooth build ART --engine NAME' with one of these."
    )
    with pytest.raises(BismoothError, match=re.escape(message)), open_text_model(path):
        raise AssertionError("it was opened")


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_engines_that_run_on_a_gpu(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr("bismooth.engines.tensorrt_decoder.TensorRTDecoder", opened.append)
    path = words_engine(tmp_path / "engine", engine=engine)
    open_decoder(path)
    assert opened == [path / "model.engine"]
    with pytest.raises(BismoothError, match=re.escape(f"--threads: has no effect: {path} runs on a GPU. Leave it")):
        open_decoder(path, threads=2)


def test_an_artifact_is_no_engine_but_may_have_some(tmp_path: Path) -> None:
    path = artifacts.make(tmp_path / "art")
    message = f"{path}: expected an engine folder, got a float artifact. Its engines: "
    with pytest.raises(BismoothError, match=re.escape(f"{message}none; run 'bismooth build' first.")):
        open_decoder(path)
    words_engine(path / "engines" / "onnxruntime")
    with pytest.raises(BismoothError, match=re.escape(f"{message}{path}/engines/onnxruntime.")):
        open_decoder(path)


def test_a_folder_that_is_none_of_ours(tmp_path: Path) -> None:
    advice = r"Expected one of the folders that 'bismooth build' makes in ART/engines, or what 'bismooth package' makes"
    for path, what in ((tmp_path, "is not an engine folder or a bundle"), (tmp_path / "none", "does not exist")):
        with pytest.raises(BismoothError, match=rf"^{path}: {what}\. {advice}\.$"):
            open_decoder(path)


def test_without_a_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(NumpyDecoder(6), monkeypatch)
    path = words_engine(tmp_path / "engine", template=None)
    message = f"{path}: has no chat template. Expected chat_template.jinja, or chat_template in tokenizer_config.json. "
    with open_text_model(path) as model, pytest.raises(BismoothError, match=re.escape(message)):
        model.encode_chat([])


def test_text_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(NumpyDecoder(6), monkeypatch)
    with open_text_model(words_engine(tmp_path / "engine")) as model:
        with pytest.raises(BismoothError, match=r"generate: a text is not UTF-8: .* Convert it to UTF-8\."):
            model.encode("red \udcff")
        with pytest.raises(BismoothError, match="generate: a text is not UTF-8"):
            model.encode_chat([{"role": "user", "content": "\udcff"}])
