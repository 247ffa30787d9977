"""An engine that decodes, with what turns text into its tokens and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

from tokenizers import Tokenizer

from ..calibrators.data import load_tokenizer
from ..engines.bundle import Bundle
from ..engines.bundle_choice import choose_engine
from ..engines.bundle_manifest import MANIFEST as BUNDLE
from ..engines.chain import CHAIN
from ..engines.chat import ChatTemplate, Message, read_json, special_tokens
from ..engines.decoder import Decoder
from ..export.artifact import MANIFEST, Artifact
from ..export.errors import BismoothError
from . import console
from .engine_folder import engine_folders, engine_of, file_of

DECODERS: Mapping[str, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime_decoder", "OnnxRuntimeDecoder"),
    "tensorrt-rtx": ("tensorrt_decoder", "TensorRTDecoder"),
    "tensorrt": ("tensorrt_decoder", "TensorRTDecoder"),
}
"""Engine → module of ``bismooth.engines`` and class in it, which takes the engine's file."""

_ON_CPU = ("onnxruntime",)
"""Those whose decoders take ``threads``."""

Opening: TypeAlias = Callable[[int | None], Decoder]
"""Loads an engine with so many threads."""


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
    """The model of an engine folder or a bundle; its engine is closed at the end.

    Raises:
        BismoothError: as :func:`open_decoder`; or tokenizer, chat template or configuration cannot be read.
    """
    opening = _opening(path)
    tokenizer = load_tokenizer(path)
    template, stop = ChatTemplate.load(path), stop_tokens(path, tokenizer)
    with console.progress() as progress:
        progress("load the engine", 0, 1)
        decoder = opening(threads)
        progress("load the engine", 1, 1)
    with decoder:
        yield TextModel(path, decoder, tokenizer, template, stop)


def open_decoder(path: Path, threads: int | None = None) -> Decoder:
    """The decoder of an engine folder, or of the engine of a bundle that is best for this machine.

    Args:
        threads: threads per operator, of engines that run on the CPU; one per core by default.

    Raises:
        BismoothError: neither an engine folder nor a bundle, an engine that cannot decode, or one that cannot be
            loaded; or threads for one that runs on a GPU.
    """
    return _opening(path)(threads)


def _opening(path: Path) -> Opening:
    """What loads the engine at ``path``, once it is known which one that is."""
    if (path / BUNDLE).is_file():
        return _opening_of_bundle(Bundle.load(path, "size"))
    folder = engine_folder(path)
    return partial(_open, path, engine_of(folder), file_of(folder))


def _opening_of_bundle(bundle: Bundle) -> Opening:
    choice = choose_engine(bundle)
    console.note(choice.reason)

    def opening(threads: int | None) -> Decoder:
        with bundle.hashing(choice.engine) as check, ExitStack() as stack:
            file = bundle.path / choice.engine.file
            engine = choice.engine
            decoder = stack.enter_context(_open(bundle.path, engine.runtime, file, threads, engine.capacity))
            check()
            stack.pop_all()
        return decoder

    return opening


def _open(path: Path, engine: str, file: Path, threads: int | None, capacity: int | None = None) -> Decoder:
    """``capacity`` is that of a bundle's engine, beside which no manifest tells it."""
    if engine not in DECODERS:
        raise BismoothError(
            f"{path}: engines of {engine} cannot generate text. Expected one of: {', '.join(DECODERS)}. "
            "Run 'bismooth build ART --engine NAME' with one of these."
        )
    if file.name == CHAIN and engine not in _ON_CPU:
        raise BismoothError(
            f"{path}: a chain of engines of {engine} cannot generate text yet. Expected an engine in one piece, or a "
            "chain of onnxruntime. Build one without --split-blocks, or with --engine onnxruntime."
        )
    if threads is not None and engine not in _ON_CPU:
        raise BismoothError(f"--threads: has no effect: {path} runs on a GPU. Leave it out.")
    module, name = DECODERS[engine]
    decoder: Any = getattr(importlib.import_module(f"..engines.{module}", __package__), name)
    options = {"threads": threads, "capacity": capacity} if engine in _ON_CPU else {}
    return decoder(file, **options)


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


def engine_folder(path: Path) -> Artifact:
    """The engine folder at ``path``.

    Raises:
        BismoothError: it is none.
    """
    if not (path / MANIFEST).is_file():
        what = "is not an engine folder or a bundle" if path.exists() else "does not exist"
        raise BismoothError(
            f"{path}: {what}. Expected one of the folders that 'bismooth build' makes in ART/engines, or what "
            "'bismooth package' makes."
        )
    folder = Artifact.load(path)
    if folder.manifest.kind != "engine":
        engines = ", ".join(map(str, engine_folders(folder))) or "none; run 'bismooth build' first"
        raise BismoothError(
            f"{path}: expected an engine folder, got a {folder.manifest.kind} artifact. Its engines: {engines}."
        )
    return folder
