"""A model with the shapes of LLaMA3-70B's blocks, random weights and another model's tokenizer, for measurements."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..export.safetensors_file import SafetensorsWriter
from . import console

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD = 8192, 28672, 64, 8, 128
_SPREAD = 0.02
"""Standard deviation of the weights, as models are initialized with."""

_ROWS = 1024
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write_large_model(folder: Path, tokenizer: Path, *, blocks: int = 3, vocabulary: int, seed: int = 0) -> None:
    """Write a Hugging Face folder, some rows of a weight in memory at a time.

    Args:
        folder: what to make.
        tokenizer: a folder whose tokenizer files are copied.
        blocks: how many.
        vocabulary: tokens of the tokenizer; embeddings and head are one tensor of so many rows.
        seed: of the weights.
    """
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    shapes = _shapes(blocks, vocabulary)
    random = np.random.default_rng(seed)
    declared = [(name, BFLOAT16, shape) for name, shape in shapes.items()]
    with (
        console.progress() as progress,
        SafetensorsWriter(folder / "model.safetensors", declared, {"format": "pt"}) as w,
    ):
        for number, (name, shape) in enumerate(shapes.items()):
            w.write_pieces(name, _values(shape, random))
            progress("write model", number + 1, len(shapes))


def _shapes(blocks: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for number in range(blocks):
        block = f"model.layers.{number}"
        shapes |= {
            f"{block}.input_layernorm.weight": (HIDDEN,),
            f"{block}.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            f"{block}.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{block}.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{block}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            f"{block}.post_attention_layernorm.weight": (HIDDEN,),
            f"{block}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{block}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{block}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return shapes


def _values(shape: tuple[int, ...], random: np.random.Generator) -> Iterator[NDArray[np.generic]]:
    """Normal weights, and gammas of about 1."""
    if len(shape) == 1:
        yield (1 + _SPREAD * random.standard_normal(shape, np.float32)).astype(BFLOAT16)
        return
    for start in range(0, shape[0], _ROWS):
        rows = (min(_ROWS, shape[0] - start), *shape[1:])
        yield (np.float32(_SPREAD) * random.standard_normal(rows, np.float32)).astype(BFLOAT16)
