"""The commands that show what there is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..engines.bundle_manifest import MANIFEST as BUNDLE
from ..passes.recipe import Recipe
from ..passes.recipe_file import BUILTIN
from . import cli_options as o
from . import console
from .cli_app import finish


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="ART|ENGINE|BUNDLE|FILE.onnx", help="Artifact, engine, bundle or any Q/DQ graph.")
    ],
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Show what a file holds and what is wrong with it.

    In a Q/DQ graph: whatever TensorRT rejects, misreads or runs in float. In a bundle: every file that was changed.
    """
    console.show_progress(not quiet)
    if (path / BUNDLE).is_file():  # for which the extra 'runtime' is enough
        from .inspect_bundle import inspect_bundle

        finish(inspect_bundle(path), as_json)
        return
    from . import stages

    finish(stages.inspect(path), as_json)


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME|FILE", help="The recipe to show in full.")] = None,
    as_json: o.AsJson = False,
) -> None:
    """List the built-in recipes, or show one in full."""
    from .results import Listing

    if name is None:
        finish(Listing(tuple(map(Recipe.load, BUILTIN))), as_json)
    elif as_json:
        console.show_json(Recipe.load(name).to_dict())
    else:
        sys.stdout.write(Recipe.load(name).to_yaml())


def cache(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH...", help="Outputs of unfinished runs; by default all.")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Delete what they have left: those runs begin anew the next time.")
    ] = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """List what unfinished runs have left, or clear it."""
    from .cache import cache as run

    console.show_progress(not quiet)
    finish(run(paths or (), clear=clear), as_json)
