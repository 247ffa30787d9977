"""Tiny random models of many architectures, made from transformers' configuration classes, and exports of them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from bismooth.export.artifact import Manifest
from bismooth.export.model import export_model

VOCAB = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = _COMMON | {"num_key_value_heads": 2, "head_dim": 8}
_GEMMA = _GQA | {"query_pre_attn_scalar": 8, "sliding_window": 4}
_NO_HEAD_DIM = {key: value for key, value in _GQA.items() if key != "head_dim"}
_SLIDING, _FULL = "sliding_attention", "full_attention"

#: name → (configuration class, its arguments)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GQA | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _NO_HEAD_DIM),
    "qwen3": ("Qwen3Config", _GQA),
    "mistral": ("MistralConfig", _GQA | {"sliding_window": 4}),
    "gemma2": ("Gemma2Config", _GEMMA | {"num_hidden_layers": 5}),
    "gemma3": (
        "Gemma3TextConfig",
        _GEMMA | {"num_hidden_layers": 5, "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL, _SLIDING]},
    ),
    "phi3": ("Phi3Config", _NO_HEAD_DIM),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 96,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            **{key: value for key, value in _COMMON.items() if key != "intermediate_size"},
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _COMMON | {"rotary_pct": 0.5}),
    "bert": ("BertConfig", _COMMON),
}


def make_model(name: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Any:
    """Save a random model of this architecture (FP32 safetensors) in ``folder``; returns the torch module.

    Weights are scaled up from the usual initialisation, so that errors show in the logits, and norms are not all ones.
    """
    model = random_model(name, seed=seed, **overrides)
    model.save_pretrained(folder)
    return model


def random_model(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random torch module of this architecture."""
    import torch
    import transformers

    config_name, arguments = ARCHITECTURES[name]
    config = getattr(transformers, config_name)(**(arguments | overrides))
    auto = cast(Any, transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM)
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.6 / parameter.shape[-1] ** 0.5 + 0.05, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.tie_weights()
    return model


@dataclass(frozen=True)
class Exported:
    """A tiny model and its export.

    Attributes:
        module: the torch model.
        source: its Hugging Face folder.
        folder: the exported folder.
        manifest: what :func:`export_model` returned.
        steps: the steps that the export told of.
    """

    module: Any
    source: Path
    folder: Path
    manifest: Manifest
    steps: tuple[str, ...]

    @property
    def graph(self) -> Path:
        """The exported ONNX file."""
        return self.folder / self.manifest.graphs["float32"]


@cache
def exported(name: str) -> Exported:
    """The export of one of :data:`ARCHITECTURES`, made once per test session. Not to be changed."""
    root = Path(tempfile.mkdtemp(prefix=f"bismooth-{name}-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    module = make_model(name, root / "source")
    return export(module, root / "source", root / "artifact")


def export(module: Any, source: Path, folder: Path, **options: Any) -> Exported:
    """Export ``source``, which holds ``module``, into the new ``folder``."""
    folder.mkdir()
    steps: list[str] = []
    manifest = export_model(source, folder, progress=lambda step, _done, _total: steps.append(step), **options)
    return Exported(module, source, folder, manifest, tuple(dict.fromkeys(steps)))


def tokens(batch: int, sequence: int, padding: Mapping[int, tuple[int, int]] | None = None) -> dict[str, Any]:
    """Random ``input_ids`` and ``attention_mask``, int64 [batch, sequence]; ``padding``: row → (left, right)."""
    import numpy as np

    ids = np.random.default_rng(sequence).integers(3, VOCAB, (batch, sequence))
    mask = np.ones_like(ids)
    for row, (left, right) in (padding or {}).items():
        mask[row, :left] = 0
        mask[row, sequence - right :] = 0
    return {"input_ids": np.where(mask == 1, ids, 0), "attention_mask": mask}


def positions(mask: Any) -> Any:
    """Numbers of the real tokens of each row of an attention mask from 0, as ``generate`` of transformers counts."""
    import numpy as np

    return np.maximum(np.cumsum(mask, 1) - 1, 0)


def feeds_of(session: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """``feeds``, position ids and empty caches, as far as a session of ONNX Runtime has such inputs."""
    import numpy as np

    inputs = {port.name: port.shape for port in session.get_inputs()}
    mask = feeds["attention_mask"]
    caches = {
        name: np.zeros([len(mask), shape[1], 0, shape[3]], np.float32)
        for name, shape in inputs.items()
        if name.startswith("past_key_values.")
    }
    given = {"position_ids": positions(mask), **caches, **feeds}
    return {name: value for name, value in given.items() if name in inputs}
