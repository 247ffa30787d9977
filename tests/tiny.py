"""A tiny language model with a tokenizer and text, all made on the spot."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.models import make_model

WORDS = tuple(f"w{number}" for number in range(3, 96))
SIZES = ("--windows", "3", "--length", "24")


@dataclass(frozen=True)
class Tiny:
    """Folders and files of one tiny model."""

    source: Path
    text: Path


def make_tiny(folder: Path, name: str = "llama", **overrides: Any) -> Tiny:
    """A random model with a word-level tokenizer, and text in its words."""
    make_model(name, folder / "source", **overrides)
    write_tokenizer(folder / "source")
    return Tiny(folder / "source", write_text(folder / "text.txt"))


def write_tokenizer(folder: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: 3 + place for place, word in enumerate(WORDS)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")


def write_text(path: Path, words: int = 1500) -> Path:
    choose = random.Random(0)
    path.write_text("\n".join(" ".join(choose.choices(WORDS, k=10)) for _ in range(words // 10)), "utf-8")
    return path


def snapshot(folder: Path) -> Mapping[str, tuple[bytes, int]]:
    """Content and modification time of every file below ``folder``."""
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def listing(folder: Path) -> set[str]:
    """Everything below ``folder``, hidden files included."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
