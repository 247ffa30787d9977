"""The commands that run engines."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ..export.errors import BismoothError
from . import cli_options as o
from . import console, entry
from .cli_errors import Interrupted

STDIN = "-"
_CHANCE = ("top_k", "top_p", "min_p", "seed")


def generate(
    context: typer.Context,
    engine: Annotated[Path, typer.Argument(metavar="ENGINE|BUNDLE", help="Engine folder, or bundle.")],
    prompt: Annotated[
        list[str], typer.Option("--prompt", metavar="TEXT...", help="Texts to continue or answer; '-': stdin.")
    ] = [],
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Whether prompts are messages; by default if there is a chat template."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Chat: a message per line of stdin.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="The most tokens per prompt.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="Draw tokens; 0 takes the likeliest ones.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, metavar="K", help="Draw among the K likeliest tokens.")] = None,
    top_p: Annotated[float, typer.Option(metavar="P", help="Draw among the likeliest that have this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(metavar="P", help="Draw among those that have P times the largest.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Chooses the tokens that are drawn.")] = 0,
    stop: Annotated[list[str], typer.Option("--stop", metavar="TEXT...", help="Texts to end before.")] = [],
    threads: o.Threads = None,
    as_json: o.AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The text alone: no progress, no rates.")] = False,
) -> None:
    """Continue texts or chat with an engine."""
    if temperature == 0:
        o.refuse_unheeded(context, _CHANCE, "without --temperature the likeliest tokens are taken")
    if chat is False and system is not None:
        raise BismoothError("--system: has no effect: with --no-chat there are no messages. Leave it out.")
    if interactive:
        _check_interactive(prompt, chat, as_json)
    from ..engines.sampling import Sampling

    console.show_progress(not quiet)
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    if interactive:
        _converse(
            engine, system=system, sampling=sampling, max_new_tokens=max_new_tokens, stop=tuple(stop), threads=threads
        )
        return
    prompts = _read_prompts(prompt)
    from .generate import generate as run

    result = run(
        engine,
        prompts,
        chat=chat,
        system=system,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop),
        threads=threads,
        write=None if as_json else console.write,
    )
    if as_json:
        console.show(result, as_json)
    if result.interrupted:
        raise Interrupted


def _converse(engine: Path, **options: Any) -> None:
    from .chat import converse

    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() a history and keys to edit with
    try:
        converse(engine, _read_line, console.write, **options)
    except KeyboardInterrupt:
        console.write("\n")
        raise Interrupted from None


def _read_line() -> str:
    if entry.is_ending():  # the answer before was broken off
        raise KeyboardInterrupt
    try:
        return input("> " if sys.stdin.isatty() else "")
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error


def _check_interactive(prompts: list[str], chat: bool | None, as_json: bool) -> None:
    """Refuse what has no effect on a chat.

    Raises:
        BismoothError: names the option.
    """
    for option, given in (("--prompt", bool(prompts)), ("--no-chat", chat is False), ("--json", as_json)):
        if given:
            raise BismoothError(f"{option}: has no effect: --interactive answers line after line. Leave it out.")


def _read_prompts(prompts: list[str]) -> list[str]:
    """The prompts, with the text of stdin for ``-``.

    Raises:
        BismoothError: there is none, more than one is stdin, or that is not UTF-8.
    """
    if not prompts or prompts.count(STDIN) > 1:
        raise BismoothError(
            f"--prompt: Expected one or more texts, of which one may be '{STDIN}' for stdin, or --interactive, "
            f"got {' '.join(prompts) or 'none'}."
        )
    return [_read_stdin() if prompt == STDIN else prompt for prompt in prompts]


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error


def _not_utf8(error: UnicodeDecodeError) -> BismoothError:
    return BismoothError(f"stdin: is not UTF-8: {error}. Convert it to UTF-8.")
