"""The proof of folds: it passes on right ones and fails on wrong ones."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.export.errors import BismoothError
from bismooth.passes import graph as graphs
from bismooth.passes._gs import FileValues, Graph, set_type
from bismooth.passes.foldcheck import TOLERANCE, ComputeError, FoldErrors, check_folds
from bismooth.passes.graph import Index
from bismooth.passes.linears import find_linears
from bismooth.passes.open_graph import OpenGraph
from bismooth.passes.precision import NARROW_TYPES, SetPrecision
from bismooth.passes.rounding import Rounding
from bismooth.passes.segment import Sizes, cut
from bismooth.passes.sites import Site, find_sites
from tests.blocks import SITES, Block, H, fused_qkv, partly_free, relu_mlp
from tests.graphs import Builder, decoder

Factor = NDArray[np.float64]


def prepared(b: Builder, folder: Path, *, external: bool = False) -> tuple[Graph, list[Site]]:
    graph = graphs.load(b.save(folder, external=external))
    return graph, find_sites(graph, find_linears(graph))[0]


def factors_for(sites: list[Site]) -> dict[str, Factor]:
    random = np.random.default_rng(0)
    return {site.name: np.where(site.free, np.exp(random.normal(0, 1.5, site.size)), 1.0) for site in sites}


@pytest.mark.parametrize("block", [block for block, _ in SITES.values()], ids=SITES.keys())
def test_right_folds_pass(block: Block, tmp_path: Path) -> None:
    graph, sites = prepared(block(), tmp_path)
    errors = check_folds(OpenGraph(graph), sites, factors_for(sites)).exact
    assert errors.keys() == {site.name for site in sites}
    assert max(errors.values()) <= TOLERANCE


def test_decoder_with_external_weights(tmp_path: Path) -> None:
    graph, sites = prepared(decoder(tied=False), tmp_path, external=True)
    done: list[str] = []
    errors = check_folds(OpenGraph(graph), sites, factors_for(sites), progress=done.append).exact
    assert done == list(errors) == [site.name for site in sites]
    assert 0 < max(errors.values()) <= TOLERANCE


def test_the_graph_is_left_as_it_was(tmp_path: Path) -> None:
    graph, sites = prepared(decoder(), tmp_path, external=True)
    graphs.save(graph, tmp_path / "before.onnx")
    check_folds(OpenGraph(graph), sites, factors_for(sites))
    graphs.save(graph, tmp_path / "after.onnx")
    assert (tmp_path / "before.onnx").read_bytes() == (tmp_path / "after.onnx").read_bytes()


def test_only_weights_of_the_site_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, sites = prepared(decoder(), tmp_path, external=True)
    read: list[str] = []
    load = FileValues.load

    def note(self: FileValues) -> NDArray[np.float32]:
        read.append(self.proto.name)
        return load(self)

    monkeypatch.setattr(FileValues, "load", note)
    site = next(site for site in sites if site.name == "model.layers.1.mlp.up_proj")
    check_folds(OpenGraph(graph), [site], factors_for(sites))
    assert sorted(read) == ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"]


def test_sites_without_factors_are_not_run(tmp_path: Path) -> None:
    graph, sites = prepared(relu_mlp(), tmp_path)
    assert check_folds(OpenGraph(graph), sites, {}) == FoldErrors()


def wrong(site: Site, what: str) -> Site:
    """The site as a faulty analysis would give it."""
    match what:
        case "labels":
            consumers = tuple(replace(consumer, labels=consumer.labels[::-1].copy()) for consumer in site.consumers)
            return replace(site, consumers=consumers)
        case "bias":
            return replace(site, constants=())
        case "consumer":
            return replace(site, consumers=site.consumers[:1])
        case _:
            return replace(site, free=np.ones_like(site.free))


@pytest.mark.parametrize(
    ("block", "name", "what"),
    [
        ("relu_mlp", "fc1", "labels"),
        ("relu_mlp", "fc1", "bias"),
        ("relu_mlp", "norm", "bias"),
        ("gated_mlp", "norm", "consumer"),
        ("fused_qkv", "qkv", "labels"),
        ("low_rank", "down", "consumer"),
        ("partly_free", "norm", "free"),
        ("fused_gate_up", "gate_up", "free"),
        ("decomposed_attention", "v", "labels"),
    ],
)
def test_wrong_folds_fail(block: str, name: str, what: str, tmp_path: Path) -> None:
    graph, sites = prepared(SITES[block][0](), tmp_path)
    site = next(site for site in sites if site.name == name)
    faulty = wrong(site, what)
    errors = check_folds(OpenGraph(graph), [faulty], factors_for([faulty])).exact
    assert errors[name] > 100 * TOLERANCE


def test_a_value_that_leaves_the_segment_is_compared(tmp_path: Path) -> None:
    graph, sites = prepared(partly_free(), tmp_path)
    index = Index.of(graph)
    segment = cut(graph, index, sites[0], Sizes.of(graph))
    assert [node.op for node in segment.graph.nodes] == ["RMSNormalization", "Slice", "Transpose", "MatMul"]
    assert segment.outputs == (
        index.nodes["graph/Slice"].outputs[0].name,
        index.nodes["fc/MatMul"].outputs[0].name,
    )


def test_segment_computes_shapes_and_takes_activations(tmp_path: Path) -> None:
    graph, sites = prepared(decoder(), tmp_path)
    index = Index.of(graph)
    site = next(site for site in sites if site.name == "model.layers.0.self_attn.v_proj")
    segment = cut(graph, index, site, Sizes.of(graph)).graph
    attention = index.nodes["model.layers.0.self_attn/Attention"]
    expected = {attention.inputs[0].name, attention.inputs[1].name, attention.inputs[3].name}
    assert {tensor.name for tensor in segment.inputs} == expected | {index.nodes[site.producer.node].inputs[0].name}


def test_results_that_are_not_finite_count_as_infinite_error(tmp_path: Path) -> None:
    graph, sites = prepared(relu_mlp(), tmp_path)
    s: Mapping[str, Factor] = {"fc1": np.full(12, 1e-38)}
    assert check_folds(OpenGraph(graph), sites, s).exact == {"fc1": float("inf")}


def test_what_cannot_run_is_reported(tmp_path: Path) -> None:
    graph, sites = prepared(fused_qkv(), tmp_path)
    index = Index.of(graph)
    set_type(index.values["x"], None, ["batch", "sequence", H + 1])
    with pytest.raises(
        BismoothError, match=r"norm: the fold cannot be checked\. Expected ONNX Runtime to run the oper"
    ):
        check_folds(OpenGraph(graph), sites, factors_for(sites))


def test_decoder_whose_dimensions_have_no_names(tmp_path: Path) -> None:
    b = decoder()
    b.unknown = None
    graph, sites = prepared(b, tmp_path)
    assert any("unk__" in str(Index.of(graph).shape(name)) for name in Index.of(graph).values)
    assert max(check_folds(OpenGraph(graph), sites, factors_for(sites)).exact.values()) <= TOLERANCE


def test_sizes_of_symbolic_dimensions(tmp_path: Path) -> None:
    sizes = Sizes.of(prepared(decoder(), tmp_path)[0])
    assert sizes.names == {"batch": 2, "sequence": 7}
    assert [sizes.known(dim) for dim in (5, "sequence", "2*batch * sequence", "other", None)] == [5, 7, 28, None, None]
    assert sizes.shape((None, "other", "batch", 3)) == [2, 7, 2, 3]


def test_dimensions_without_a_name_are_guessed(tmp_path: Path) -> None:
    graph, sites = prepared(relu_mlp(), tmp_path)
    for value in Index.of(graph).values.values():
        if value.name == "x":
            set_type(value, np.dtype(np.float32), [None, "2*k", H])
    assert max(check_folds(OpenGraph(graph), sites, factors_for(sites)).exact.values()) <= TOLERANCE


def rounding_of(graph: Graph, compute: Literal["float16", "bfloat16"]) -> Rounding:
    """Of the float graph in 16 bits: all weights are stored in them, norms and their gammas are float32."""
    narrowed = graph.copy()
    SetPrecision(compute).apply(narrowed)
    return Rounding.of(narrowed, NARROW_TYPES[compute])


@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
@pytest.mark.parametrize("block", [block for block, _ in SITES.values()], ids=SITES.keys())
def test_right_folds_cost_16_bits_nothing(
    block: Block, compute: Literal["float16", "bfloat16"], tmp_path: Path
) -> None:
    graph, sites = prepared(block(), tmp_path)
    errors = check_folds(OpenGraph(graph), sites, factors_for(sites), rounding_of(graph, compute))
    assert errors.exact == check_folds(OpenGraph(graph), sites, factors_for(sites)).exact
    assert errors.compute.keys() == errors.exact.keys()
    one_rounding = {"float16": 2**-11, "bfloat16": 2**-8}[compute]
    for error in errors.compute.values():
        assert error.is_kept
        assert error.unfolded is not None
        assert error.folded is not None
        assert one_rounding / 8 < error.unfolded < 8 * one_rounding
        assert one_rounding / 8 < error.folded < 8 * one_rounding


V = "model.layers.1.self_attn.v_proj"


def test_a_row_that_overflows_float16_is_caught_by_name(tmp_path: Path) -> None:
    graph, sites = prepared(decoder(tied=False), tmp_path, external=True)
    factors = {site.name: np.ones(site.size) for site in sites}
    factors[V][3] = 1e-7
    errors = check_folds(OpenGraph(graph), sites, factors, rounding_of(graph, "float16"))
    assert max(errors.exact.values()) <= TOLERANCE
    assert [name for name, error in errors.compute.items() if not error.is_kept] == [V]
    assert errors.compute[V].folded is None
    wide = check_folds(OpenGraph(graph), sites, factors, rounding_of(graph, "bfloat16"))
    assert all(error.is_kept for error in wide.compute.values())


def test_what_overflows_without_folding_is_not_held_against_it(tmp_path: Path) -> None:
    b = relu_mlp()
    b.initializers["fc1.weight"][0] *= 1e7
    b.initializers["fc2.weight"][:, 0] *= 1e-7
    graph, sites = prepared(b, tmp_path)
    site = next(site for site in sites if site.name == "fc1")
    factors = {"fc1": np.where(np.arange(site.size) == 0, 1e7, 1.0)}
    error = check_folds(OpenGraph(graph), [site], factors, rounding_of(graph, "float16")).compute["fc1"]
    assert (error.unfolded, error.limit, error.is_kept) == (None, None, True)
    assert error.folded is not None
    assert ComputeError(None, None, None).is_kept


def test_where_nothing_is_rounded_the_errors_are_those_of_float32(tmp_path: Path) -> None:
    graph, sites = prepared(relu_mlp(), tmp_path)
    errors = check_folds(OpenGraph(graph), sites, factors_for(sites), Rounding(NARROW_TYPES["float16"], {}, {}))
    assert {name: (error.unfolded, error.folded) for name, error in errors.compute.items()} == {
        name: (0.0, error) for name, error in errors.exact.items()
    }


@pytest.mark.parametrize(("unfolded", "folded", "is_kept"), [(0.01, 0.02, True), (0.01, 0.021, False)])
def test_a_fold_may_double_the_error(unfolded: float, folded: float, is_kept: bool) -> None:
    assert ComputeError(unfolded, folded, 2 * unfolded).is_kept == is_kept
    assert not ComputeError(unfolded, None, 2 * unfolded).is_kept
