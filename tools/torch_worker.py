"""A process that runs the torch model of an artifact, so that its memory is given back when it is done.

Asked by :mod:`.torch_model`, in the way of :mod:`..engines.child_process`: for outputs, or how much memory they take.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.child_process import Request, Tell, serve
from ..engines.memory import peak_rss, return_large_blocks
from ..export.replacing import cannot_write
from .stored_model import StoredModel


def write_outputs(
    folder: Path,
    ids: NDArray[np.int64],
    outputs: Path,
    memory: int | None = None,
    beside: int = 0,
    tell: Tell = lambda _told: None,
) -> tuple[int, ...]:
    """Write the first output [N, S, …] of the model in ``folder`` on windows of ids [N, S], float32.

    Where it is not finite and a parameter was never read on demand, the parameters are loaded and it runs again.

    Args:
        folder: the model, in safetensors files.
        ids: token ids.
        outputs: the file to write.
        memory: bytes that may be taken; any number by default.
        beside: bytes that others have taken of it.
        tell: told how many parameters were read, and how many there are.

    Returns:
        The shape of the output.

    Raises:
        BismoothError: transformers cannot load the model, ``memory`` is too little, or there is no space.
    """
    model = StoredModel(folder, lambda done, total: tell([done, total]))
    shape, is_finite = _write(model, ids, outputs, memory, beside)
    if not is_finite and model.unread:
        model.load_whole(memory, beside)
        shape, _ = _write(model, ids, outputs, memory, beside)
    return shape


def _write(
    model: StoredModel, ids: NDArray[np.int64], outputs: Path, memory: int | None, beside: int
) -> tuple[tuple[int, ...], bool]:
    """The shape of what was written, and whether all of it is finite."""
    shape, is_finite = ids.shape, True

    def write(window: int, first: int, values: NDArray[np.float32]) -> None:
        nonlocal shape, is_finite
        shape = (*ids.shape, *values.shape[2:])
        is_finite = is_finite and bool(np.isfinite(values).all())
        for number, part in enumerate(values, window):
            file.seek((number * ids.shape[1] + first) * prod(shape[2:]) * part.itemsize)
            file.write(np.ascontiguousarray(part).data)

    with outputs.open("wb") as file:
        model.run(ids, write, memory, beside)
    return shape, is_finite


def main() -> None:
    """Serve one request; the entry point of the process."""
    return_large_blocks()
    serve(_run)


def _run(request: Request, tell: Tell) -> dict[str, Any]:
    if "length" in request:
        return {"least": StoredModel(Path(request["folder"])).least(request["length"])}
    folder, ids, outputs = (Path(request[name]) for name in ("folder", "ids", "outputs"))
    try:
        shape = write_outputs(folder, np.load(ids), outputs, request["memory"], request["beside"], tell)
    except OSError as error:
        raise cannot_write(outputs, error) from error
    return {"shape": shape, "peak_rss": peak_rss()}


if __name__ == "__main__":
    main()
