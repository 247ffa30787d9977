"""A norm with linears behind it, quantized by a recipe in a few words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bismooth.passes.linears import find_linears
from tests.graphs import Builder
from tests.quantizing import Array, Quantized, quantize, recipe, watch

X = np.random.default_rng(0).standard_normal((2, 20, 8)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 16, (2, 12))
SMOOTH = {"alphas": [0.3, 0.5, 0.7], "refine_steps": 10}


STATIC = {"granularity": "per_tensor", "range": "minmax"}


def norm_and_linears(names: str = "qkv", *, bias: bool = False) -> Builder:
    b = Builder()
    h = b.rms_norm(b.tokens("x", 8), "norm", 8)
    b.outputs += [b.linear(h, name, 12, 8, bias=bias) for name in names]
    for name in names:
        b.initializers[f"{name}.weight"][:, 3] *= 50
    b.initializers["norm.weight"][3] /= 50
    return b


def inputs_of_linears(b: Builder, folder: Path) -> list[str]:
    """The values that calibration looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    return sorted({linear.x for linear in find_linears(b.graph(folder))})


def made_of(b: Builder, folder: Path, *rules: Mapping[str, Any], **settings: Any) -> Quantized:
    """Calibrate on the feeds and quantize."""
    chosen = recipe(*rules, **({"smoothing": SMOOTH} | settings))
    seen = watch(b, folder / "seen", feeds(b), *inputs_of_linears(b, folder))
    return quantize(b, folder, chosen, seen)


def feeds(b: Builder) -> dict[str, Array]:
    if b.inputs[0].name == "input_ids":
        return {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    return {"x": X}
