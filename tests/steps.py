"""Steps between a producer and a linear, as the flow tests and the fold tests use them."""

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from tests.graphs import Builder

C = 8
FLOAT, FLOAT16, INT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8
Step = Callable[[Builder, str], str]
"""From x [batch, sequence, C] to another value of the same shape, if not said otherwise."""


def everything(size: int = C) -> list[int]:
    return list(range(size))


def swap_heads(b: Builder, x: str) -> str:
    """[.., 2 · 4] with the two heads exchanged for positions inside a head."""
    y = b.op("Transpose", b.op("Reshape", x, b.ints(0, 0, 2, 4)), perm=[0, 1, 3, 2])
    return b.op("Reshape", y, b.ints(0, 0, C))


def reverse(b: Builder, x: str) -> str:
    far = np.iinfo(np.int64).min
    return b.op("Slice", x, b.ints(-1), b.constant("end", np.array([far])), b.ints(2), b.ints(-1))


def middle(b: Builder, x: str) -> str:
    return b.op("Slice", x, b.ints(2), b.ints(6), b.ints(-1))


def exchange_halves(b: Builder, x: str) -> str:
    left, right = b.ops("Split", x, count=2, axis=-1, num_outputs=2)
    return b.op("Concat", right, left, axis=-1)


def repeat_kv(b: Builder, x: str) -> str:
    """Grouped-query attention as Unsqueeze, Expand, Reshape: each of 2 heads twice."""
    y = b.op("Unsqueeze", b.heads(x, 2, 4), b.ints(2))
    y = b.op("Reshape", b.op("Expand", y, b.ints(1, 1, 2, 1, 1)), b.ints(0, 4, -1, 4))
    return b.merged(y, 2 * C)


ORDER = [3, 3, 0, 1, 7, 6, 5, 4]
MOVES: dict[str, tuple[Step, list[int]]] = {
    "Identity": (lambda b, x: b.op("Identity", x), everything()),
    "Cast": (lambda b, x: b.op("Cast", b.op("Cast", x, to=FLOAT16), to=FLOAT), everything()),
    "Neg": (lambda b, x: b.op("Neg", x), everything()),
    "Relu": (lambda b, x: b.op("Relu", x), everything()),
    "LeakyRelu": (lambda b, x: b.op("LeakyRelu", x, alpha=0.1), everything()),
    "PRelu": (lambda b, x: b.op("PRelu", x, b.vector("slope", C)), everything()),
    "Abs": (lambda b, x: b.op("Abs", x), everything()),
    "Mul by a constant": (lambda b, x: b.op("Mul", x, b.vector("v", C)), everything()),
    "Div by a constant": (lambda b, x: b.op("Div", x, b.vector("v", C)), everything()),
    "Add of zero": (lambda b, x: b.op("Add", x, b.constant("zero", np.zeros(1, np.float32))), everything()),
    "Add of itself": (lambda b, x: b.op("Add", x, b.op("Relu", x)), everything()),
    "Squeeze": (lambda b, x: b.op("Squeeze", b.op("Unsqueeze", x, b.ints(1)), b.ints(1)), everything()),
    "Gather channels": (lambda b, x: b.op("Gather", x, b.constant("i", np.array(ORDER)), axis=2), ORDER),
    "Gather the last token": (lambda b, x: b.op("Gather", x, b.constant("i", np.array(-1)), axis=1), everything()),
    "Slice of tokens": (lambda b, x: b.op("Slice", x, b.ints(0), b.ints(1), b.ints(1)), everything()),
    "Slice backwards": (reverse, [7, 6, 5, 4, 3, 2, 1, 0]),
    "Tile": (lambda b, x: b.op("Tile", middle(b, x), b.ints(1, 1, 2)), [2, 3, 4, 5] * 2),
    "Transpose of heads": (swap_heads, [0, 4, 1, 5, 2, 6, 3, 7]),
    "Split and Concat": (exchange_halves, [4, 5, 6, 7, 0, 1, 2, 3]),
}
"""Steps that move channels, and the labels that arrive."""


def indices(b: Builder) -> str:
    return b.input("i", C, dtype=TensorProto.INT64)


NOT_ALIKE = "the channel is added to a value that is not scaled alike"
NEAR_MISSES: dict[str, tuple[Step, str]] = {
    "residual": (lambda b, x: b.op("Add", x, b.tokens("r", C)), NOT_ALIKE),
    "other channels": (lambda b, x: b.op("Add", x, reverse(b, x)), NOT_ALIKE),
    "scalar bias": (
        lambda b, x: b.op("Add", x, b.constant("one", np.ones(1, np.float32))),
        "one element of one is added to several channels",
    ),
    "square": (lambda b, x: b.op("Mul", x, x), "a channel is multiplied by itself"),
    "denominator": (lambda b, x: b.op("Div", b.tokens("r", C), x), "the channels stand in a denominator"),
    "norm": (
        lambda b, x: b.op("RMSNormalization", x, b.vector("g", C)),
        "RMSNormalization does not commute with a scale per channel",
    ),
    "integers": (lambda b, x: b.op("Cast", b.op("Cast", x, to=INT8), to=FLOAT), "a cast to int8 rounds"),
    "dynamic Gather": (lambda b, x: b.op("Gather", x, indices(b), axis=2), "the indices of Gather are not constant"),
    "dynamic Slice": (
        lambda b, x: b.op("Slice", x, b.input("i", 1, dtype=TensorProto.INT64), b.ints(C), b.ints(2)),
        "input 1 of Slice is not a constant",
    ),
    "Reshape over tokens": (
        lambda b, x: b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1]), b.ints(0, -1, C)),
        "Reshape from ['batch', 8, 'sequence'] to ['batch', 'unk__0', 8] mixes channels with positions",
    ),
    "sum over channels": (
        lambda b, x: b.op("MatMul", x, b.input("p", "batch", C, C)),
        "MatMul mixes channels of axis 2",
    ),
    "slope": (lambda b, x: b.op("PRelu", b.tokens("r", C), x), "the channels enter PRelu at input 1"),
}
"""Steps that must stop the channels, and the reason."""
