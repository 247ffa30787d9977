"""Chat templates: from messages to the text that a model was trained to answer.

A template is Jinja that comes with the model. It is rendered in jinja2's sandbox, with what transformers gives to it:
the special tokens by name, ``raise_exception``, ``strftime_now``, a ``tojson`` that does not escape HTML, loop
controls, and the tag ``generation``, which marks answers for training.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from ..export.errors import BismoothError

Message = Mapping[str, Any]
"""A message: ``role`` (system, user, assistant) and ``content``."""

_FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_DEFAULT = "default"


@dataclass(frozen=True)
class ChatTemplate:
    """A template, its special tokens by name (``bos_token``), and where it came from, for messages."""

    source: str
    special_tokens: Mapping[str, str]
    label: str

    @staticmethod
    def load(folder: Path) -> ChatTemplate | None:
        """The template of a model: of ``chat_template.jinja``, else of ``tokenizer_config.json``. ``None`` without.

        Of several with names it is the one that is called default.

        Raises:
            BismoothError: a file cannot be read, or none of several templates is called default.
        """
        config = read_json(folder / _CONFIG)
        special = special_tokens(folder)
        if (path := folder / _FILE).is_file():
            return ChatTemplate(_read(path), special, str(path))
        label = str(folder / _CONFIG)
        match config.get("chat_template"):
            case None:
                return None
            case str(source):
                return ChatTemplate(source, special, label)
            case entries:
                return ChatTemplate(_default(entries, label), special, label)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of ``messages``, and the beginning of an answer if ``add_generation_prompt``.

        The tokenizer must not add special tokens to it.

        Raises:
            BismoothError: jinja2 is missing, the template is no Jinja, or it refuses the messages.
        """
        environment = _environment()
        try:
            return environment.from_string(self.source).render(
                self.special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template can raise whatever Python does
            raise BismoothError(
                f"{self.label}: the chat template cannot be rendered: {str(error) or type(error).__name__}. "
                "Expected messages as the template wants them. Mend the template, or generate with --no-chat."
            ) from error


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens of ``tokenizer_config.json`` by name: ``bos_token``, ``eos_token``, …

    Raises:
        BismoothError: the file cannot be read.
    """
    config = read_json(folder / _CONFIG)
    return {name: text for name, value in config.items() if (text := _token(name, value)) is not None}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no file.

    Raises:
        BismoothError: the file is no JSON, or holds no object.
    """
    if not path.is_file():
        return {}
    try:
        document = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise BismoothError(f"{path}: not a JSON file: {error}. Put the model's own file there.") from error
    if not isinstance(document, dict):
        raise BismoothError(
            f"{path}: expected a JSON object, got {type(document).__name__}. Put the model's own file there."
        )
    return cast(dict[str, Any], document)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BismoothError(f"{path}: not UTF-8: {error}. Put the model's own file there.") from error


def _token(name: str, value: Any) -> str | None:
    """The text of a special token, which is a string or ``{"content": …}``."""
    if not name.endswith("_token"):
        return None
    text = cast(Mapping[str, Any], value).get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _default(entries: Any, label: str) -> str:
    """The one called default of ``[{"name": …, "template": …}, …]``."""
    try:
        named = {entry["name"]: str(entry["template"]) for entry in entries}
        return named[_DEFAULT]
    except (KeyError, TypeError) as error:
        raise BismoothError(
            f"{label}: has no chat template that is called {_DEFAULT!r}: {error!r}. "
            f"Expected a text, or a list of texts with names. Put the one to use into {_FILE} beside it."
        ) from error


def _environment() -> Any:
    """A sandbox as that of transformers.

    Raises:
        BismoothError: jinja2 is not installed.
    """
    try:
        jinja2: Any = importlib.import_module("jinja2")
        sandbox: Any = importlib.import_module("jinja2.sandbox")
        extensions: Any = importlib.import_module("jinja2.ext")
    except ImportError as error:
        raise BismoothError(
            f"jinja2: cannot be imported ({error}), and chat templates need it. "
            "Run: pip install 'jinja2>=3.1.6', or generate with --no-chat."
        ) from error

    class Generation(extensions.Extension):
        tags = {"generation"}  # noqa: RUF012 that is how jinja2 wants it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extensions.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
