"""Text to windows: the protocol, every kind of source, and every way data can be bad or too little."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from bismooth.calibrators import data
from bismooth.calibrators.data import load_tokenizer, load_windows
from bismooth.export.errors import BismoothError
from bismooth.export.hashing import array_sha256

TEXT = "the quick brown fox jumps over the lazy dog\n\nand  then\tsome more, 1234 times.\n" * 40


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE whose file asks for truncation, padding and special tokens, as many do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(16)  # pyright: ignore[reportUnknownMemberType]
    tokenizer.enable_padding(length=16)  # pyright: ignore[reportUnknownMemberType]
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("artifact")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_protocol(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first, second = write(tmp_path / "a.txt", "one\r\ntwo\n"), write(tmp_path / "b.txt", TEXT)
    windows = load_windows([first, second], tokenizer, windows=3, length=50)
    assert windows.ids.tolist() == np.reshape(whole(tokenizer, f"one\ntwo\n{TEXT}")[:150], (3, 50)).tolist()
    assert windows.ids.dtype == np.int64
    assert windows.sources == (str(first), str(second))
    assert windows.sha256 == array_sha256(windows.ids)


@settings(max_examples=20, deadline=None)
@given(text=st.text("ab \n.1é", min_size=1, max_size=400), count=st.integers(2, 60), lookahead=st.integers(8, 30))
def test_reading_less_text_changes_no_token(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, text: str, count: int, lookahead: int
) -> None:
    path = write(tmp_path_factory.mktemp("text") / "a.txt", (text + "x\n") * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "LOOKAHEAD", lookahead)
        patch.setattr(data, "_CHARACTERS_PER_TOKEN", 1)
        ids = load_windows([path], tokenizer, windows=1, length=count).ids
    assert ids[0].tolist() == whole(tokenizer, path.read_text("utf-8"))[:count]


def test_huge_source_is_not_read_to_its_end(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(source: str, field: str | None) -> Iterator[str]:
        while True:
            yield "the quick brown fox"

    monkeypatch.setattr(data, "read_pieces", endless)
    path = write(tmp_path / "a.txt", "")
    assert load_windows([path], tokenizer, windows=2, length=8).ids.shape == (2, 8)


@pytest.mark.parametrize(("suffix", "field"), [(":text", None), ("", "text"), (":text", "id")])
def test_jsonl(tmp_path: Path, tokenizer: Tokenizer, suffix: str, field: str | None) -> None:
    path = write(tmp_path / "a.jsonl", '{"id": 1, "text": "brown fox"}\n\n{"text": "lazy dog"}\n')
    windows = load_windows([f"{path}{suffix}"], tokenizer, windows=1, length=3, field=field)
    assert windows.ids[0].tolist() == whole(tokenizer, "brown fox\nlazy dog")[:3]


def test_random_is_seeded(tokenizer: Tokenizer) -> None:
    draws = [load_windows(["random"], tokenizer, windows=2, length=64, seed=seed).ids for seed in (1, 1, 2)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()
    assert draws[0].shape == (2, 64)
    assert 0 <= draws[0].min() <= draws[0].max() < tokenizer.get_vocab_size()


# --- datasets -------------------------------------------------------------------------------------------------------


class FakeDatasets(ModuleType):
    def __init__(self) -> None:
        super().__init__("datasets")
        self.calls: list[tuple[Any, ...]] = []

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        self.calls.append((name, config, split, streaming))
        if name == "gone":
            raise RuntimeError("Dataset 'gone'\ndoes not exist.")
        return [{"text": "brown fox", "body": "lazy dog", "n": 1}]


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    module = FakeDatasets()
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("source", "call", "text"),
    [
        ("hf:org/name", ("org/name", None, "train", True), "brown fox"),
        ("hf:name@raw:test", ("name", "raw", "test", True), "brown fox"),
        ("hf:name:test:body", ("name", None, "test", True), "lazy dog"),
    ],
)
def test_dataset(datasets: FakeDatasets, tokenizer: Tokenizer, source: str, call: tuple[Any, ...], text: str) -> None:
    ids = load_windows([source], tokenizer, windows=1, length=2).ids
    assert ids[0].tolist() == whole(tokenizer, text)[:2]
    assert datasets.calls == [call]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:gone", r"hf:gone: the dataset cannot be read: Dataset 'gone' does not exist\. Expected hf:NAME"),
        ("hf:name:test:title", r"hf:name:test:title has no field 'title'\. It has: text, body, n\."),
        ("hf:name:test:n", r"field 'n' is a int\. Expected a string"),
    ],
)
def test_bad_dataset(datasets: FakeDatasets, tokenizer: Tokenizer, source: str, message: str) -> None:
    with pytest.raises(BismoothError, match=message):
        load_windows([source], tokenizer, windows=1, length=2)


def test_datasets_is_not_installed(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BismoothError, match=r"hf:name: needs the package 'datasets'\. Run 'pip install datasets'"):
        load_windows(["hf:name"], tokenizer, windows=1, length=2)


# --- bad data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: holds no text"),
        ("a.txt", b" \n\n", r"a\.txt: holds no text"),
        ("a.txt", b"\x89PNG\r\n", r"a\.txt: not UTF-8 text: invalid start byte \(0x89\)"),
        ("a.txt", b"text\n" * 10_000 + b"\xff\xfe", r"a\.txt: not UTF-8 text: .* \(0xff\) after line \d+"),
        ("a.txt", b"text\n\0\0\0", r"a\.txt: line 2 holds zero bytes"),
        ("a.txt", b"only a few words", r"too little text: \d+ tokens, 0 windows of 4096\. Expected 2 windows, 8192 to"),
        ("a.jsonl", b"{}\n", r"a\.jsonl: line 1 has no field 'text'\. It has: \."),
        ("a.jsonl", b'{"text": "x"}\nplain', r"a\.jsonl: line 2 is not JSON \(Expecting value"),
        ("a.jsonl", b"[1]", r"a\.jsonl: line 1 holds a list\. Expected a JSON object"),
        ("a.jsonl", b'{"text": ["x"], "id": 1}', r"field 'text' is a list\. Expected a string\. Choose from: text, id"),
    ],
)
def test_bad_file(tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(BismoothError, match=message):
        load_windows([path], tokenizer, windows=2, length=4096, field="text")


def test_jsonl_without_a_field_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"query": "x", "gold": 1}))
    with pytest.raises(BismoothError, match=r"has the fields query, gold\. .* Write FILE\.jsonl:FIELD"):
        load_windows([path], tokenizer, windows=1, length=2)


def test_files_that_cannot_be_opened(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = write(tmp_path / "good.txt", TEXT)
    for bad, reason in ((tmp_path / "gone.txt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(BismoothError, match=rf"{bad.name}: cannot be read \({reason}"):
            load_windows([good, bad], tokenizer, windows=1, length=2)


@pytest.mark.parametrize(
    ("sources", "windows", "length", "message"),
    [
        ([], 1, 8, r"data: Expected one or more text files, got none"),
        (["a.txt"], 0, 8, r"data: Expected 1 or more windows of 2 or more tokens, got 0 of 8"),
        (["a.txt"], 1, 1, r"got 1 of 1"),
        (["random", "a.txt"], 1, 8, r"data: 'random' stands alone, got random, a\.txt\. .* \./random"),
    ],
)
def test_bad_request(tokenizer: Tokenizer, sources: list[str], windows: int, length: int, message: str) -> None:
    with pytest.raises(BismoothError, match=message):
        load_windows(sources, tokenizer, windows=windows, length=length)


def test_tokenizer_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match=r"has no tokenizer\.json, so text cannot become tokens"):
        load_tokenizer(tmp_path)
    write(tmp_path / "tokenizer.json", "{}")
    with pytest.raises(BismoothError, match=r"tokenizer\.json: not a valid tokenizer file: "):
        load_tokenizer(tmp_path)
