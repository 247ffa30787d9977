"""The application that commands register with, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, TypeVar

import typer

from . import cli_options as o
from . import console
from .cli_errors import GATE

Function = TypeVar("Function", bound=Callable[..., None])

app = typer.Typer(
    help="From a language model to a verified TensorRT INT8 engine.",
    epilog="Values may follow each other where an option shows '...'; then write SOURCE, ART or ENGINE before it.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(function: Function) -> Function:
    """Register a command under its function's name."""
    return app.command(function.__name__.rstrip("_"), cls=o.Command)(function)


def finish(result: console.Result, as_json: bool) -> None:
    """Show what a stage returned; missed gates end the command."""
    console.show(result, as_json)
    if console.failures(result):
        raise typer.Exit(GATE)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"bismooth {version('bismooth')}\n")
        raise typer.Exit


@app.callback()
def bismooth(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...
