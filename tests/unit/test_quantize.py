"""A float graph becomes a quantized artifact: folds, rules for single layers, and inputs that are broken."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from bismooth.engines.onnxruntime import Session
from bismooth.export.safetensors_file import read_header, read_tensor
from bismooth.passes import quantize as module
from bismooth.passes._gs import Graph
from bismooth.passes.driver import run_passes
from bismooth.passes.graph import load
from bismooth.passes.linears import find_linears
from bismooth.passes.lint import Severity, lint
from bismooth.passes.quantize import WEIGHTS, quantize_graph
from bismooth.passes.recipe import Recipe
from tests.blocks import SITES
from tests.graphs import Builder, DecoderShape, decoder
from tests.norm_and_linears import SMOOTH, STATIC, feeds, inputs_of_linears, made_of, norm_and_linears
from tests.quantizing import HEAD_TOO, Array, quantize, recipe, relative_error, watch


def plain(path: Path, b: Builder) -> dict[str, Array]:
    with Session(path, mode="plain", threads=1) as session:
        return session.run(feeds(b))


def close(expected: Mapping[str, Array], got: Mapping[str, Array], tolerance: float) -> None:
    assert expected.keys() == got.keys()
    for name, values in expected.items():
        assert relative_error(values, got[name]) <= tolerance, name


@pytest.mark.parametrize("block", sorted(SITES.keys() - {"decomposed_attention", "gated_attention"}))
def test_blocks_stay_close_to_float_and_their_folds_are_exact(tmp_path: Path, block: str) -> None:
    b = SITES[block][0]()
    made = made_of(b, tmp_path)
    expected = plain(made.folder / "reference.onnx", b)
    close(expected, made.run(feeds(b)), 0.05)
    close(made.run(feeds(b)), made.run(feeds(b), mode="int8"), 1e-5)
    if "folded" in made.result.graphs:
        close(expected, plain(made.folder / "folded.onnx", b), 1e-5)
    assert all(error <= 1e-5 for error in made.result.fold_errors.values())
    assert made.result.fold_errors.keys() == {choice.site for choice in made.result.choices if choice.channels}
    assert made.result.fold_errors_compute == {}  # in float32


@pytest.mark.parametrize("compute", ["float16", "float32"])
def test_the_linter_finds_no_error_after_any_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: str
) -> None:
    """But for the weight file, which is written last."""
    linted: list[str] = []

    def check(graph: Graph, name: str) -> None:
        found = [item for item in lint(graph, target="onnxruntime") if item.severity is Severity.ERROR]
        assert {item.rule for item in found} <= {"external-data"}, name
        linted.append(name)

    monkeypatch.setattr(module, "run_passes", partial(run_passes, check=check))
    made = made_of(decoder(), tmp_path, {"match": "*.down_proj", "weights": None}, compute_dtype=compute)
    last = [name for name in linted if name != "precision"]
    assert last == ["fold", "store folded weights", "insert Q/DQ", "unsigned activations"]
    assert linted.count("precision") == 2 * (compute == "float16")
    assert {record.name for record in made.result.passes} == set(linted)


@pytest.mark.parametrize("down", [1.0, 1e-4, 1e-5])
def test_float16_scales_of_small_weights_keep_enough_bits(tmp_path: Path, down: float) -> None:
    b = norm_and_linears()
    b.initializers["q.weight"][:] *= down
    made = made_of(b, tmp_path, compute_dtype="float16", activations=None, smoothing=None)
    assert lint(made.folder / made.result.graphs["float16"], target="tensorrt-rtx", capabilities=[89]) == []


@pytest.mark.parametrize(
    ("block", "per_token"),
    [("gated_mlp", ["down"]), ("fused_gate_up", ["down"]), ("relu_gate", ["down"]), ("relu_mlp", []), ("gelu_mlp", [])],
)
def test_static_scales_everywhere_but_at_gated_products(tmp_path: Path, block: str, per_token: list[str]) -> None:
    b = SITES[block][0]()
    chosen = Recipe.from_dict({"extends": "w8a8-static", "layers": [HEAD_TOO]}, name="test")
    seen = watch(b, tmp_path / "seen", feeds(b), *inputs_of_linears(b, tmp_path))
    made = quantize(b, tmp_path, chosen, seen)
    linears = find_linears(load(made.folder / "reference.onnx"))
    nodes = {node.name for node in load(made.folder / "model.onnx").nodes}
    assert [linear.name for linear in linears if f"{linear.x}/per_token/QuantizeLinear" in nodes] == per_token
    rest = [linear.x for linear in linears if linear.name not in per_token]
    assert all(f"{x}/per_tensor/QuantizeLinear" in nodes for x in rest)


def test_smoothing_repairs_walls(tmp_path: Path) -> None:
    b = norm_and_linears()
    errors: list[float] = []
    for folder, smoothing in (("without", None), ("with", SMOOTH)):
        made = made_of(b, tmp_path / folder, smoothing=smoothing)
        exact = plain(made.folder / "reference.onnx", b)
        got = made.run(feeds(b))
        errors.append(max(relative_error(exact[name], got[name]) for name in exact))
    assert errors[1] < errors[0] / 4


def test_a_float_linear_at_a_smoothed_norm_gets_folded_weights(tmp_path: Path) -> None:
    """q stays float, k and v do not: the norm is divided for all three, so q's weight is stored anew."""
    b = norm_and_linears(bias=True)
    made = made_of(b, tmp_path, {"match": "q", "weights": None}, compute_dtype="float16")
    assert made.result.float_linears == ("q",)
    assert [linear.name for linear in made.result.linears] == ["k", "v"]
    entries = read_header(made.folder / WEIGHTS)
    assert entries["q.weight.folded"].shape == (12, 8)
    assert entries["q.weight.folded.float16"].dtype == "F16"
    exact, got = plain(made.folder / "reference.onnx", b), made.run(feeds(b))
    q, k, v = exact
    assert relative_error(exact[q], got[q]) <= 1e-5
    assert all(relative_error(exact[name], got[name]) < 0.03 for name in (k, v))
    assert relative_error(exact[q], made.run(feeds(b), role="float16")[q]) < 2e-3


def test_a_float_gemm_weight_keeps_its_layout(tmp_path: Path) -> None:
    b = SITES["flattened_gemm"][0]()
    made = made_of(b, tmp_path, {"match": "c_proj", "weights": None})
    close(plain(made.folder / "reference.onnx", b), made.run(feeds(b)), 0.05)
    stored = made_of(b, tmp_path / "other", {"match": "c_fc", "weights": None})
    assert read_header(stored.folder / WEIGHTS)["c_fc.weight.folded"].shape == (8, 12)
    close(plain(stored.folder / "reference.onnx", b), stored.run(feeds(b)), 0.05)


def test_a_float_linear_whose_weight_is_cast_gets_folded_weights(tmp_path: Path) -> None:
    b = SITES["bfloat16_weights"][0]()
    made = made_of(b, tmp_path, {"match": "fc1", "weights": None})
    close(plain(made.folder / "reference.onnx", b), made.run(feeds(b)), 0.05)
    assert read_header(made.folder / WEIGHTS)["fc1.weight.folded"].dtype == "F32"


def test_layers_are_excluded_by_pattern(tmp_path: Path) -> None:
    b = decoder(DecoderShape())
    made = made_of(b, tmp_path, {"match": "*.down_proj", "weights": None}, {"match": "@head", "weights": None})
    assert set(made.result.float_linears) == {
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert len(made.result.linears) == 12
    close(plain(made.folder / "reference.onnx", b), made.run(feeds(b)), 0.2)


def test_a_subset_of_kinds(tmp_path: Path) -> None:
    made = made_of(decoder(), tmp_path, {"match": "@head", "weights": None}, smoothing=SMOOTH | {"kinds": ["norm"]})
    kinds = Counter(str(choice.kind) for choice in made.result.choices if choice.channels)
    assert kinds == {"norm": 4}
    reasons = {choice.reason for choice in made.result.choices if choice.kind != "norm"}
    assert reasons == {
        "the recipe does not smooth attention_value sites",
        "the recipe does not smooth gated_product sites",
    }


def test_a_fixed_alpha(tmp_path: Path) -> None:
    made = made_of(
        decoder(), tmp_path, {"match": "@head", "weights": None}, smoothing={"alphas": [0.6], "refine_steps": 0}
    )
    smoothed = [choice for choice in made.result.choices if choice.channels]
    assert {(choice.alpha, choice.reason) for choice in smoothed} == {(0.6, "fixed by the recipe")}
    assert len(smoothed) == 8


def test_a_tied_head_keeps_the_embedding(tmp_path: Path) -> None:
    """The norm before a quantized tied head is folded, and the embedding that shares the weight is not touched."""
    b = decoder(tied=True)
    made = made_of(b, tmp_path)
    assert "lm_head" in [linear.name for linear in made.result.linears]
    close(plain(made.folder / "reference.onnx", b), plain(made.folder / "folded.onnx", b), 1e-5)
    close(plain(made.folder / "reference.onnx", b), made.run(feeds(b)), 0.2)
    model = onnx.ModelProto.FromString((made.folder / "model.onnx").read_bytes())
    (gather,) = [node for node in model.graph.node if node.name == "model.embed_tokens/Gather"]
    assert gather.input[0] == "lm_head.weight"
    assert "model.norm" in made.result.fold_errors


def test_a_tied_head_that_stays_float_keeps_the_embedding_too(tmp_path: Path) -> None:
    """Beside a quantized linear that reads the same norm, it gets a weight of its own."""
    b = decoder(tied=True)
    head = next(node for node in b.nodes if node.name == "lm_head/MatMul")
    b.outputs.append(b.linear(head.input[0], "other", 5, b.initializers["lm_head.weight"].shape[1]))
    made = made_of(b, tmp_path, {"match": "lm_head", "weights": None})
    assert "model.norm" in made.result.fold_errors
    expected, got = plain(made.folder / "reference.onnx", b), made.run(feeds(b))
    close(expected, got, 0.2)
    model = onnx.ModelProto.FromString((made.folder / "model.onnx").read_bytes())
    reads = {
        node.name: node.input[0] for node in model.graph.node if "lm_head" in node.input[0] or "embed" in node.name
    }
    assert reads["model.embed_tokens/Gather"] == "lm_head.weight"
    assert "lm_head.weight.folded" in {tensor.name for tensor in model.graph.initializer}


def test_biases_are_folded(tmp_path: Path) -> None:
    """fc1 → Relu → fc2: the bias of fc1 is divided with its rows."""
    b = SITES["relu_mlp"][0]()
    b.initializers["fc2.weight"][:, 2] *= 50
    made = made_of(b, tmp_path, smoothing={"alphas": [0.5]})
    assert made.result.fold_errors.keys() == {"norm", "fc1"}
    model = onnx.ModelProto.FromString((made.folder / "model.onnx").read_bytes())
    folded = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith("/folded")}
    assert {"fc1.bias/folded", "norm.weight/folded", "norm.bias/folded"} <= folded
    close(plain(made.folder / "reference.onnx", b), made.run(feeds(b)), 0.05)


def test_static_ranges_are_those_of_the_divided_activations(tmp_path: Path) -> None:
    b = norm_and_linears()
    made = made_of(b, tmp_path, activations=STATIC)
    close(plain(made.folder / "reference.onnx", b), made.run(feeds(b)), 0.05)


def test_a_zero_weight_row_gives_zeros(tmp_path: Path) -> None:
    b = norm_and_linears("q")
    b.initializers["q.weight"][4] = 0
    for settings in ({}, {"activations": None, "smoothing": None}):
        made = made_of(b, tmp_path / str(len(settings)), compute_dtype="float16", **settings)
        for role in ("float32", "float16"):
            (got,) = made.run(feeds(b), role=role).values()
            assert not got[..., 4].any()
            assert np.isfinite(got).all()


def test_one_weight_file_serves_both_graphs(tmp_path: Path) -> None:
    b = norm_and_linears(bias=True)
    made = made_of(b, tmp_path, compute_dtype="bfloat16")
    assert made.result.graphs == {
        "reference": "reference.onnx",
        "folded": "folded.onnx",
        "reference_bfloat16": "reference.bfloat16.onnx",
        "float32": "model.onnx",
        "bfloat16": "model.bfloat16.onnx",
    }
    places: dict[str, set[tuple[str, str]]] = {}
    for role in ("float32", "bfloat16"):
        model = onnx.ModelProto.FromString((made.folder / made.result.graphs[role]).read_bytes())
        for tensor in model.graph.initializer:
            if tensor.external_data:
                entry = {item.key: item.value for item in tensor.external_data}
                assert entry["location"] == WEIGHTS
                places.setdefault(tensor.name, set()).add((entry["offset"], entry["length"]))
    assert {f"{name}.weight.int8" for name in "qkv"} <= places.keys()
    assert all(len(found) == 1 for found in places.values())


def test_the_stored_weights_are_those_of_the_folded_graph(tmp_path: Path) -> None:
    made = made_of(norm_and_linears(), tmp_path)
    entries = read_header(made.folder / WEIGHTS)
    for linear in made.result.linears:
        values = read_tensor(made.folder / WEIGHTS, entries[f"{linear.name}.weight.int8"])
        assert values.shape == (linear.k, linear.n) == (8, 12)
        assert np.abs(values.astype(int)).max(axis=0).tolist() == [127] * 12
        assert 0 < linear.weight_error < 0.01


def test_passes_and_progress_are_reported(tmp_path: Path) -> None:
    b, steps = norm_and_linears(), list[tuple[str, int, int]]()
    seen = watch(b, tmp_path / "seen", feeds(b), *inputs_of_linears(b, tmp_path))
    chosen = recipe(smoothing=SMOOTH, compute_dtype="float16")

    def note(step: str, done: int, total: int) -> None:
        steps.append((step, done, total))

    result = quantize_graph(b.save(tmp_path), tmp_path, chosen, seen, note)
    names = ["fold", "store folded weights", "insert Q/DQ", "precision", "unsigned activations"]
    assert [record.name for record in result.passes] == names
    last = {step: (done, total) for step, done, total in steps}
    assert last == {"smooth": (1, 1), "check folds": (1, 1), "write weights": (3, 3)}
    assert all(0 < done <= total for _, done, total in steps)


def test_float_graphs_that_exist_are_copied(tmp_path: Path) -> None:
    b = norm_and_linears()
    source, narrow, target = b.save(tmp_path), tmp_path / "narrow.onnx", tmp_path / "quantized"
    narrow.write_bytes(b"the float16 graph")
    target.mkdir()
    result = quantize_graph(source, target, recipe(compute_dtype="float16"), None, narrow_source=narrow)
    assert (target / result.graphs["reference"]).read_bytes() == source.read_bytes()
    assert (target / result.graphs["reference_float16"]).read_bytes() == b"the float16 graph"


def test_a_recipe_without_quantization_copies_the_function(tmp_path: Path) -> None:
    b = decoder()
    made = quantize(b, tmp_path, Recipe.load("fp16"))
    assert made.result.linears == ()
    close(plain(made.folder / "reference.onnx", b), made.run(feeds(b)), 1e-6)
    close(plain(made.folder / "reference.onnx", b), made.run(feeds(b), role="float16"), 1e-2)


def test_without_data_walls_are_folded(tmp_path: Path) -> None:
    b = Builder()
    h = b.rms_norm(b.tokens("x", 64), "norm", 64)
    b.outputs.append(b.linear(h, "fc", 96, 64))
    b.initializers["fc.weight"][:, 3] *= 100
    made = quantize(b, tmp_path, recipe(smoothing=SMOOTH))
    assert [(choice.channels, choice.error) for choice in made.result.choices] == [(1, None)]
    assert made.result.fold_errors["norm"] <= 1e-5
