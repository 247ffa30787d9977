"""The source model in torch, for comparison."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError


def torch_outputs(folder: Path, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """First output [S, V] of the transformers model in ``folder``, in float32, for each window of ids [N, S].

    The model is loaded whole.

    Raises:
        BismoothError: transformers cannot load it.
    """
    import torch

    model = load_model(folder)
    with torch.no_grad():
        for window in ids:
            tokens = torch.from_numpy(window[None])  # pyright: ignore[reportUnknownMemberType]
            yield model(input_ids=tokens)[0][0].float().numpy()


def load_model(folder: Path) -> Any:
    """The transformers model in ``folder``, in float32 and whole.

    Raises:
        BismoothError: transformers cannot load it.
    """
    import torch
    from transformers import AutoConfig

    from ..export.skeleton import model_class

    try:
        with _quiet():
            cls = model_class(cast(Any, AutoConfig).from_pretrained(folder, trust_remote_code=False))
            return cls.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise BismoothError(
            f"{folder}: transformers cannot load the source model again: {' '.join(str(error).split())} "
            "Leave this hop out with --hop, or export the model again."
        ) from error


@contextmanager
def _quiet() -> Generator[None]:
    """Without the progress bar of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
