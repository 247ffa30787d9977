"""Text to token windows, by one protocol for calibration and evaluation.

The pieces of all sources are joined with newlines, tokenised once without special tokens, and cut into non-overlapping
windows; the first N are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..export.errors import BismoothError
from ..export.hashing import array_sha256
from .sources import check_source, read_pieces

RANDOM = "random"
#: Only as much text is tokenised as the windows need. The cut changes tokens near it, never this many tokens earlier.
LOOKAHEAD = 1024
_CHARACTERS_PER_TOKEN = 6


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Token ids [N, L], int64, and the sources that they come from."""

    ids: NDArray[np.int64]
    sources: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return array_sha256(self.ids)


def load_tokenizer(artifact: Path) -> Tokenizer:
    """The tokenizer of an artifact folder, without the truncation and padding that its file may ask for.

    Raises:
        BismoothError: the folder has no readable ``tokenizer.json``.
    """
    path = artifact / "tokenizer.json"
    if not path.is_file():
        raise BismoothError(
            f"{artifact}: has no tokenizer.json, so text cannot become tokens. Expected it beside the model. "
            "Put it into the source folder and export again."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise BismoothError(f"{path}: not a valid tokenizer file: {error}. Export the model again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_windows(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    windows: int,
    length: int = 512,
    field: str | None = None,
    seed: int = 0,
) -> TokenWindows:
    """The first ``windows`` windows of ``length`` tokens from ``sources``.

    Args:
        sources: files and datasets as :func:`read_pieces` takes them, or the one word "random".
        tokenizer: see :func:`load_tokenizer`.
        field: text field of JSONL sources that name none themselves.
        seed: of random data; text is not shuffled.

    Raises:
        BismoothError: a source cannot be read or is empty, or all together hold too little text.
    """
    names = tuple(str(source) for source in sources)
    if windows < 1 or length < 2:
        raise BismoothError(f"data: Expected 1 or more windows of 2 or more tokens, got {windows} of {length}.")
    if not names:
        raise BismoothError(f"data: Expected one or more text files, got none. Random tokens have the name '{RANDOM}'.")
    if RANDOM in names:
        return TokenWindows(_random_ids(names, tokenizer, windows, length, seed), names)
    for name in names:
        check_source(name)
    ids = _encode(names, field, tokenizer, windows * length)
    if len(ids) < windows * length:
        raise BismoothError(
            f"data: {', '.join(names)}: too little text: {len(ids)} tokens, {len(ids) // length} windows of {length}. "
            f"Expected {windows} windows, {windows * length} tokens. Add text, or ask for fewer or shorter windows."
        )
    return TokenWindows(ids.reshape(windows, length), names)


def _random_ids(
    names: tuple[str, ...], tokenizer: Tokenizer, windows: int, length: int, seed: int
) -> NDArray[np.int64]:
    if len(names) > 1:
        raise BismoothError(
            f"data: '{RANDOM}' stands alone, got {', '.join(names)}. A file of that name is ./{RANDOM}."
        )
    return np.random.default_rng(seed).integers(tokenizer.get_vocab_size(), size=(windows, length), dtype=np.int64)


def _encode(names: tuple[str, ...], field: str | None, tokenizer: Tokenizer, count: int) -> NDArray[np.int64]:
    """Up to ``count`` ids. Reads no more text than they need, so a huge file costs no more than a small one."""
    stream = (piece for name in names for piece in _not_empty(name, read_pieces(name, field)))
    pieces: list[str] = []
    wanted = count + LOOKAHEAD
    size, target = 0, _CHARACTERS_PER_TOKEN * wanted
    while True:
        for piece in stream:
            pieces.append(piece)
            size += len(piece) + 1
            if size >= target:
                break
        ids = tokenizer.encode("\n".join(pieces), add_special_tokens=False).ids
        if len(ids) >= wanted or size < target:
            return np.array(ids[:count], dtype=np.int64)
        target = 2 * size


def _not_empty(name: str, pieces: Iterator[str]) -> Iterator[str]:
    empty = True
    for piece in pieces:
        empty = empty and not piece.strip()
        yield piece
    if empty:
        raise BismoothError(f"{name}: holds no text. Expected a file with text. Remove it from the list.")
