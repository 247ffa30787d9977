"""The source model in torch, for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray


def torch_logits(folder: Path, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    """First output [S, V] of the transformers model in ``folder``, in float32, for each window of ids [N, S].

    The model is loaded whole.
    """
    import torch
    from transformers import AutoConfig

    from ..export.skeleton import model_class

    cls = model_class(cast(Any, AutoConfig).from_pretrained(folder))
    model = cls.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for window in ids:
            tokens = torch.from_numpy(window[None])  # pyright: ignore[reportUnknownMemberType]
            yield model(input_ids=tokens)[0][0].float().numpy()
