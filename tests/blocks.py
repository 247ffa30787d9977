"""Blocks of language models with the fold sites that must be found in them."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
from onnx import TensorProto

from tests.graphs import Builder

H, F = 8, 12
"""Hidden channels; channels of the feed-forward network."""

Block = Callable[[], Builder]


def _finish(b: Builder, *outputs: str) -> Builder:
    b.outputs += outputs
    return b


def gated_mlp() -> Builder:
    b = Builder()
    h = b.rms_norm(b.tokens("x", H), "norm", H)
    gate = b.silu(b.linear(h, "gate", F, H), "act")
    return _finish(b, b.linear(b.op("Mul", gate, b.linear(h, "up", F, H, bias=True)), "down", H, F))


def relu_mlp() -> Builder:
    b = Builder()
    h = b.layer_norm(b.tokens("x", H), "norm", H)
    return _finish(b, b.linear(b.op("Relu", b.linear(h, "fc1", F, H, bias=True)), "fc2", H, F, bias=True))


def gelu_mlp() -> Builder:
    b = Builder()
    h = b.layer_norm(b.tokens("x", H), "norm", H)
    return _finish(b, b.linear(b.op("Gelu", b.linear(h, "fc1", F, H, bias=True), at="act"), "fc2", H, F))


def gemma_norm() -> Builder:
    """The norm multiplies by 1 + w."""
    b = Builder()
    gamma = b.op("Add", b.constant("one", np.float32(1)), b.vector("norm.weight", H), at="norm")
    h = b.op("RMSNormalization", b.tokens("x", H), gamma, at="norm", axis=-1)
    return _finish(b, b.linear(h, "fc", F, H))


def _decomposed_rms_norm(b: Builder, x: str) -> str:
    square = b.op("Pow", x, b.constant("two", np.float32(2)), at="norm")
    mean = b.op("ReduceMean", square, b.ints(-1), at="norm", keepdims=1)
    root = b.op("Sqrt", b.op("Add", mean, b.constant("eps", np.float32(1e-5)), at="norm"), at="norm")
    return b.op("Mul", b.op("Mul", x, b.op("Reciprocal", root), at="norm"), b.vector("norm.weight", H), at="norm")


def decomposed_rms_norm() -> Builder:
    b = Builder(opset=20)
    return _finish(b, b.linear(_decomposed_rms_norm(b, b.tokens("x", H)), "fc", F, H))


def decomposed_layer_norm() -> Builder:
    b = Builder(opset=20)
    x = b.tokens("x", H)
    centred = b.op("Sub", x, b.op("ReduceMean", x, b.ints(-1), at="norm"), at="norm")
    variance = b.op("ReduceMean", b.op("Mul", centred, centred, at="norm"), b.ints(-1), at="norm")
    root = b.op("Sqrt", b.op("Add", variance, b.constant("eps", np.float32(1e-5)), at="norm"), at="norm")
    scaled = b.op("Mul", b.vector("norm.weight", H), b.op("Div", centred, root, at="norm"), at="norm")
    return _finish(b, b.linear(b.op("Add", scaled, b.vector("norm.bias", H), at="norm"), "fc", F, H))


def bfloat16_weights() -> Builder:
    """The checkpoint is bfloat16 and every constant stands behind a Cast."""
    b = Builder()

    def stored(name: str, *shape: int) -> str:
        values = b.random.uniform(0.5, 1.5, shape).astype(ml_dtypes.bfloat16)
        return b.op("Cast", b.constant(name, values), at=name, to=TensorProto.FLOAT)

    h = b.op("LayerNormalization", b.tokens("x", H), stored("norm.weight", H), stored("norm.bias", H), at="norm")
    y = b.product(h, stored("fc1.weight", F, H), "fc1", F)
    y = b.op("Relu", b.op("Add", y, stored("fc1.bias", F), at="fc1"))
    return _finish(b, b.product(y, stored("fc2.weight", H, F), "fc2", H))


def fused_gate_up() -> Builder:
    """Phi-3: one linear for gate and up, split in halves."""
    b = Builder()
    y = b.linear(b.rms_norm(b.tokens("x", H), "norm", H), "gate_up", 2 * F, H)
    gate, up = b.ops("Split", y, count=2, axis=-1, num_outputs=2)
    return _finish(b, b.linear(b.op("Mul", up, b.silu(gate, "act")), "down", H, F))


def relu_gate() -> Builder:
    """Both operands of the product come from linears and commute with a scale."""
    b = Builder()
    h = b.rms_norm(b.tokens("x", H), "norm", H)
    gate = b.op("Relu", b.linear(h, "gate", F, H))
    return _finish(b, b.linear(b.op("Mul", gate, b.linear(h, "up", F, H)), "down", H, F))


def fused_qkv() -> Builder:
    """One linear for q, k and v by slices; grouped-query attention with 2 heads of size 4 over one of k and v."""
    b = Builder()
    y = b.linear(b.rms_norm(b.tokens("x", H), "norm", H), "qkv", 16, H, bias=True)
    bounds = (("q", 0, 8, 2), ("k", 8, 12, 1), ("v", 12, 16, 1))
    parts = [
        b.heads(b.op("Slice", y, b.ints(first), b.ints(last), b.ints(-1), at=name), heads, 4)
        for name, first, last, heads in bounds
    ]
    return _finish(b, b.linear(b.merged(b.op("Attention", *parts), H), "o", H, H))


def interleaved_qkv() -> Builder:
    """GPT-NeoX: q, k and v alternate head by head."""
    b = Builder()
    y = b.linear(b.layer_norm(b.tokens("x", H), "norm", H), "qkv", 3 * H, H, bias=True)
    y = b.op("Transpose", b.op("Reshape", y, b.ints(0, 0, 2, 12)), perm=[0, 2, 1, 3])
    q, k, v = b.ops("Split", y, b.ints(4, 4, 4), count=3, axis=-1)
    return _finish(b, b.linear(b.merged(b.op("Attention", q, k, v), H), "dense", H, H, bias=True))


def flattened_gemm() -> Builder:
    """GPT-2: Gemm with [K, N] weights on [batch · sequence, K]."""
    b = Builder()

    def conv1d(x: str, module: str, n: int, k: int) -> str:
        flat = b.op("Reshape", x, b.ints(-1, k), at=module)
        y = b.op("Gemm", flat, b.matrix(f"{module}.weight", k, n), b.vector(f"{module}.bias", n), at=module)
        length = b.op("Shape", "x", at=module, start=0, end=2)
        return b.op("Reshape", y, b.op("Concat", length, b.ints(n), at=module, axis=0), at=module)

    h = conv1d(b.layer_norm(b.tokens("x", H), "ln", H), "c_fc", F, H)
    return _finish(b, conv1d(b.op("LeakyRelu", h, alpha=0.2), "c_proj", H, F))


def decomposed_attention() -> Builder:
    """Opset 20: q kᵀ, Softmax, · v with 2 query heads over one of k and v, its bias added after the heads are split."""
    b = Builder(opset=20)
    h = _decomposed_rms_norm(b, b.tokens("x", H))
    q = b.heads(b.linear(h, "q", 8, H), 2, 4)
    k, v = (b.heads(b.linear(h, name, 4, H), 1, 4) for name in "kv")
    v = b.op("Add", v, b.constant("v.bias", b.random.standard_normal((1, 1, 4)).astype(np.float32)))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    y = b.op("MatMul", b.op("Softmax", scores, axis=-1), b.op("Expand", v, b.ints(1, 2, 1, 1)))
    return _finish(b, b.linear(b.merged(y, H), "o", H, H))


def gated_attention() -> Builder:
    """The output of attention is multiplied by a gate before it is projected."""
    b = Builder()
    h = b.rms_norm(b.tokens("x", H), "norm", H)
    q, k, v = (b.heads(b.linear(h, name, H, H), 2, 4) for name in "qkv")
    gate = b.op("Sigmoid", b.linear(h, "gate", H, H))
    return _finish(b, b.linear(b.op("Mul", b.merged(b.op("Attention", q, k, v), H), gate), "o", H, H))


def low_rank() -> Builder:
    """Two linears in a row, and a third that reads the first as well."""
    b = Builder()
    y = b.linear(b.tokens("x", H), "down", 4, H)
    return _finish(b, b.linear(y, "up", H, 4), b.linear(b.op("Abs", y), "side", 3, 4))


def partly_free() -> Builder:
    """The first channels of the norm are also read by something that cannot absorb a factor."""
    b = Builder()
    h = b.rms_norm(b.tokens("x", H), "norm", H)
    side = b.op("Softplus", b.op("Slice", h, b.ints(0), b.ints(3), b.ints(-1)), at="side")
    return _finish(b, b.linear(h, "fc", F, H), side)


SITES: dict[str, tuple[Block, dict[str, tuple[str, list[str]]]]] = {
    "gated_mlp": (gated_mlp, {"norm": ("norm", ["gate", "up"]), "up": ("gated_product", ["down"])}),
    "relu_mlp": (relu_mlp, {"norm": ("norm", ["fc1"]), "fc1": ("elementwise", ["fc2"])}),
    "gelu_mlp": (gelu_mlp, {"norm": ("norm", ["fc1"])}),
    "gemma_norm": (gemma_norm, {"norm": ("norm", ["fc"])}),
    "decomposed_rms_norm": (decomposed_rms_norm, {"norm": ("norm", ["fc"])}),
    "decomposed_layer_norm": (decomposed_layer_norm, {"norm": ("norm", ["fc"])}),
    "bfloat16_weights": (bfloat16_weights, {"norm": ("norm", ["fc1"]), "fc1": ("elementwise", ["fc2"])}),
    "fused_gate_up": (fused_gate_up, {"norm": ("norm", ["gate_up"]), "gate_up": ("gated_product", ["down"])}),
    "relu_gate": (relu_gate, {"norm": ("norm", ["gate", "up"]), "gate": ("gated_product", ["down"])}),
    "fused_qkv": (fused_qkv, {"norm": ("norm", ["qkv"]), "qkv": ("attention_value", ["o"])}),
    "interleaved_qkv": (interleaved_qkv, {"norm": ("norm", ["qkv"]), "qkv": ("attention_value", ["dense"])}),
    "flattened_gemm": (flattened_gemm, {"ln": ("norm", ["c_fc"]), "c_fc": ("elementwise", ["c_proj"])}),
    "decomposed_attention": (
        decomposed_attention,
        {"norm": ("norm", ["q", "k", "v"]), "v": ("attention_value", ["o"])},
    ),
    "gated_attention": (
        gated_attention,
        {"norm": ("norm", ["q", "k", "v", "gate"]), "v": ("attention_value", ["o"])},
    ),
    "low_rank": (low_rank, {"down": ("elementwise", ["up", "side"])}),
    "partly_free": (partly_free, {"norm": ("norm", ["fc"])}),
}
"""Per block its builder, and per site its kind and the linears that absorb the factor."""
