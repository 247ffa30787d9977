"""Tokens to text, as they come."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

from ..export.errors import BismoothError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the bytes of a character that is not complete are decoded to."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Detokenizer:
    """Text of tokens that come one by one. What it gives, joined, is the text of all of them, without special tokens.

    Text is held back while it may still change: in the middle of a character, and during a run of byte tokens
    (``<0x0A>``), which is decoded as a whole. A token's text depends on its neighbours, so it is decoded behind the
    tokens of the text before it.

    NOTE: ``tokenizers.decoders.DecodeStream`` drops what it holds back at the end, and raises where a run of byte
    tokens turns out to be no UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._before: list[int] = []
        """The tokens whose text was given last."""
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain with one more token."""
        name = self._tokenizer.id_to_token(token)
        if name is None or token in self._special:
            return ""
        self._held.append(token)
        text = self._text()
        return "" if _BYTE_TOKEN.fullmatch(name) or text.endswith(_UNFINISHED) else self._give(text)

    def finish(self) -> str:
        """What is held back; no more tokens come."""
        return self._give(self._text())

    def _text(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._held)[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._before, self._held = self._held, []
        return text


class StopText:
    """Passes text on up to the first stop string that is complete, and holds back what may be the beginning of one.

    Raises:
        BismoothError: a stop string is empty.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        if "" in stops:
            raise BismoothError("generate: a stop string is empty. Expected text that ends the continuation.")
        self._stops = stops
        self._held: str = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string. Nothing once one was :attr:`found`."""
        if self.found:
            return ""
        text = self._held + text
        matches = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if matches:
            self.found, self._held = True, ""
            return text[: min(matches)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What is held back; no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, but is not the whole of it."""
    return next(size for size in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:size]))
