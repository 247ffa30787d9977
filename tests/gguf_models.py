"""Tiny GGUF files, written with llama.cpp's own package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf as _gguf
import numpy as np
from numpy.typing import NDArray

from tests.models import VOCAB, random_model

gguf: Any = _gguf
Array = NDArray[Any]
Q = gguf.GGMLQuantizationType
HEADS, KV_HEADS = 4, 2
TOKENS = [*(chr(33 + number) for number in range(VOCAB - 2)), "ab", "<unk>"]
TYPES = {"q_proj": Q.Q8_0, "up_proj": Q.Q4_1, "gate_proj": Q.Q4_0, "o_proj": Q.BF16, "k_proj": Q.F16}


def llama() -> Any:
    """Two layers; the head is not tied, K has fewer heads than Q."""
    return random_model("llama", num_hidden_layers=2, intermediate_size=64, tie_word_embeddings=False)


def llama_cpp_order(weights: Array, heads: int) -> Array:
    """Rows of Q and K as llama.cpp's converter orders them, for its interleaved rotary embeddings."""
    rows = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return rows.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    model: Any, path: Path, architecture: str = "llama", shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Array]:
    """Write ``model``; returns what its tensors are after quantization, by their names in transformers."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    expected: dict[str, Array] = {}
    for name, parameter in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        kind = TYPES.get(module.rpartition(".")[2], Q.F32)
        values = parameter.numpy()
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(module.rpartition(".")[2])
        stored = gguf.quantize(llama_cpp_order(values, heads) if heads else values, kind)
        quantized = gguf.dequantize(stored, kind)
        expected[name] = gguf.dequantize(gguf.quantize(values, kind), kind) if heads else quantized
        if shapes and name in shapes:
            stored, kind = np.zeros(shapes[name], np.float32), Q.F32
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
