"""The inputs of a language model that follow from its token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from ..export.graph_names import ATTENTION_MASK, INPUT_IDS, PAST, POSITION_IDS, is_past


@dataclass(frozen=True)
class Port:
    """An input or output: numpy dtype (``None`` for types numpy lacks) and shape, symbolic dimensions by name."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...]


def token_feeds(
    label: str, inputs: Sequence[Port], ids: NDArray[np.int64], others: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, NDArray[Any]]:
    """A value for each of ``inputs`` from token ids [B, S] without padding, and from ``others``; caches are empty.

    Args:
        label: what has these inputs, for messages.

    Raises:
        BismoothError: token ids do not determine one of ``inputs``.
    """
    empty = {port.name: np.zeros(_empty(port, len(ids)), port.dtype) for port in inputs if is_past(port.name)}
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape)
    known: dict[str, NDArray[Any]] = {
        INPUT_IDS: ids,
        ATTENTION_MASK: np.ones_like(ids),
        POSITION_IDS: positions,
        "token_type_ids": np.zeros_like(ids),
        **empty,
        **(others or {}),
    }
    unknown = [port.name for port in inputs if port.name not in known or port.dtype is None]
    if unknown:
        raise BismoothError(
            f"{label}: cannot be run on text, since it has the input '{unknown[0]}'. "
            f"Expected some of {', '.join(known)}, and {PAST}.*. Export the model anew."
        )
    return {port.name: known[port.name].astype(port.dtype or np.int64) for port in inputs}


def _empty(port: Port, batch: int) -> tuple[int, ...]:
    """The shape of a cache [B, heads, 0, size]: dimensions that are not fixed are the batch and the length."""
    return tuple(size if isinstance(size, int) else (0 if axis else batch) for axis, size in enumerate(port.shape))
