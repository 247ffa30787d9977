"""An engine that decodes, with what turns text into its tokens and back."""

from __future__ import annotations

import importlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from ..calibrators.data import load_tokenizer
from ..engines.chat import ChatTemplate, Message, read_json, special_tokens
from ..engines.decoder import Decoder
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from . import console
from .engine_folder import engine_file, engine_folders, engine_of

DECODERS: Mapping[str, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime_decoder", "OnnxRuntimeDecoder"),
    "tensorrt-rtx": ("tensorrt_decoder", "TensorRTDecoder"),
    "tensorrt": ("tensorrt_decoder", "TensorRTDecoder"),
}
"""Engine → module of ``bismooth.engines`` and class in it, which takes the engine's file."""

_ON_CPU = ("onnxruntime",)
"""Those whose decoders take ``threads``."""


@dataclass(frozen=True)
class TextModel:
    """An engine, its tokenizer, its chat template if there is one, and the tokens that end a text."""

    path: Path
    decoder: Decoder
    tokenizer: Tokenizer
    template: ChatTemplate | None
    stop: frozenset[int]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of ``messages`` and of the beginning of an answer.

        Raises:
            BismoothError: there is no template, or it cannot be rendered.
        """
        if self.template is None:
            raise BismoothError(
                f"{self.path}: has no chat template. Expected chat_template.jinja, or chat_template in "
                "tokenizer_config.json. Put it there, or generate with --no-chat."
            )
        return self._tokens(self.template.render(messages), add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text to continue, with those that the tokenizer puts around texts."""
        return self._tokens(text, add_special_tokens=True)

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")  # bytes of the command line that are no UTF-8 become lone surrogates
        except UnicodeEncodeError as error:
            raise BismoothError(f"generate: a text is not UTF-8: {error}. Convert it to UTF-8.") from error
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


@contextmanager
def open_text_model(path: Path, threads: int | None = None) -> Generator[TextModel]:
    """The model of an engine folder; its engine is closed at the end.

    Raises:
        BismoothError: as :func:`open_decoder`; or tokenizer, chat template or configuration cannot be read.
    """
    folder = _engine_folder(path)
    tokenizer = load_tokenizer(path)
    template, stop = ChatTemplate.load(path), stop_tokens(path, tokenizer)
    with console.progress() as progress:
        progress("load the engine", 0, 1)
        decoder = _open(folder, threads)
        progress("load the engine", 1, 1)
    with decoder:
        yield TextModel(path, decoder, tokenizer, template, stop)


def open_decoder(path: Path, threads: int | None = None) -> Decoder:
    """The decoder of an engine folder.

    Args:
        threads: threads per operator, of engines that run on the CPU; one per core by default.

    Raises:
        BismoothError: not an engine folder, an engine that cannot decode, or one that cannot be loaded; or threads for
            one that runs on a GPU.
    """
    return _open(_engine_folder(path), threads)


def _open(folder: Artifact, threads: int | None) -> Decoder:
    engine = engine_of(folder)
    if engine not in DECODERS:
        raise BismoothError(
            f"{folder.path}: engines of {engine} cannot generate text. Expected one of: {', '.join(DECODERS)}. "
            "Run 'bismooth build ART --engine NAME' with one of these."
        )
    if threads is not None and engine not in _ON_CPU:
        raise BismoothError(f"--threads: has no effect: {folder.path} runs on a GPU. Leave it out.")
    module, name = DECODERS[engine]
    decoder: Any = getattr(importlib.import_module(f"..engines.{module}", __package__), name)
    options = {"threads": threads} if engine in _ON_CPU else {}
    return decoder(folder.path / engine_file(engine), **options)


def stop_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: of the first that names some of ``generation_config.json``, ``config.json`` (in it,
    ``text_config``) and the tokenizer's configuration. None of them may.

    Raises:
        BismoothError: a file cannot be read, or ``eos_token_id`` is neither a number nor a list of numbers.
    """
    config = read_json(folder / "config.json")
    inner = config.get("text_config")
    documents = [
        ("generation_config.json", read_json(folder / "generation_config.json")),
        ("config.json", config),
        ("config.json", cast(dict[str, Any], inner) if isinstance(inner, dict) else {}),
    ]
    for name, document in documents:
        if (value := document.get("eos_token_id")) is not None:
            ids = cast(list[Any], value) if isinstance(value, list) else [value]
            if any(type(number) is not int for number in ids):
                raise BismoothError(
                    f"{folder / name}: eos_token_id is {value!r}. Expected a number, or a list of numbers."
                )
            return frozenset(ids)
    eos = special_tokens(folder).get("eos_token")
    token = None if eos is None else tokenizer.token_to_id(eos)
    return frozenset() if token is None else frozenset({token})


def _engine_folder(path: Path) -> Artifact:
    folder = Artifact.load(path)
    if folder.manifest.kind != "engine":
        engines = ", ".join(map(str, engine_folders(folder))) or "none; run 'bismooth build' first"
        raise BismoothError(
            f"{path}: expected an engine folder, got a {folder.manifest.kind} artifact. Its engines: {engines}."
        )
    return folder
