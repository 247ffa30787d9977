"""Show a build's phases on the terminal."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .base import Phase, PhaseCallback


@contextmanager
def build_bar(title: str, console: Console | None = None) -> Generator[PhaseCallback]:
    """A progress bar, on stderr by default, for the ``on_phase`` argument of a build.

    TensorRT reports no steps while it compiles kernels, most of the time of a build: the bar then only pulses.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[phase]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, phase="")

        def show(phase: Phase) -> None:
            progress.update(
                task, total=phase.total if phase.total > 1 else None, completed=phase.done, phase=phase.name
            )

        yield show
