"""Tiny random models of many architectures, made from transformers' configuration classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = _COMMON | {"num_key_value_heads": 2, "head_dim": 8}
_GEMMA = _GQA | {"query_pre_attn_scalar": 8, "sliding_window": 4}

#: name → (configuration class, its arguments)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GQA | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {k: v for k, v in _GQA.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", _GQA),
    "mistral": ("MistralConfig", _GQA | {"sliding_window": 4}),
    "gemma2": ("Gemma2Config", _GEMMA | {"num_hidden_layers": 6}),
    "gemma3": ("Gemma3TextConfig", _GEMMA | {"num_hidden_layers": 14}),
    "phi3": ("Phi3Config", {k: v for k, v in _GQA.items() if k != "head_dim"}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 96,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "OPTConfig",
        {k: v for k, v in _COMMON.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "gpt_neox": ("GPTNeoXConfig", _COMMON | {"rotary_pct": 0.5}),
    "bert": ("BertConfig", _COMMON),
}


def make_model(name: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Any:
    """Save a random model of this architecture (FP32 safetensors) in ``folder``; returns the torch module.

    Weights are scaled up from the usual initialisation, so that errors show in the logits, and norms are not all ones.
    """
    import torch
    import transformers

    config_name, arguments = ARCHITECTURES[name]
    config = getattr(transformers, config_name)(**(arguments | overrides))
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.6 / parameter.shape[-1] ** 0.5 + 0.05)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.tie_weights()
    model.save_pretrained(folder)
    return model
