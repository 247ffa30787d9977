"""Folding factors: the arithmetic of edits, and the function that must not change."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bismooth.passes import graph as graphs
from bismooth.passes._gs import dtype_of, read
from bismooth.passes.fold import Edit, apply_edit, fold_constants, fold_graph, weight_edits
from bismooth.passes.graph import Index
from bismooth.passes.linears import find_linears
from bismooth.passes.sites import Site, find_sites
from tests.blocks import SITES, Block, H, fused_qkv, gemma_norm, relu_mlp
from tests.graphs import Builder, decoder, run
from tests.steps import MOVES, C

Factor = NDArray[np.float64]


def sites_of(path: Path) -> list[Site]:
    graph = graphs.load(path)
    return find_sites(graph, find_linears(graph))[0]


def random_factors(sites: list[Site], seed: int = 0, spread: float = 1.5) -> dict[str, Factor]:
    """Factors around 1, most of them within e^±3."""
    random = np.random.default_rng(seed)
    return {site.name: np.where(site.free, np.exp(random.normal(0, spread, site.size)), 1.0) for site in sites}


def folded(path: Path, factors: dict[str, Factor]) -> Path:
    graph = graphs.load(path)
    sites, _ = find_sites(graph, find_linears(graph))
    fold_graph(graph, weight_edits(sites, factors))
    graphs.save(graph, path.with_name("folded.onnx"))
    return path.with_name("folded.onnx")


def largest_error(before: Path, after: Path) -> float:
    pairs = zip(run(before), run(after), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs if a.dtype == np.float32)


@pytest.mark.parametrize("block", [block for block, _ in SITES.values()], ids=SITES.keys())
def test_folding_a_block_keeps_its_function(block: Block, tmp_path: Path) -> None:
    path = block().save(tmp_path)
    factors = random_factors(sites_of(path))
    assert largest_error(path, folded(path, factors)) <= 1e-5


@pytest.mark.parametrize("name", MOVES)
def test_folding_through_each_operation_keeps_the_function(name: str, tmp_path: Path) -> None:
    step, _ = MOVES[name]
    b = Builder()
    b.outputs.append(b.linear(step(b, b.linear(b.tokens("h", 5), "fc1", C, 5, bias=True)), "fc2", 3, C))
    path = b.save(tmp_path)
    sites = sites_of(path)
    assert [site.name for site in sites] == ["fc1"]
    tolerance = 1e-5 if name != "Cast" else 2e-3  # it casts to float16
    assert largest_error(path, folded(path, random_factors(sites))) <= tolerance


@pytest.fixture(scope="module")
def decoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder().save(tmp_path_factory.mktemp("decoder"), external=True)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.1, 2.5))
def test_random_factors_leave_a_decoder_unchanged(decoder_path: Path, seed: int, spread: float) -> None:
    factors = random_factors(sites_of(decoder_path), seed, spread)
    assert len(factors) == 9
    assert largest_error(decoder_path, folded(decoder_path, factors)) <= 1e-5


def test_folding_reads_and_writes_no_weight(decoder_path: Path) -> None:
    result = folded(decoder_path, random_factors(sites_of(decoder_path)))
    index = Index.of(graphs.load(result))
    weight = index.values["model.layers.0.self_attn.v_proj.weight"]
    assert [node.op for node in weight.outputs] == ["Transpose"]
    assert (
        index.producer(index.nodes["model.layers.0.self_attn.v_proj/MatMul"].inputs[1].name)
        is (index.nodes["model.layers.0.self_attn.v_proj/fold_columns"])
    )
    assert result.stat().st_size < 100_000


def test_edits_name_what_they_multiply(tmp_path: Path) -> None:
    sites = sites_of(relu_mlp().save(tmp_path))
    s = {site.name: np.linspace(0.5, 2, site.size) for site in sites}
    edits = weight_edits(sites, s)
    assert edits.keys() == {"norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight"}
    assert edits["norm.weight"].values is not None
    assert np.allclose(edits["norm.weight"].values, 1 / s["norm"])
    assert edits["fc1.weight"].rows is not None
    assert edits["fc1.weight"].columns is not None
    assert np.allclose(edits["fc1.weight"].rows, 1 / s["fc1"])
    assert np.allclose(edits["fc1.weight"].columns, s["norm"])
    assert edits["fc2.weight"].rows is None


def test_edits_of_a_fused_linear_leave_pinned_rows_alone(tmp_path: Path) -> None:
    sites = sites_of(fused_qkv().save(tmp_path))
    edits = weight_edits(sites, {"qkv": np.where(sites[1].free, 4.0, 1.0)})
    assert edits.keys() == {"qkv.weight", "qkv.bias", "o.weight"}, "the norm has no factor and is left alone"
    for factor in (edits["qkv.weight"].rows, edits["qkv.bias"].values):
        assert factor is not None
        assert factor.tolist() == [1.0] * 12 + [0.25] * 4
    assert edits["o.weight"].columns is not None
    assert edits["o.weight"].columns.tolist() == [4.0] * 8


def test_one_plus_w_becomes_one_constant(tmp_path: Path) -> None:
    path = gemma_norm().save(tmp_path)
    graph = graphs.load(path)
    sites, _ = find_sites(graph, find_linears(graph))
    s = np.linspace(0.5, 2, H)
    edits = weight_edits(sites, {"norm": s})
    w = read(Index.of(graph).values["norm.weight"])
    fold_graph(graph, edits)
    index = Index.of(graph)
    gamma = index.nodes["norm/RMSNormalization"].inputs[1]
    assert np.allclose(read(gamma), (1 + w) / s, rtol=1e-6)
    assert gamma.name == "v0_0/folded"
    assert "norm/Add" not in index.nodes
    assert "norm.weight" not in index.values, "the old gamma is no longer part of the graph"


def test_new_constants_have_the_type_of_the_old_ones(tmp_path: Path) -> None:
    path = SITES["bfloat16_weights"][0]().save(tmp_path)
    graph = graphs.load(path)
    sites, _ = find_sites(graph, find_linears(graph))
    fold_graph(graph, weight_edits(sites, random_factors(sites)))
    norm = Index.of(graph).nodes["norm/LayerNormalization"]
    assert [dtype_of(tensor) for tensor in norm.inputs[1:]] == [np.dtype(np.float32)] * 2


@pytest.mark.parametrize("layout", ["NK", "KN"])
def test_apply_edit_equals_the_folded_graph_bit_by_bit(layout: str, tmp_path: Path) -> None:
    b = Builder()
    b.outputs.append(b.linear(b.input("x", 6, 6), "fc", 4, 6, layout=layout))
    path = b.save(tmp_path)
    random = np.random.default_rng(1)
    edit = Edit(rows=random.uniform(0.1, 9, 4), columns=random.uniform(0.1, 9, 6))
    graph = graphs.load(path)
    fold_graph(graph, {"fc.weight": edit})
    index = Index.of(graph)
    graph.outputs[:] = [index.nodes["fc/MatMul"].inputs[1]]
    graphs.save(graph.cleanup(), tmp_path / "weight.onnx")
    edited = apply_edit(b.initializers["fc.weight"], edit, "NK" if layout == "NK" else "KN")
    assert edited.dtype == np.float32
    assert np.array_equal(run(tmp_path / "weight.onnx")[0], edited.T if layout == "NK" else edited)


def test_apply_edit_element_by_element() -> None:
    values = apply_edit(np.array([1, 2], np.float16), Edit(values=np.array([0.5, 3.0])))
    assert values.dtype == np.float32
    assert values.tolist() == [0.5, 6.0]
    assert apply_edit(np.array([1, 2], np.float16), Edit()).tolist() == [1.0, 2.0]


def test_edits_multiply() -> None:
    both = Edit(rows=np.array([2.0])) * Edit(rows=np.array([3.0]), columns=np.array([5.0]))
    assert (both.rows, both.columns, both.values) == (6.0, 5.0, None)


@pytest.mark.parametrize(
    ("s", "message"),
    [
        (np.ones(3), r"qkv: expected 16 factors, got shape \(3,\)"),
        (np.zeros(16), "qkv: factors must be finite and positive"),
        (np.full(16, np.inf), "qkv: factors must be finite and positive"),
        (np.full(16, 2.0), "qkv: the factor of a channel that is not free must be 1"),
    ],
)
def test_wrong_factors_are_refused(s: Factor, message: str, tmp_path: Path) -> None:
    sites = sites_of(fused_qkv().save(tmp_path))
    with pytest.raises(ValueError, match=message):
        weight_edits(sites, {"qkv": s})


def test_edit_of_an_unknown_constant_is_refused(tmp_path: Path) -> None:
    graph = graphs.load(relu_mlp().save(tmp_path))
    with pytest.raises(ValueError, match="nothing is no small constant of the graph"):
        fold_constants(graph, {"nothing": Edit(values=np.ones(1))})
    with pytest.raises(ValueError, match=r"norm\.weight is no small constant of the graph"):
        fold_constants(graph, {"norm.weight": Edit(rows=np.ones(1))})
