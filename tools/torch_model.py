"""The source model in torch, for comparison."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..engines.budget import base_memory
from ..engines.child_process import ProcessEndedError, ask, last_words
from ..export.errors import BismoothError
from ..passes.progress import Progress, silent


@dataclass(frozen=True)
class TorchOutputs:
    """First output of the torch model for windows of tokens.

    Attributes:
        path: the file that holds it.
        shape: [N, S, …], float32.
        peak_rss: resident memory of the process that has computed it in bytes, the most at any time; None if the
            system does not tell.
    """

    path: Path
    shape: tuple[int, ...]
    peak_rss: int | None

    def read(self, number: int) -> NDArray[np.float32]:
        """The output [S, …] for a window."""
        count = prod(self.shape[1:])
        values = np.fromfile(self.path, np.float32, count, offset=number * count * np.dtype(np.float32).itemsize)
        return values.reshape(self.shape[1:])


def torch_outputs(
    folder: Path,
    ids: NDArray[np.int64],
    scratch: Path,
    memory: int | None = None,
    progress: Progress = silent,
) -> TorchOutputs:
    """First output of the transformers model in ``folder``, in float32, for windows of ids [N, S].

    The model runs in a process of its own, which holds one weight at a time.

    Args:
        folder: with ``config.json`` and safetensors files.
        ids: token ids.
        scratch: a folder for the outputs.
        memory: bytes that this process and that one together may take; any number by default.
        progress: told about the parameters.

    Raises:
        BismoothError: transformers cannot load the model, the memory is too little, there is no space, or the process
            ended.
        RuntimeError: a bug in this package, with the traceback of the process.
    """
    tokens, outputs = scratch / "torch-ids.npy", scratch / "torch-outputs.bin"
    np.save(tokens, ids)
    request = {
        "folder": str(folder.absolute()),
        "ids": str(tokens.absolute()),
        "outputs": str(outputs.absolute()),
        "memory": memory,
        "beside": base_memory(),
    }
    done = _ask(folder, request, progress)
    return TorchOutputs(outputs, tuple(done["shape"]), done["peak_rss"])


def torch_least(folder: Path, length: int) -> int:
    """Bytes that the process of the model in ``folder`` takes at least on windows of ``length`` tokens.

    Not for a model that computes with a weight in a way that PyTorch does not tell of: that shows when it runs.

    Raises:
        BismoothError: as :func:`torch_outputs`.
    """
    return _ask(folder, {"folder": str(folder.absolute()), "length": length})["least"]


def _ask(folder: Path, request: dict[str, Any], progress: Progress = silent) -> dict[str, Any]:
    try:
        return ask(
            "bismooth.tools.torch_worker",
            "the process of the torch model",
            request,
            lambda told: progress("run the torch model", *told),
        )
    except ProcessEndedError as end:
        raise BismoothError(
            f"{folder}: the process of the torch model ended ({end.how}). {end.hint}Its last words: "
            f"{last_words(end.printed)}. Leave this hop out with --hop, or give it more memory."
        ) from end


def load_model(folder: Path) -> Any:
    """The transformers model in ``folder``, in float32 and whole.

    Raises:
        BismoothError: transformers cannot load it.
    """
    import torch
    from transformers import AutoConfig

    from ..export.model_class import model_class

    with loading(folder):
        cls = model_class(cast(Any, AutoConfig).from_pretrained(folder, trust_remote_code=False))
        return cls.from_pretrained(folder, dtype=torch.float32).eval()


@contextmanager
def loading(folder: Path) -> Generator[None]:
    """What fails inside the block is that the source model cannot be loaded; no progress bars.

    Raises:
        BismoothError: it failed.
    """
    try:
        with _quiet():
            yield
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
