"""A transformers model as a decoder, to hold ours against."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from bismooth.engines.decoder import Positions


class TorchDecoder:
    """Implements ``Decoder`` with the model's own caches."""

    def __init__(self, model: Any, capacity: int = 512) -> None:
        self._model = model.eval()
        self.vocab_size: int = model.config.vocab_size
        self.capacity = capacity
        self._positions = Positions("torch", capacity)
        self.reset()

    @property
    def length(self) -> int:
        return self._positions.length

    def reset(self) -> None:
        self._positions.reset()
        self._cache: Any = None

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @torch.no_grad()
    def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        places = self._positions.append(np.ones_like(ids) if mask is None else mask)
        outputs = self._model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(self._positions.mask),
            position_ids=torch.tensor(places),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = outputs.past_key_values
        return outputs.logits[:, -1].float().numpy()

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.prefill(tokens[:, None])
