"""Where text comes from: one iterator of text pieces per source, read no further than asked.

A source is one word: ``FILE`` (text, a piece per line), ``FILE.jsonl`` or ``FILE.jsonl:FIELD`` (a piece per record), or
``hf:NAME[@CONFIG][:SPLIT[:FIELD]]`` (a Hugging Face dataset, streamed; needs the package ``datasets``).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from ..export.errors import BismoothError


def check_source(source: str) -> None:
    """Raise :class:`BismoothError` now for a file that cannot be opened, even if nothing would be read from it."""
    if not source.startswith("hf:"):
        path, _ = _split_field(source)
        try:
            path.open("rb").close()
        except OSError as error:
            raise _unreadable(path, error) from error


def read_pieces(source: str, field: str | None = None) -> Iterator[str]:
    """Text pieces of ``source``; ``field`` names the JSONL field where the source itself does not.

    Raises:
        BismoothError: while iterating: the source does not exist, is no UTF-8 text, or a record lacks the field.
    """
    if source.startswith("hf:"):
        yield from _dataset(source)
        return
    path, own_field = _split_field(source)
    lines = _lines(path)
    yield from _records(path, lines, own_field or field) if path.suffix == ".jsonl" else lines


def _split_field(source: str) -> tuple[Path, str | None]:
    head, separator, tail = source.rpartition(".jsonl:")
    return (Path(f"{head}.jsonl"), tail) if separator else (Path(source), None)


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise BismoothError(
                        f"{path}: line {number} holds zero bytes. Expected UTF-8 text, got binary data."
                    )
                yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise BismoothError(
            f"{path}: not UTF-8 text: {error.reason} (0x{error.object[error.start]:02x}) after line {number}. "
            "Expected a text file. Convert it, for example with iconv."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> BismoothError:
    return BismoothError(f"{path}: cannot be read ({error.strerror}). Expected a text or JSONL file.")


def _records(path: Path, lines: Iterator[str], field: str | None) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise BismoothError(
                f"{path}: line {number} is not JSON ({error}). Expected one record per line."
            ) from error
        yield _text(f"{path}: line {number}", record, field)


def _text(where: str, record: Any, field: str | None) -> str:
    if not isinstance(record, dict):
        raise BismoothError(f"{where} holds a {type(record).__name__}. Expected a JSON object with a text field.")
    fields = cast(dict[str, Any], record)
    known = ", ".join(fields)
    if field is None:
        raise BismoothError(f"{where} has the fields {known}. Expected the name of one. Write FILE.jsonl:FIELD.")
    if field not in fields:
        raise BismoothError(f"{where} has no field '{field}'. It has: {known}.")
    value = fields[field]
    if not isinstance(value, str):
        raise BismoothError(
            f"{where}: field '{field}' is a {type(value).__name__}. Expected a string. Choose from: {known}."
        )
    return value


def _dataset(source: str) -> Iterator[str]:
    name, _, rest = source.removeprefix("hf:").partition(":")
    split, _, field = rest.partition(":")
    name, _, config = name.partition("@")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise BismoothError(f"{source}: needs the package 'datasets'. Run 'pip install datasets'.") from error
    try:
        for record in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
            yield _text(source, record, field or "text")
    except BismoothError:
        raise
    except Exception as error:  # the library, its readers and its network raise what they like
        reason = " ".join(str(error).split())
        raise BismoothError(
            f"{source}: the dataset cannot be read: {reason} Expected hf:NAME[@CONFIG][:SPLIT[:FIELD]]."
        ) from error
