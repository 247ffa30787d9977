"""A small causal language model with caches, as it is exported; and what it computes, in numpy and without caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Ids = NDArray[np.int64]

VOCAB, HIDDEN, HEADS, KV_HEADS, SIZE, LAYERS = 13, 64, 4, 2, 16, 2
_HALF, _FLOAT, _INT64 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64


def weights(positions: int = 64) -> dict[str, NDArray[np.float32]]:
    """Linears [K, N], and tables of tokens and of positions."""
    rng = np.random.default_rng(0)
    shapes = {"tokens": (VOCAB, HIDDEN), "positions": (positions, HIDDEN), "head": (HIDDEN, VOCAB)}
    for layer in range(LAYERS):
        names = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE}
        shapes |= {f"layers.{layer}.{name}": (HIDDEN, width) for name, width in names.items()}
        shapes[f"layers.{layer}.o"] = (HEADS * SIZE, HIDDEN)
    return {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}


def expected_logits(ids: Ids, mask: Ids | None = None, window: int | None = None) -> NDArray[np.float64]:
    """Logits [B, S, V] of token ids [B, S], of which ``mask`` says which are no padding."""
    real: Ids = np.ones_like(ids) if mask is None else mask
    w = {name: values.astype(np.float64) for name, values in weights().items()}
    x: NDArray[np.float64] = w["tokens"][ids] + w["positions"][np.maximum(np.cumsum(real, 1) - 1, 0)]
    keys: Ids = np.arange(ids.shape[1], dtype=np.int64)
    queries = keys[:, None]
    seen = (keys <= queries) & (keys > queries - (window or len(keys))) & (real[:, None, None, :] == 1)
    seen |= keys == queries
    for layer in range(LAYERS):
        q, k, v = (_heads(x @ w[f"layers.{layer}.{name}"]) for name in "qkv")
        k, v = (np.repeat(part, HEADS // KV_HEADS, 1) for part in (k, v))
        scores = np.where(seen, q @ k.transpose(0, 1, 3, 2) / SIZE**0.5, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True)) @ v
        x = x + mixed.transpose(0, 2, 1, 3).reshape(*ids.shape, -1) @ w[f"layers.{layer}.o"]
    return x @ w["head"]


def _heads(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x.reshape(*x.shape[:2], -1, SIZE).transpose(0, 2, 1, 3)


def cached_model(
    *, half: bool = False, wide: bool = False, window: int | None = None, oddity: str = ""
) -> onnx.ModelProto:
    """The graph, with past and new keys concatenated.

    Args:
        half: in float16.
        wide: with caches of float32 all the same, as 16-bit graphs of artifacts have.
        window: of positions that a query sees, itself included.
        oddity: something that exported graphs do not do, see where it is used.
    """
    return _Maker(half, wide, window, oddity).model()


class _Maker:
    def __init__(self, half: bool, wide: bool, window: int | None, oddity: str) -> None:
        self.type = _HALF if half else _FLOAT
        self.wide, self.window, self.oddity = wide, window, oddity
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.taken: set[str] = set()

    def op(self, operator: str, *inputs: str, at: str = "", output: str = "", **attributes: Any) -> str:
        name = f"{at}/{operator}" if at else f"graph/{operator}"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        self.nodes.append(helper.make_node(operator, inputs, [output or name], name=name, **attributes))
        return output or name

    def ints(self, *values: int) -> str:
        return self.constant(f"ints{values}", np.array(values))

    def constant(self, name: str, values: Array | np.generic) -> str:
        self.constants[name] = np.asarray(values)
        return name

    def model(self) -> onnx.ModelProto:
        dtype = helper.tensor_dtype_to_np_dtype(self.type)
        self.constants |= {name: values.astype(dtype) for name, values in weights().items()}
        past = [f"past_key_values.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
        present = [name.replace("past_key_values", "present") for name in past]
        x = self.op("Add", self.op("Gather", "tokens", "input_ids"), self.op("Gather", "positions", "position_ids"))
        mask = self.mask()
        for layer in range(LAYERS):
            x = self.layer(x, layer, mask)
        logits = self.op("MatMul", x, "head", at="head")
        self.op("Cast", logits, output="logits", to=_FLOAT)
        ids = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "total"]}
        ids["position_ids"] = ["batch", "sequence"]
        inputs = [helper.make_tensor_value_info(name, _INT64, shape) for name, shape in ids.items()]
        inputs += self.values(past, "past")
        outputs = [helper.make_tensor_value_info("logits", _FLOAT, ["batch", "sequence", VOCAB])]
        outputs += self.values(present, "total")
        tensors = [numpy_helper.from_array(values, name) for name, values in self.constants.items()]
        graph = helper.make_graph(self.nodes, "cached", inputs, outputs, tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)

    def values(self, names: list[str], length: str) -> list[onnx.ValueInfoProto]:
        dtype = _FLOAT if self.wide else self.type
        return [helper.make_tensor_value_info(name, dtype, ["batch", KV_HEADS, length, SIZE]) for name in names]

    def mask(self) -> str:
        """From lengths of the past and of the mask, as transformers computes it."""
        zero, one = self.constant("zero", np.int64(0)), self.constant("one", np.int64(1))
        past = self.op("Squeeze", self.op("Shape", "past_key_values.0.key", start=2, end=3))
        total = self.op("Add", past, self.op("Squeeze", self.op("Shape", "input_ids", start=1, end=2)))
        keys = self.op("Unsqueeze", self.op("Range", zero, total, one), self.ints(0, 1, 2))
        queries = self.op("Unsqueeze", self.op("Range", past, total, one), self.ints(0, 1, 3))
        last = self.op("Add", queries, one) if self.oddity == "sees the future" else queries
        seen = self.op("LessOrEqual", keys, last)
        if self.window:
            first = self.op("Sub", queries, self.constant("window", np.int64(self.window)))
            seen = self.op("And", seen, self.op("Greater", keys, first))
        real = self.op("Cast", self.op("Unsqueeze", "attention_mask", self.ints(1, 2)), to=TensorProto.BOOL)
        if self.oddity == "computed mask":
            product = self.op("MatMul", self.op("Gather", "tokens", "input_ids"), "head")
            real = self.op(
                "And", real, self.op("Less", self.op("ReduceMax", product), self.constant("high", self.high()))
            )
        return self.op("Or", self.op("And", seen, real), self.op("Equal", keys, queries))

    def high(self) -> Array:
        return np.array(1e4, helper.tensor_dtype_to_np_dtype(self.type))

    def layer(self, x: str, number: int, mask: str) -> str:
        at = f"layers.{number}"
        q, k, v = (self.heads(self.op("MatMul", x, f"{at}.{name}", at=f"{at}.{name}"), at) for name in "qkv")
        past = [f"past_key_values.{number}.{part}" for part in ("key", "value")]
        k, v = (self.append(old, new, at) for old, new in zip(past, (k, v), strict=True))
        inputs = (q, k, v) if self.oddity == "no mask" else (q, k, v, mask)
        mixed = self.op("Attention", *inputs, at=at, scale=SIZE**-0.5)
        merged = self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), self.ints(0, 0, HEADS * SIZE))
        if self.oddity == "scale by the past's size":
            merged = self.op("Mul", merged, self.op("Cast", self.op("Size", past[0]), to=self.type))
        return self.op("Add", x, self.op("MatMul", merged, f"{at}.o", at=f"{at}.o"))

    def append(self, past: str, new: str, at: str) -> str:
        present, axis = past.replace("past_key_values", "present"), 3 if self.oddity == "longer heads" else -2
        if self.oddity == "second past" and past.endswith("1.value"):
            past, new = new, past
        if self.oddity == "wide keys" and past.endswith("key"):  # they come from a norm, say
            self.op("Concat", past, self.op("Cast", new, to=_FLOAT), at=at, output=present, axis=axis)
            return self.op("Cast", present, to=self.type)
        if not self.wide:
            return self.op("Concat", past, new, at=at, output=present, axis=axis)
        joined = self.op("Concat", self.op("Cast", past, to=self.type), new, at=at, axis=axis)
        self.op("Cast", joined, output=present, to=_FLOAT)
        return joined

    def heads(self, x: str, at: str) -> str:
        return self.op("Transpose", self.op("Reshape", x, self.ints(0, 0, -1, SIZE), at=at), at=at, perm=[0, 2, 1, 3])


def empty_past(batch: int, model: onnx.ModelProto) -> Mapping[str, Array]:
    """Caches of no positions for each past of ``model``."""
    return {
        value.name: np.zeros(
            (batch, KV_HEADS, 0, SIZE), helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        )
        for value in model.graph.input
        if value.name.startswith("past_key_values.")
    }
