"""An engine folder as of ``bismooth build``, whose engine is a decoder of tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer

from bismooth.export.artifact import finish_folder
from tests import artifacts
from tests import toy_tokenizers as toy
from tests.numpy_decoder import NumpyDecoder

TEMPLATE = (
    "{% for message in messages %}<tool> {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<tool> {% endif %}"
)
"""A chat of the words of ``toy.words()``; what is rendered again are the same tokens."""


def make_engine(
    path: Path,
    tokenizer: Tokenizer,
    files: Mapping[str, Any] | None = None,
    engine: str = "onnxruntime",
    template: str | None = TEMPLATE,
) -> Path:
    """The folder, with ``files`` as JSON beside the graph."""
    path.mkdir(parents=True)
    (path / "model.onnx").write_bytes(b"graph")
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in (files or {}).items():
        (path / name).write_text(json.dumps(content), "utf-8")
    if template is not None:
        (path / "chat_template.jinja").write_text(template, "utf-8")
    stage = {"stage": "build", "engine": engine}
    finish_folder(path, replace(artifacts.FLOAT, kind="engine", graphs={}, stages=(stage,)))
    return path


def run_on(decoder: NumpyDecoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int | None, int | None]]:
    """Let ``decoder`` be what every ONNX Runtime engine is opened as; the result lists file, threads and capacity."""
    opened: list[tuple[Path, int | None, int | None]] = []

    def open_file(file: Path, *, threads: int | None = None, capacity: int | None = None) -> NumpyDecoder:
        opened.append((file, threads, capacity))
        return decoder

    module = ModuleType("bismooth.engines.onnxruntime_decoder")
    monkeypatch.setattr(module, "OnnxRuntimeDecoder", open_file, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return opened


def words_engine(path: Path, **options: Any) -> Path:
    return make_engine(path, toy.words(), **options)
