"""What quantize refuses: weights, ranges and folds that cannot be used."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes import quantize as module
from bismooth.passes.foldcheck import ComputeError, FoldErrors
from bismooth.passes.quantize import WEIGHTS, quantize_graph
from bismooth.passes.recipe import Recipe
from bismooth.passes.sites import Site
from bismooth.passes.smoothing import Choice
from tests.graphs import Builder, decoder
from tests.norm_and_linears import STATIC, feeds, inputs_of_linears, made_of, norm_and_linears
from tests.quantizing import Array, quantize, recipe, watch
from tests.textgraphs import make


def test_a_nan_weight_is_named(tmp_path: Path) -> None:
    b = norm_and_linears("qk")
    b.initializers["k.weight"][5, 2] = np.nan
    with pytest.raises(BismoothError, match=r"^k\.weight: the weight holds NaN or infinity in row 5\."):
        quantize(b, tmp_path, recipe())


def test_a_nan_in_a_float_weight_is_named(tmp_path: Path) -> None:
    b = norm_and_linears("qk")
    b.initializers["k.weight"][5, 2] = np.nan
    with pytest.raises(BismoothError, match=r"^k\.weight: the tensor is damaged\. Expected finite values, got NaN"):
        _with_external_weights(b, tmp_path, recipe({"match": "k", "weights": None}, compute_dtype="float16"))


def test_a_float_weight_that_overflows_float16_is_named(tmp_path: Path) -> None:
    b = norm_and_linears("qk")
    b.initializers["k.weight"][0, 0] = 1e5
    with pytest.raises(BismoothError, match=r"^k\.weight: does not fit into float16\. Expected values within ±65504"):
        _with_external_weights(b, tmp_path, recipe({"match": "k", "weights": None}, compute_dtype="float16"))
    assert not (tmp_path / WEIGHTS).exists()


def test_a_folded_weight_that_overflows_float16_is_named(tmp_path: Path) -> None:
    b = norm_and_linears("qk")
    b.initializers["q.weight"][:, 1] *= 1e-6  # at α = 0 its factor is large, and k's column is multiplied by it
    b.initializers["k.weight"][:, 1] *= 1e-6
    b.initializers["k.weight"][0, 0] = 6e4
    chosen = recipe({"match": "k", "weights": None}, compute_dtype="float16", smoothing={"alphas": [0.9]})
    seen = watch(b, tmp_path / "seen", feeds(b), *inputs_of_linears(b, tmp_path))
    with pytest.raises(BismoothError, match=r"^k\.weight: does not fit into float16\. Expected values within ±65504"):
        quantize(b, tmp_path, chosen, seen)


def _with_external_weights(b: Builder, folder: Path, chosen: Recipe) -> None:
    """As the exporter stores them; weights inside the graph are checked when the graph is lowered."""
    quantize_graph(b.save(folder, external=True), folder, chosen, None)


def test_static_scales_need_calibration(tmp_path: Path) -> None:
    message = r"^q: its recipe has a static activation scale, which comes from calibration\. Expected statistics, got"
    with pytest.raises(BismoothError, match=message):
        quantize(norm_and_linears(), tmp_path, recipe(activations=STATIC))


def test_readers_of_one_tensor_need_one_range(tmp_path: Path) -> None:
    b = norm_and_linears()
    rule = {"match": "v", "activations": {"granularity": "per_tensor", "range": "mse"}}
    message = r"^v: reads the same tensor as q, with another range\. Expected one range for .*, got mse and minmax\."
    with pytest.raises(BismoothError, match=message):
        made_of(b, tmp_path, rule, activations=STATIC)


def test_readers_of_one_tensor_need_one_smoothing(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match=r"^norm: its consumers q and v disagree on smoothing\."):
        made_of(norm_and_linears(), tmp_path, {"match": "v", "smoothing": None})


def test_a_fold_that_changes_the_function_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    message = (
        r"^norm: folding the smoothing factors here changes the function\. Expected a relative error of at most 0,"
    )
    with pytest.raises(BismoothError, match=message):
        made_of(norm_and_linears(), tmp_path)


def test_a_float_linear_whose_input_a_fold_pushes_out_of_float16(tmp_path: Path) -> None:
    """k's weights are 1e7 times larger in a channel: at α = 0 that multiplies what q reads, and q is not quantized."""
    b = norm_and_linears("qk")
    b.initializers["k.weight"][:, 3] *= 1e7
    message = (
        r"^norm: folding the smoothing factors here costs accuracy in float16\. Expected a relative error of at most "
        r"0\.00195 \(without them: 0\.000[0-9]+\), got values that are not finite\. Compute in bfloat16 or float32, or"
    )
    fixed = {"alphas": [0.0]}
    with pytest.raises(BismoothError, match=message):
        made_of(b, tmp_path / "q", {"match": "q", "weights": None}, compute_dtype="float16", smoothing=fixed)
    assert not (tmp_path / "q/quantized" / WEIGHTS).exists()
    made = made_of(b, tmp_path / "both", compute_dtype="float16", smoothing=fixed)
    (error,) = made.result.fold_errors_compute.values()
    assert error.folded == made.result.fold_errors["norm"]  # gamma is float32, and so is what INT8 linears read


@pytest.mark.parametrize(("factor", "got"), [(1e6, r"0\.[0-9]+"), (1e-7, "values that are not finite")])
def test_rows_of_v_that_a_fold_pushes_out_of_float16(
    factor: float, got: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v's weight is INT8 with float32 scales, but attention reads its result in float16."""
    name = "model.layers.1.self_attn.v_proj"

    def hostile(sites: Sequence[Site], **_: object) -> tuple[dict[str, Array], list[Choice]]:
        factors = {site.name: np.ones(site.size) for site in sites}
        factors[name][3] = factor
        return factors, []

    monkeypatch.setattr(module, "choose_factors", hostile)
    b = decoder(tied=False)
    message = rf"^{re.escape(name)}: folding .* accuracy in float16\. .* at most 0\.00195 .*, got {got}\. Compute in bf"
    with pytest.raises(BismoothError, match=message):
        made_of(b, tmp_path / "half", compute_dtype="float16")
    made = made_of(b, tmp_path / "wide", compute_dtype="bfloat16")
    assert made.result.fold_errors_compute[name].is_kept


def test_a_fold_that_costs_bfloat16_accuracy_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(*_: object) -> FoldErrors:
        return FoldErrors(compute={"v": ComputeError(0.01, 0.03, 0.02)})

    monkeypatch.setattr(module, "check_folds", coarse)
    message = r"^v: .* in bfloat16\. .* at most 0\.02 \(without them: 0\.01\), got 0\.03\. Compute in float32, or leave"
    with pytest.raises(BismoothError, match=message):
        made_of(norm_and_linears(), tmp_path, compute_dtype="bfloat16")


def test_a_recipe_that_finds_nothing_to_quantize_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make("(float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }").SerializeToString())
    with pytest.raises(BismoothError, match=r"nothing to quantize\..*got 0 linears"):
        quantize_graph(path, tmp_path, Recipe.load("w8a8"), None)


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    model = make("(float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }")
    model.opset_import[0].version = 17
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BismoothError, match=r"has opset 17\. Expected 18 or newer"):
        quantize_graph(path, tmp_path, Recipe.load("w8a8"), None)
