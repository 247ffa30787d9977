"""A chat in turns, whose caches are kept from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..engines.chat import Message
from ..engines.generation import Generation
from ..engines.sampling import GREEDY, Sampling
from ..export.errors import BismoothError
from . import console
from .generate import Write, note_end, stream_text, system_message
from .text_model import TextModel, open_text_model

RESET = "/reset"
"""Typed instead of a message, it begins a new chat."""


class Conversation:
    """The messages of a chat, and which tokens the decoder's caches hold of it.

    A turn appends to the caches if the template continues the text that they hold. Otherwise (it may drop or trim parts
    of earlier answers) all is computed anew, so that an answer never depends on what was kept.
    """

    def __init__(
        self, model: TextModel, sampling: Sampling, *, system: str | None, limit: int, stop: Sequence[str]
    ) -> None:
        self._model, self._sampling, self._limit, self._stop = model, sampling, limit, stop
        self._system = system_message(system)
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages: list[Message] = list(self._system)
        self._cached: list[int] = []
        self._model.decoder.reset()

    def answer(self, text: str, write: Write) -> Generation:
        """Answer a message, and keep both. Ctrl-C ends the answer.

        Raises:
            BismoothError: the chat does not fit in the decoder, or the template refuses it. The chat is as it was.
        """
        decoder = self._model.decoder
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self._model.encode_chat(messages)
        kept = len(self._cached)
        if not 0 < kept < len(ids) or ids[:kept] != self._cached:
            decoder.reset()
            kept = 0
        self._cached = []  # for all that is known, should the decoder fail
        sampling = replace(self._sampling, seed=self._sampling.seed + len(messages))
        generation = Generation(decoder, [ids[kept:]], sampling, stop=self._model.stop, limit=self._limit)
        (answer,) = stream_text(generation, self._model.tokenizer, self._stop, write)
        self._cached = [*ids, *generation.rows[0].tokens][: decoder.length]
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return generation


def converse(
    engine: str | Path,
    read: Callable[[], str],
    write: Write,
    *,
    system: str | None = None,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    threads: int | None = None,
) -> None:
    """Answer the messages that ``read`` returns until it raises ``EOFError``; see :func:`.generate.generate`.

    Raises:
        BismoothError: the engine cannot be opened, or has no chat template.
    """
    with open_text_model(Path(engine), threads) as model:
        model.encode_chat([*system_message(system), {"role": "user", "content": "Hello"}])  # or say now that it cannot
        conversation = Conversation(model, sampling, system=system, limit=max_new_tokens, stop=stop)
        while True:
            try:
                text = read()
            except EOFError:
                return
            if text.strip() == RESET:
                conversation.reset()
            elif text.strip():
                _turn(conversation, text, write)


def _turn(conversation: Conversation, text: str, write: Write) -> None:
    try:
        generation = conversation.answer(text, write)
    except BismoothError as error:
        console.show_error(f"{error} {RESET} begins a new chat.")
        return
    write("\n")
    note_end(generation)
