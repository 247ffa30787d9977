"""Fold sites: every kind that must be found, and every near miss with its reason and node."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bismooth.passes.linears import find_linears
from bismooth.passes.sites import Rejected, Site, find_sites
from bismooth.passes.spec import SiteKind
from tests.blocks import SITES, Block, F, H, fused_gate_up, fused_qkv, gelu_mlp, partly_free, relu_gate
from tests.graphs import Builder, DecoderShape, decoder


def found(b: Builder, folder: Path) -> tuple[dict[str, Site], dict[str, Rejected]]:
    graph = b.graph(folder)
    sites, rejected = find_sites(graph, find_linears(graph))
    assert len({site.name for site in sites}) == len(sites)
    return {site.name: site for site in sites}, {item.producer: item for item in rejected}


@pytest.mark.parametrize(("block", "expected"), SITES.values(), ids=SITES.keys())
def test_sites_of_a_block(block: Block, expected: dict[str, tuple[str, list[str]]], tmp_path: Path) -> None:
    sites, _ = found(block(), tmp_path)
    assert {
        name: (site.kind.value, [consumer.linear for consumer in site.consumers]) for name, site in sites.items()
    } == expected


@pytest.mark.parametrize("layers", [1, 3])
def test_sites_of_a_decoder(layers: int, tmp_path: Path) -> None:
    sites, _ = found(decoder(DecoderShape(layers=layers)), tmp_path)
    assert Counter(site.kind for site in sites.values()) == {
        SiteKind.NORM: 2 * layers + 1,
        SiteKind.ATTENTION_VALUE: layers,
        SiteKind.GATED_PRODUCT: layers,
    }
    assert all(site.free.all() for site in sites.values())


@pytest.mark.timeout(20)
def test_eighty_layers_take_seconds(tmp_path: Path) -> None:
    shape = DecoderShape(layers=80, hidden=256, heads=16, kv_heads=2, head_size=16, ffn=64)
    sites, _ = found(decoder(shape), tmp_path)
    assert len(sites) == 321


def test_values_of_grouped_query_attention_are_tied(tmp_path: Path) -> None:
    """2 key and value heads of 8 channels, 4 query heads: each channel feeds two columns of o_proj."""
    sites, _ = found(decoder(), tmp_path)
    site = sites["model.layers.0.self_attn.v_proj"]
    (consumer,) = site.consumers
    heads = consumer.labels.reshape(4, 8)
    assert (heads[0] == heads[1]).all()
    assert (heads[2] == heads[3]).all()
    assert np.array_equal(heads[[0, 2]].ravel(), np.arange(16))
    assert (site.size, site.producer.linear, site.producer.weight) == (
        16,
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.v_proj.weight",
    )


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_absorbs_the_last_norm(tmp_path: Path, tied: bool) -> None:
    """An embedding that shares its weight goes on reading it as it was."""
    sites, _ = found(decoder(tied=tied), tmp_path)
    assert [consumer.linear for consumer in sites["model.norm"].consumers] == ["lm_head"]


def test_only_the_value_rows_of_a_fused_linear_are_free(tmp_path: Path) -> None:
    sites, _ = found(fused_qkv(), tmp_path)
    assert sites["qkv"].free.nonzero()[0].tolist() == [12, 13, 14, 15]
    assert {pin.node for pin in sites["qkv"].pinned} == {"graph/Attention"}


def test_only_the_up_rows_of_a_fused_linear_are_free(tmp_path: Path) -> None:
    sites, _ = found(fused_gate_up(), tmp_path)
    assert sites["gate_up"].free.nonzero()[0].tolist() == list(range(F, 2 * F))
    assert {pin.node for pin in sites["gate_up"].pinned} == {"act/Sigmoid"}


def test_partly_free_norm(tmp_path: Path) -> None:
    site = found(partly_free(), tmp_path)[0]["norm"]
    assert site.free.tolist() == [False] * 3 + [True] * 5
    assert site.consumers[0].labels.tolist() == [-1, -1, -1, 3, 4, 5, 6, 7]
    assert [(pin.reason, pin.node) for pin in site.pinned] == [
        ("Softplus does not commute with a scale per channel", "side/Softplus"),
    ]


def test_constants_of_a_layer_norm_and_of_a_bias(tmp_path: Path) -> None:
    sites, _ = found(SITES["relu_mlp"][0](), tmp_path)
    assert [use.value for use in sites["norm"].constants] == ["norm.weight", "norm.bias"]
    assert [use.value for use in sites["fc1"].constants] == ["fc1.bias"]
    assert found(SITES["flattened_gemm"][0](), tmp_path)[0]["c_fc"].constants[0].value == "c_fc.bias"


def rejection(b: Builder, folder: Path, producer: str) -> tuple[str, str]:
    sites, rejected = found(b, folder)
    assert producer not in sites
    return rejected[producer].reason, rejected[producer].node


def test_norm_that_also_feeds_a_residual_add(tmp_path: Path) -> None:
    b = Builder()
    h = b.rms_norm(b.tokens("x", H), "norm", H)
    b.outputs.append(b.op("Add", b.linear(h, "fc", H, H), h, at="block"))
    reason = "the channel is added to a value that is not scaled alike"
    assert rejection(b, tmp_path, "norm") == (reason, "block/Add")


def test_gelu_between_two_linears(tmp_path: Path) -> None:
    reason = "Gelu does not commute with a scale per channel"
    assert rejection(gelu_mlp(), tmp_path, "fc1") == (reason, "act/Gelu")


def test_values_that_are_used_elsewhere(tmp_path: Path) -> None:
    b = Builder()
    q, k, v = (b.heads(b.linear(b.tokens(f"{name}_in", H), name, H, H), 2, 4) for name in "qkv")
    b.outputs += [b.linear(b.merged(b.op("Attention", q, k, v), H), "o", H, H), b.op("Tanh", v, at="side")]
    assert rejection(b, tmp_path, "v") == ("Tanh does not commute with a scale per channel", "side/Tanh")


def test_second_operand_of_a_product(tmp_path: Path) -> None:
    reason = "the inputs of down are already smoothed by gate"
    assert rejection(relu_gate(), tmp_path, "up") == (reason, "down/MatMul")


def test_weight_that_two_linears_share(tmp_path: Path) -> None:
    b = Builder()
    h = b.rms_norm(b.tokens("x", H), "norm", H)
    shared = b.matrix("shared", H, H)
    b.outputs += [b.product(h, shared, "one", H), b.product(b.tokens("y", H), shared, "two", H)]
    reason = "the weight shared of one is shared with another node (two/MatMul)"
    assert rejection(b, tmp_path, "norm") == (reason, "one/MatMul")
    assert rejection(b, tmp_path, "one") == ("its weight shared is shared with two/MatMul", "one/MatMul")


def test_gamma_that_two_norms_share(tmp_path: Path) -> None:
    b = Builder()
    gamma = b.vector("gamma", H)
    for name in ("one", "two"):
        h = b.op("RMSNormalization", b.tokens(f"{name}_in", H), gamma, at=name, axis=-1)
        b.outputs.append(b.linear(h, f"{name}_fc", F, H))
    assert rejection(b, tmp_path, "one") == ("gamma is also used elsewhere", "one/RMSNormalization")


def test_gamma_of_a_decomposed_norm_that_is_shared(tmp_path: Path) -> None:
    b = Builder()
    gamma = b.vector("gamma", H)
    for name in ("one", "two"):
        b.outputs.append(b.linear(b.op("Mul", b.tokens(f"{name}_in", H), gamma, at=name), f"{name}_fc", F, H))
    assert rejection(b, tmp_path, "two") == ("gamma is also used elsewhere", "two/Mul")


def test_gamma_that_is_an_activation_or_not_computable(tmp_path: Path) -> None:
    b = Builder()
    x = b.tokens("x", H)
    for name, gamma in (("given", b.input("gamma", H)), ("odd", b.op("Exp", b.vector("w", H)))):
        b.outputs.append(b.linear(b.op("RMSNormalization", x, gamma, at=name, axis=-1), f"{name}_fc", F, H))
    reason = "is not a constant that can be computed here"
    assert rejection(b, tmp_path, "given") == (f"gamma {reason}", "given/RMSNormalization")
    assert rejection(b, tmp_path, "odd") == (f"v0_0 {reason}", "odd/RMSNormalization")


def test_gamma_that_is_a_scalar(tmp_path: Path) -> None:
    b = Builder()
    gamma = b.constant("gamma", np.ones(1, np.float32))
    b.outputs.append(b.linear(b.op("RMSNormalization", b.tokens("x", H), gamma, at="norm", axis=-1), "fc", F, H))
    sites, rejected = found(b, tmp_path)
    assert not sites
    assert rejected["norm"].reason.endswith("has shape ['batch', 'sequence', 8], expected [..., 1]")


def test_norm_over_several_axes(tmp_path: Path) -> None:
    b = Builder()
    h = b.op("LayerNormalization", b.input("x", "batch", 3, H), b.matrix("gamma", 3, H), at="norm", axis=1)
    b.outputs.append(b.linear(h, "fc", F, H))
    reason = "it normalizes from axis 1 on, expected the last one"
    assert rejection(b, tmp_path, "norm") == (reason, "norm/LayerNormalization")


def test_producer_that_no_linear_reads(tmp_path: Path) -> None:
    b = Builder()
    b.outputs.append(b.op("Shape", b.rms_norm(b.tokens("x", H), "norm", H)))
    assert rejection(b, tmp_path, "norm") == ("no linear reads its channels", "norm/RMSNormalization")


def test_multiplications_by_constants_are_no_rejected_norms(tmp_path: Path) -> None:
    b = Builder()
    b.outputs.append(b.op("Sigmoid", b.op("Mul", b.tokens("x", H), b.vector("v", H), at="scale")))
    assert found(b, tmp_path) == ({}, {})


def test_scale_between_two_linears_belongs_to_the_first(tmp_path: Path) -> None:
    b = Builder()
    y = b.op("Mul", b.linear(b.tokens("x", H), "fc1", F, H), b.vector("scale", F), at="mid")
    b.outputs.append(b.linear(y, "fc2", H, F))
    sites, rejected = found(b, tmp_path)
    assert list(sites) == ["fc1"]
    assert rejected["mid"].reason == "the inputs of fc2 are already smoothed by fc1"


def test_two_producers_of_one_linear(tmp_path: Path) -> None:
    """A concatenation: each producer has its own columns."""
    b = Builder()
    left, right = (b.rms_norm(b.tokens(f"{name}_in", H), name, H) for name in ("left", "right"))
    b.outputs.append(b.linear(b.op("Concat", left, right, axis=-1), "fc", F, 2 * H))
    sites, _ = found(b, tmp_path)
    assert sites["left"].consumers[0].labels.tolist() == [*range(H), *[-1] * H]
    assert sites["right"].consumers[0].labels.tolist() == [*[-1] * H, *range(H)]
