"""The residual stream of a decoder, and what keeps one from being rotated."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.graph import load
from bismooth.passes.linears import find_linears
from bismooth.passes.residual import Residual, find_residual
from tests.models import exported
from tests.quantized import make, save

_WEIGHTS: dict[str, Any] = {
    "table": np.ones((9, 4), np.float32),
    "gamma": np.ones(4, np.float32),
    "w": np.eye(4, dtype=np.float32),
    "head": np.ones((4, 9), np.float32),
    "two": np.float32(2),
    "bias": np.ones(4, np.float32),
}


def find(path: Path) -> Residual:
    graph = load(path)
    return find_residual(graph, find_linears(graph))


def of_text(body: str, folder: Path, **more: Any) -> Residual:
    """The stream of a graph that embeds ``i`` and ends in ``n = the norm of r``, logits."""
    text = f"(int64[batch, 5] i) => (float[batch, 5, 9] logits) {{ {body} logits = MatMul(n, head) }}"
    used = {name: array for name, array in (_WEIGHTS | more).items() if name in text}
    return find(save(make(text, **used), folder))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_decoders(name: str) -> None:
    residual = find(exported(name).graph)
    assert residual.width == 32
    assert [item.weight for item in residual.embeddings] == ["model.embed_tokens.weight"]
    blocks = [f"model.layers.{block}" for block in range(3)]
    norms = [f"{block}.{norm}" for block in blocks for norm in ("input_layernorm", "post_attention_layernorm")]
    assert [norm.name for norm in residual.norms] == [*norms, "model.norm"], "not those of q and k"
    assert [linear.name for linear in residual.writers] == [
        f"{block}.{linear}" for block in blocks for linear in ("self_attn.o_proj", "mlp.down_proj")
    ]
    behind = {(reader.norm.name, reader.linear.name) for reader in residual.readers if reader.norm}
    assert len(behind) == len(residual.readers) == 3 * 5 + 1
    assert ("model.norm", "lm_head") in behind
    assert ("model.layers.1.post_attention_layernorm", "model.layers.1.mlp.up_proj") in behind


def test_a_fused_projection() -> None:
    residual = find(exported("phi3").graph)
    assert len(residual.readers) == 3 * 2 + 1


def test_scalar_factors_and_linears_without_a_norm(tmp_path: Path) -> None:
    body = """
        e = Gather(table, i)
        s = Mul(two, e)
        a = MatMul(s, w)
        half = Div(a, two)
        r = Add(s, half)
        n = RMSNormalization <axis: int = -1, epsilon: float = 0.5> (r, gamma)
    """
    residual = of_text(body, tmp_path)
    assert [norm.epsilon for norm in residual.norms] == [0.5]
    assert [(reader.linear.k, reader.norm is None) for reader in residual.readers] == [(4, True), (4, False)]
    assert [linear.node for linear in residual.writers] == [residual.readers[0].linear.node]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gemma2",
            r"post_feedforward_layernorm: the residual .*: Add .* reads its result\. Expected norms whose gamma",
        ),
        ("gemma3", r"post_feedforward_layernorm: the residual stream cannot be rotated here"),
        (
            "opt",
            r"LayerNormalization subtracts the mean over the channels\. Expected RMSNorm, sums, .* of kind 'scale'",
        ),
        ("gpt_neox", r"LayerNormalization subtracts the mean"),
        ("gpt2", r"transformer/Reshape_3: .*: Reshape does not commute with a rotation of the channels"),
        ("bert", r"rotate: no linear makes the logits\. Expected a language model"),
    ],
)
def test_architectures_that_cannot_be_rotated(name: str, message: str) -> None:
    with pytest.raises(BismoothError, match=message):
        find(exported(name).graph)


_NORM = "n = RMSNormalization <axis: int = -1> (r, gamma)"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"e = Gather(table, i) r = Add(e, bias) {_NORM}", r"Add does not commute with a rotation"),
        (f"e = Gather(table, i) r = Mul(e, bias) {_NORM}", r"Mul does not commute with a rotation"),
        (f"e = Gather(table, i) r = Relu(e) {_NORM}", r"Relu does not commute with a rotation"),
        (
            f"r = Gather(table, i) {_NORM} m = MatMul(n, stack) z = ReduceSum(m)",
            r"MatMul does not commute with a rotation",
        ),
        (f"r = Gather(table, i) sum = ReduceSum(r) {_NORM.replace('gamma', 'sum')}", r"its gamma sum is computed"),
        (
            f"e = Gather(table, i) a = MatMul(e, w) b = MatMul(e, w) c = Add(a, b) r = Add(e, c) {_NORM}",
            r"its weight w is shared with \S+\. Expected weights of their own",
        ),
        (
            f"r = Gather(table, i) {_NORM} yes = Cast <to: int = 9> (two) "
            "x = If (yes) <then_branch = a () => (float[batch, 5, 4] p) { p = Identity(r) }, "
            "else_branch = b () => (float[batch, 5, 4] q) { q = Neg(r) }>",
            r"it belongs to a subgraph",
        ),
        ("r = Gather(table, i) n = RMSNormalization <axis: int = 1> (r, all)", r"it normalizes from axis 1 on"),
    ],
)
def test_operations_that_do_not_commute(body: str, message: str, tmp_path: Path) -> None:
    more = {"stack": np.ones((2, 1, 4, 4), np.float32), "all": np.ones((5, 4), np.float32)}
    with pytest.raises(BismoothError, match=message):
        of_text(body, tmp_path, **more)


def test_streams_that_begin_or_end_outside(tmp_path: Path) -> None:
    text = "(float[batch, 5, 4] r) => (float[batch, 5, 9] logits) {" + _NORM + " logits = MatMul(n, head) }"
    kept = {name: _WEIGHTS[name] for name in ("gamma", "head")}
    with pytest.raises(BismoothError, match=r"r: the residual stream .*: it is an input of the graph"):
        find(save(make(text, **kept), tmp_path / "in"))
    text = text.replace("float[batch, 5, 4] r", "int64[batch, 5] i").replace("logits) {", "logits, float[b, 5, 4] r) {")
    text = text.replace("{", "{ r = Gather(table, i) ")
    with pytest.raises(BismoothError, match=r"r: the residual stream .*: it is an output of the graph"):
        find(save(make(text, table=_WEIGHTS["table"], **kept), tmp_path / "out"))
