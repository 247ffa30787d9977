"""The peer of decoding benchmarks: transformers in torch, float32, with its own cache.

Reads the folder of a float artifact from the command line, prints seconds as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .bench_timing import time_run
from .torch_model import load_model


class TorchDecoder:
    """A :class:`..engines.decoder.Decoder` of a transformers model; rows have no padding."""

    def __init__(self, folder: Path) -> None:
        self._model = load_model(folder)
        self.vocab_size: int = self._model.config.vocab_size
        self.capacity: int = self._model.config.max_position_embeddings
        self.reset()

    @property
    def length(self) -> int:
        return 0 if self._cache is None else self._cache.get_seq_length()

    def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See :class:`..engines.decoder.Decoder`; ``mask`` is not looked at."""
        import torch

        with torch.inference_mode():
            tokens = torch.from_numpy(ids)  # pyright: ignore[reportUnknownMemberType]
            output = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        return output.logits[:, -1].numpy()

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`..engines.decoder.Decoder`."""
        return self.prefill(tokens[:, None])

    def reset(self) -> None:
        """See :class:`..engines.decoder.Decoder`."""
        self._cache: Any = None

    def close(self) -> None:
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def main() -> None:
    """Entry point of ``python -m bismooth.tools.bench_torch``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with TorchDecoder(options.artifact) as decoder:
        ids = np.random.default_rng(0).integers(0, decoder.vocab_size, (1, options.prompt_length))
        runs = [time_run(decoder, ids, options.new_tokens) for _ in range(options.repeat + 1)][1:]
    rows = [{"prefill": run.prefill, "decode": run.decode} for run in runs]
    print(json.dumps({"rounds": rows}))


if __name__ == "__main__":
    main()
