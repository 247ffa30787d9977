"""Models of LLaMA3's shapes with random weights and another model's tokenizer, for measurements."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..export.placed_tensors import PlacedTensors
from ..export.safetensors_file import SafetensorsWriter
from . import console

TOKENIZER = "tokenizer.json"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SPREAD = 0.02
"""Standard deviation of the weights, as models are initialized with."""

_PIECE = 1 << 22
"""Values that are written at once."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA; ``tied`` if embedding and head are one tensor."""

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = 128256
    tied: bool = False

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape."""
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for number in range(self.blocks):
            tensors |= {f"model.layers.{number}.{name}.weight": shape for name, shape in self._block.items()}
        tensors["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            tensors["lm_head.weight"] = (self.vocabulary, self.hidden)
        return tensors

    @property
    def _block(self) -> dict[str, tuple[int, ...]]:
        hidden, intermediate, kv = self.hidden, self.intermediate, self.kv_heads * self.head
        return {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (self.heads * self.head, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, self.heads * self.head),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }

    @property
    def block_parameters(self) -> int:
        """Of one block."""
        return sum(map(math.prod, self._block.values()))

    @property
    def outer_parameters(self) -> int:
        """Of all that is outside the blocks: embedding, last norm, head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.blocks * self.block_parameters + self.outer_parameters

    @property
    def block_channels(self) -> int:
        """Channels of the four tensors that a block's linears read."""
        return 2 * self.hidden + self.heads * self.head + self.intermediate

    @property
    def config(self) -> dict[str, object]:
        """What transformers reads."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
        }


LLAMA3_70B = Shape(blocks=80, hidden=8192, intermediate=28672, heads=64)
LLAMA3_405B = Shape(blocks=126, hidden=16384, intermediate=53248, heads=128)


def write_large_model(folder: Path, tokenizer: Path, shape: Shape, *, seed: int = 0, sparse: bool = False) -> None:
    """Write a Hugging Face folder of bfloat16 weights, some rows of one in memory at a time.

    Weights are stretches of one pool of random values, from random starts: drawing every value anew takes several times
    as long as writing it.

    Args:
        folder: what to make.
        tokenizer: a folder whose tokenizer is copied; it has at most ``shape.vocabulary`` tokens.
        shape: of the model.
        seed: of the weights.
        sparse: weights are a hole in the file, which takes no disk and reads as zeros.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer / TOKENIZER, folder / TOKENIZER)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2) + "\n", "utf-8")
    tensors, path = shape.tensors, folder / "model.safetensors"
    declared = [(name, BFLOAT16, sizes) for name, sizes in tensors.items()]
    if sparse:
        PlacedTensors.create(path, declared)
        return
    random = np.random.default_rng(seed)
    pool = _normal(2 * _PIECE, 0.0, random)
    with (
        console.progress() as progress,
        SafetensorsWriter(path, declared, {"format": "pt"}) as w,
    ):
        for number, (name, sizes) in enumerate(tensors.items()):
            pieces = [_normal(sizes[0], 1.0, random)] if len(sizes) == 1 else _stretches(pool, math.prod(sizes), random)
            w.write_pieces(name, pieces)
            progress("write model", number + 1, len(tensors))


def _normal(count: int, mean: float, random: np.random.Generator) -> NDArray[np.generic]:
    values = random.standard_normal(count, np.float32)
    values *= _SPREAD
    values += mean
    return values.astype(BFLOAT16)


def _stretches(pool: NDArray[np.generic], count: int, random: np.random.Generator) -> Iterator[NDArray[np.generic]]:
    """``count`` values."""
    for done in range(0, count, _PIECE):
        start = int(random.integers(len(pool) - _PIECE))
        yield pool[start : start + min(_PIECE, count - done)]
