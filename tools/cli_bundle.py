"""The command ``package``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import cli_options as o
from . import console
from .cli_app import finish


def package(
    artifact: Annotated[Path, typer.Argument(metavar="ART|COMPILE_DIR", help="Artifact, or the output of 'compile'.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Bundle to make.")],
    engine: Annotated[
        list[str],
        typer.Option("--engine", metavar="NAME...", help="Folders in engines/; by default all that fit the artifact."),
    ] = [],
    licence: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Licence of the model, where nothing beside it states the right one."),
    ] = None,
    force: o.Force = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Put engines and all that running them takes into a folder that can be copied anywhere."""
    from .package import package as run

    console.show_progress(not quiet)
    result = run(artifact, output, engines=tuple(engine), licence=licence, force=force)
    for sentence in result.to_json().get("warnings", ()):
        console.show_warning(sentence)
    finish(result, as_json)
