"""Continue texts and answer chats with an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..engines.chat import Message
from ..engines.detokenizer import Detokenizer, StopText
from ..engines.generation import Ended, Generation
from ..engines.sampling import GREEDY, Sampling
from ..export.errors import BismoothError
from . import console
from .text_model import TextModel, open_text_model

Write = Callable[[str], bool | None]
"""Takes text; returns False if nobody reads it any more."""


@dataclass(frozen=True)
class Continuation:
    """A prompt and its continuation, without stop token or stop string; ``tokens`` counts the new ones."""

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    ended: Ended | None


@dataclass(frozen=True)
class Rates:
    """Tokens and what they took, see :class:`..engines.generation.Generation`."""

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float

    @staticmethod
    def of(generation: Generation) -> Rates:
        return Rates(
            generation.prefill_tokens, generation.prefill_seconds, generation.decode_tokens, generation.decode_seconds
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "prefill_tokens_per_second": _rate(self.prefill_tokens, self.prefill_seconds),
            "decode_tokens_per_second": _rate(self.decode_tokens, self.decode_seconds),
        }

    def __str__(self) -> str:
        parts = [
            ("prefill", self.prefill_tokens, self.prefill_seconds),
            ("decode", self.decode_tokens, self.decode_seconds),
        ]
        return ", ".join(
            f"{name} {_rate(tokens, seconds):.4g} tokens/s ({tokens} in {seconds:.2f} s)"
            for name, tokens, seconds in parts
            if tokens and seconds
        )


@dataclass(frozen=True)
class GenerateResult:
    """Continuations of a batch of prompts."""

    engine: Path
    continuations: tuple[Continuation, ...]
    rates: Rates

    @property
    def interrupted(self) -> bool:
        return any(one.ended is Ended.INTERRUPTED for one in self.continuations)

    def to_json(self) -> dict[str, Any]:
        continuations = [asdict(one) for one in self.continuations]
        return {"engine": str(self.engine), "continuations": continuations, **self.rates.to_json()}


def generate(
    engine: str | Path,
    prompts: Sequence[str],
    *,
    chat: bool | None = None,
    system: str | None = None,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    threads: int | None = None,
    write: Write | None = None,
) -> GenerateResult:
    """Continue ``prompts``, as one batch.

    Args:
        engine: engine folder.
        chat: prompts are messages to answer. By default if the model has a chat template.
        system: the system message of each chat.
        sampling: how tokens are chosen; by default the likeliest ones.
        max_new_tokens: of each prompt.
        stop: strings that end a continuation.
        write: is called with the text as it is made; with that of several prompts one after the other at the end.

    Ctrl-C ends the continuations where they are.

    Raises:
        BismoothError: the engine cannot be opened, a prompt cannot be continued, or a stop string is empty.
    """
    path = Path(engine)
    with open_text_model(path, threads) as model:
        ids = [_encode(model, prompt, chat, system) for prompt in prompts]
        generation = Generation(model.decoder, ids, sampling, stop=model.stop, limit=max_new_tokens)
        stream = write if write is not None and len(prompts) == 1 else None
        texts = stream_text(generation, model.tokenizer, stop, stream)
    continuations = tuple(
        Continuation(prompt, text, len(tokens), len(row.tokens), row.ended)
        for prompt, text, tokens, row in zip(prompts, texts, ids, generation.rows, strict=True)
    )
    if write is not None:
        write("\n" if stream else "".join(f"[{number}] {text}\n" for number, text in enumerate(texts, 1)))
        note_end(generation)
    return GenerateResult(path, continuations, Rates.of(generation))


def stream_text(generation: Generation, tokenizer: Tokenizer, stop: Sequence[str], write: Write | None) -> list[str]:
    """The text of each row. That of the only one goes to ``write`` as it is made; without ``write`` progress is shown.

    Ctrl-C ends the generation, and so does a reader of the text who goes away.
    """
    rows = [_RowText(tokenizer, stop) for _ in generation.rows]
    emit: Write = write or (lambda _: None)
    try:
        for made in _shown(generation, streams=write is not None):
            for row, token in made.items():
                if emit(rows[row].push(token)) is False:
                    generation.interrupt()
                elif rows[row].found:
                    generation.stop(row)
    except KeyboardInterrupt:
        generation.interrupt()
    for row in rows:
        emit(row.finish())
    return [row.text for row in rows]


def _shown(generation: Generation, *, streams: bool) -> Iterator[Mapping[int, int]]:
    """The steps, with their progress; where text is streamed with that of the prompt alone, which gives way to it."""
    steps = iter(generation)
    if streams:
        with console.progress(transient=True) as progress:
            progress("read the prompt", 0, generation.prefill_tokens)
            first = next(steps)
        yield first
        yield from steps
        return
    with console.progress() as progress:
        progress("generate", 0, generation.limit)
        for number, made in enumerate(steps, 1):
            yield made
            progress("generate", number, generation.limit)


class _RowText:
    """The text of one row so far, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._detokenizer, self._stop = Detokenizer(tokenizer), StopText(tuple(stop))
        self.text = ""

    @property
    def found(self) -> bool:
        return self._stop.found

    def push(self, token: int) -> str:
        return self._add(self._stop.push(self._detokenizer.push(token)))

    def finish(self) -> str:
        return self._add(self._stop.push(self._detokenizer.finish()) + self._stop.finish())

    def _add(self, text: str) -> str:
        self.text += text
        return text


def _encode(model: TextModel, prompt: str, chat: bool | None, system: str | None) -> list[int]:
    if chat or (chat is None and model.template is not None):
        return model.encode_chat([*system_message(system), {"role": "user", "content": prompt}])
    if system is not None:
        raise BismoothError(f"--system: has no effect: {model.path} has no chat template. Leave it out.")
    return model.encode(prompt)


def system_message(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


def note_end(generation: Generation) -> None:
    """Say on stderr how fast it went, and why rows ended if not by the model's own choice."""
    forced = sorted({row.ended for row in generation.rows if row.ended not in (None, Ended.STOP)})
    reasons = f"ended: {', '.join(forced)}" if forced else ""
    console.note("; ".join(filter(None, [str(Rates.of(generation)), reasons])))


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds else None
