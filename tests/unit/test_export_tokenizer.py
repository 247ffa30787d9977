"""Older tokenizers become one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bismooth.export.errors import BismoothError
from bismooth.export.tokenizer import complete_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tokenizer as BERT's first checkpoints had it."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(WORDS), "utf-8")
    (source / "config.json").write_text('{"model_type": "bert"}', "utf-8")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', "utf-8")
    return source


def test_a_vocabulary_is_converted(bert: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bert.iterdir()}
    complete_tokenizer(bert, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("green red blue").ids == [2, 6, 5, 1, 3]
    assert before == {path: path.stat().st_mtime_ns for path in bert.iterdir()}


def test_a_tokenizer_json_is_kept(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    complete_tokenizer(bert, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text("utf-8") == "{}"


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    complete_tokenizer(tmp_path / "source", tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_vocabulary_that_cannot_be_converted(bert: Path, tmp_path: Path) -> None:
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": 3}), "utf-8")
    with pytest.raises(
        BismoothError, match=r"the tokenizer cannot be converted to tokenizer\.json: .* or remove vocab\.txt to export"
    ):
        complete_tokenizer(bert, tmp_path)
