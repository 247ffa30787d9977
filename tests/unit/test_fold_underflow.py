"""Folded tensors that float16 cannot hold: an error if folding is the reason, and only then."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.fold import Edit, apply_edit, weight_edits
from bismooth.passes.fold_underflow import require_kept
from bismooth.passes.foldcheck import check_folds
from bismooth.passes.linears import find_linears
from bismooth.passes.open_graph import OpenGraph
from bismooth.passes.precision import SetPrecision
from bismooth.passes.rounding import Rounding
from bismooth.passes.sites import find_sites
from tests.blocks import gated_mlp
from tests.graphs import Builder
from tests.quantizing import Array, Quantized, quantize, recipe, watch

HALF, BF16, FULL = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
W = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32) * np.float32(0.02)


def kept(folded: Array, edit: Edit, dtype: np.dtype[Any], name: str) -> None:
    """Check a weight in three blocks, or a bias."""
    matrix = folded.reshape(1, -1) if edit.values is not None else folded
    require_kept(np.array_split(matrix, min(3, len(matrix))), (len(matrix), matrix.shape[1]), edit, dtype, name)


def _ones(size: int, **others: float) -> Array:
    factor = np.ones(size)
    for place, value in others.items():
        factor[int(place[1:])] = value
    return factor


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (Edit(columns=_ones(48, _3=1e-6, _7=1e-4)), "got 0.[0-9]+ in 2 of 48 columns"),
        (Edit(rows=_ones(64, _5=1e-4)), "0.0[0-9]+ in 1 of 64 rows"),
        (Edit(rows=_ones(64, _5=1e-3), columns=_ones(48, _3=1e-7)), "in 1 of 48 columns"),
    ],
)
def test_a_channel_that_folding_made_too_small_is_an_error(edit: Edit, where: str) -> None:
    folded = apply_edit(W, edit, "NK")
    message = rf"^q: the smoothing factors folded into it make it too small for float16\. Expected .* {where}\. Compute"
    with pytest.raises(BismoothError, match=message):
        kept(folded, edit, HALF, "q")
    kept(folded, edit, BF16, "q")
    kept(folded, edit, FULL, "q")


def test_a_bias_that_folding_made_too_small_is_an_error() -> None:
    bias, edit = np.full(2000, 0.02, np.float32), Edit(values=_ones(2000, _9=1e-6))
    with pytest.raises(
        BismoothError, match=r"^b: the smoothing factors .*, got 0\.022 as a whole\. Compute in bfloat16"
    ):
        kept(apply_edit(bias, edit), edit, HALF, "b")
    moderate = Edit(values=np.full(2000, 0.01))
    kept(apply_edit(bias, moderate), moderate, HALF, "b")


def test_tiny_numbers_of_the_checkpoint_are_no_error() -> None:
    """Single ones go to 0 in any row; whole rows and columns of them did before folding too."""
    weight = W.copy()
    weight[3] = 1e-9
    weight[:, 5] = 3e-8
    weight[::7, ::5] = 2e-8
    edit = Edit(rows=_ones(64, _3=0.1), columns=np.linspace(0.1, 10, 48))
    kept(apply_edit(weight, edit, "NK"), edit, HALF, "q")
    kept(np.zeros_like(W), edit, HALF, "q")
    large = Edit(columns=np.full(48, 1e-8))  # 2e5 overflowed before folding
    kept(apply_edit(W * np.float32(1e7), large, "NK"), large, HALF, "q")


def _quantize(b: Builder, folder: Path, floats: Mapping[str, None], alpha: float) -> Quantized:
    x = np.random.default_rng(1).standard_normal((2, 20, 8)).astype(np.float32)
    folder.mkdir(exist_ok=True)
    linears = find_linears(b.graph(folder))
    seen = watch(b, folder / "seen", {"x": x}, *sorted({linear.x for linear in linears}))
    rules = [{"match": name, "weights": None} for name in floats]
    return quantize(b, folder, recipe(*rules, compute_dtype="float16", smoothing={"alphas": [alpha]}), seen)


def test_factors_of_two_sites_in_one_weight(tmp_path: Path) -> None:
    """Each of the sites is fine by itself; together they take up's weight out of float16's range."""
    b = gated_mlp()
    graph = b.graph(tmp_path)
    sites = find_sites(graph, find_linears(graph))[0]
    factors = {site.name: np.full(site.size, {"norm": 2.0**-10, "up": 2.0**10}[site.name]) for site in sites}
    narrowed = graph.copy()
    SetPrecision("float16").apply(narrowed)
    errors = check_folds(OpenGraph(graph), sites, factors, Rounding.of(narrowed, HALF))
    assert all(error.is_kept for error in errors.compute.values())
    edit = weight_edits(sites, factors)["up.weight"]
    with pytest.raises(BismoothError, match=r"^up: the smoothing factors folded into it make it too small"):
        kept(apply_edit(b.initializers["up.weight"], edit, "NK"), edit, HALF, "up")


def test_a_float_producer_with_a_long_bias(tmp_path: Path) -> None:
    """Its rows are divided by the factor of the channels it makes."""
    b = Builder()
    up = b.linear(b.tokens("x", 8), "up", 2048, 8, bias=True)
    b.outputs.append(b.linear(b.op("Relu", up, at="act"), "down", 12, 2048))
    b.initializers["up.bias"][:] = 0.02
    b.initializers["up.weight"][:] = 0.02
    made = _quantize(b, tmp_path / "healthy", {"up": None}, 0.5)
    assert any(choice.channels for choice in made.result.choices)
    b.initializers["down.weight"][:, 3] *= 1e-12
    with pytest.raises(BismoothError, match=r"^up\.(weight|bias/folded): the smoothing factors folded into it make it"):
        _quantize(b, tmp_path / "broken", {"up": None}, 0.0)
