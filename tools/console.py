"""What the commands show: results on stdout (tables, or JSON alone), progress and errors on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, Protocol, cast, runtime_checkable

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Report = Callable[[str, int, int], None]
"""Called with the step's name, how many of its units are done, and how many there are."""

_UNITS = ("bytes", "seconds", "share")
_LINE_SECONDS = 60.0
"""Where progress is lines, how often a step that takes long has another one."""

_SHOW_PROGRESS: ContextVar[bool] = ContextVar("show_progress", default=False)


class Result(Protocol):
    """What a stage returns.

    ``to_json`` gives plain data. Its keys are what people read; the suffixes ``_bytes``, ``_seconds`` and ``_share``
    are units. The key ``failures``, where there is one, lists the gates that were missed, a sentence each.
    """

    def to_json(self) -> Mapping[str, Any]: ...


@runtime_checkable
class Brief(Protocol):
    """A result whose ``to_json`` is more than a terminal shows: ``brief`` is what it shows instead."""

    def brief(self) -> Mapping[str, Any]: ...


def show(result: Result, as_json: bool) -> None:
    """Write ``result`` to stdout."""
    if as_json:
        show_json(result.to_json())
    else:
        _Console().print(render(result))


def show_json(document: Mapping[str, Any]) -> None:
    """Write ``document`` to stdout as JSON."""
    write(json_text(document))


def write(text: str) -> bool:
    """Write ``text`` to stdout, at once; False if nobody reads it any more. What is written after that is dropped."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop(sys.stdout)
        return False
    return True


class _Console(Console):
    """Goes on if nobody reads it any more, as behind a pipe into ``head``: a run is not worth less for that."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _drop(self.file)


def _drop(stream: IO[str]) -> None:
    """Let what is still written to ``stream`` vanish, at the end of the process too."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def json_text(document: Mapping[str, Any]) -> str:
    """``document`` as JSON; NaN and infinities, which JSON lacks, become text."""
    return json.dumps(_finite(document), indent=2, default=str, allow_nan=False) + "\n"


def show_error(message: str) -> None:
    """Write one message to stderr, unwrapped, so that paths and commands in it can be copied."""
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def note(text: str) -> None:
    """Write one line to stderr, where progress is shown."""
    if _SHOW_PROGRESS.get():
        _Console(stderr=True).print(Text(text), soft_wrap=True)


def note_resumed(units: int, progress: tuple[str, int, int] | None) -> None:
    """Say that a run goes on from an earlier one, if that has done any units; ``progress``: how far it was."""
    if units:
        where = "" if progress is None else " ({}: {} of {})".format(*progress)
        note(f"continues an earlier run: {units} units are there{where}")


def show_warning(message: str) -> None:
    """Write one message to stderr, as :func:`show_error` does."""
    Console(stderr=True).print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)


def failures(result: Result) -> Sequence[str]:
    """The gates that ``result`` missed."""
    return result.to_json().get("failures", ())


def render(result: Result) -> RenderableType:
    """``result`` as tables: single values first, then a table per list or group of values, then missed gates."""
    whole = result.brief() if isinstance(result, Brief) else result.to_json()
    document = {key: value for key, value in whole.items() if key != "failures"}
    missed = (Text.assemble(("missed  ", "bold red"), sentence) for sentence in failures(result))
    return Group(*_blocks(document, None), *missed)


def _blocks(document: Mapping[str, Any], title: str | None) -> Iterator[RenderableType]:
    nested = {key: value for key, value in document.items() if _is_table(value)}
    if single := {key: value for key, value in document.items() if key not in nested}:
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column()
        table.add_column(overflow="fold")  # a long path is shown whole
        for key, value in single.items():
            table.add_row(_label(key), Text(_formatted(key, value)))
        yield table
    for key, value in nested.items():
        path = _label(f"{title} {key}" if title else key)
        if isinstance(value, Mapping):
            yield from _blocks(cast(Mapping[str, Any], value), path)
        else:
            yield _rows(cast(Sequence[Mapping[str, Any]], value), path)


def _rows(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for key in columns:
        numeric = all(isinstance(row.get(key), int | float | None) for row in rows)
        table.add_column(_label(key), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(key, row.get(key))) for key in columns))
    return table


def _cell(key: str, value: Any) -> str:
    """As elsewhere, but for shorter numbers."""
    has_unit = key.rpartition("_")[2] in _UNITS
    return f"{value:.3g}" if isinstance(value, float) and not has_unit else _formatted(key, value)


def _is_table(value: object) -> bool:
    if isinstance(value, Mapping):
        return bool(cast(Mapping[str, Any], value))
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in cast(Sequence[Any], value))


def _label(key: str) -> str:
    return key.replace("_", " ")


def _formatted(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _formatted_number(key, value)
    if isinstance(value, list | tuple):
        return ", ".join(_formatted(key, item) for item in cast(Sequence[Any], value)) or "none"
    return str(value) if value != {} else "none"


def _formatted_number(key: str, value: float) -> str:
    unit = key.rpartition("_")[2]
    if unit == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if unit == "seconds":
        return f"{value:.1f} s"
    if unit == "share":
        return f"{value:.2%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in cast(Sequence[Any], value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def show_progress(on: bool) -> None:
    """Whether :func:`progress` shows anything. Off until a command switches it on: a library is silent."""
    _SHOW_PROGRESS.set(on)


@contextmanager
def progress(*, transient: bool = False) -> Generator[Report]:
    """A function to report progress with: bars on a terminal's stderr; in a file, a line per step and one a minute.

    Args:
        transient: bars vanish at the end, and there are no lines.
    """
    console = _Console(stderr=True)
    if not _SHOW_PROGRESS.get() or (transient and not console.is_interactive):
        yield lambda _step, _done, _total: None
    elif not console.is_terminal:
        yield _lines(console)
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=transient) as bars:
            yield _bars(bars)


def _lines(console: Console) -> Report:
    seen: set[str] = set()
    said = time.monotonic()

    def report(step: str, done: int, total: int) -> None:
        nonlocal said
        is_new = step not in seen
        if is_new or (done < total and time.monotonic() - said >= _LINE_SECONDS):
            seen.add(step)
            said = time.monotonic()
            console.print(Text(step if is_new else f"{step}: {done} of {total}"), soft_wrap=True)

    return report


def _bars(bars: Progress) -> Report:
    tasks: dict[str, Any] = {}

    def report(step: str, done: int, total: int) -> None:
        if step not in tasks:
            tasks[step] = bars.add_task(step, total=total)
        bars.update(tasks[step], completed=done, total=total)

    return report
