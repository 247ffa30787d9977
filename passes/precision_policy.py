"""Which type an operator of a 16-bit graph computes in, and which constants that type can hold.

NOTE: float32 islands are a matter of range, not of speed. Norms square their input, a softmax exponentiates it, a
rotary angle is a position times a frequency (8000 is no multiple of 8 in float16), and the scale of an INT8 row may be
subnormal in float16. Builders fuse the Casts around an island into its kernel, so they cost nothing.
"""

from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from ._gs import Node, Tensor, dtype_of, external_proto, is_constant, read, shape_of


class Role(Enum):
    """How the type that an operator computes in is chosen."""

    NARROW = auto()
    """16 bits: linear algebra."""
    ELEMENTWISE = auto()
    """The widest type among its activations."""
    MOVE = auto()
    """Copies values, so likewise; on constants, whatever its consumers want."""
    WIDE = auto()
    """float32: everything that is not listed."""


_NARROW = "MatMul Gemm Conv ConvTranspose Einsum Attention"
_ELEMENTWISE = """
    Abs Add AveragePool Ceil Celu Clip Div Elu Equal Erf Floor Gelu GlobalAveragePool Greater GreaterOrEqual HardSigmoid
    HardSwish LeakyRelu Less LessOrEqual Max Mean Min Mish Mul Neg PRelu Relu Resize Round Selu Sigmoid Sign Softsign
    Sub Sum Swish Tanh ThresholdedRelu
"""
_MOVE = """
    ArgMax ArgMin Compress Concat DepthToSpace Dropout Expand Flatten Gather GatherElements GatherND GlobalMaxPool
    Identity IsInf IsNaN MaxPool Pad Reshape ReverseSequence ScatterElements ScatterND Slice SpaceToDepth
    Split Squeeze Tile TopK Transpose Trilu Unsqueeze Where
"""
AGNOSTIC = frozenset({"Cast", "Shape", "Size"})
"""They read a value in whichever type it exists."""
ROLES: dict[str, Role] = {
    **dict.fromkeys(_NARROW.split(), Role.NARROW),
    **dict.fromkeys(_ELEMENTWISE.split(), Role.ELEMENTWISE),
    **dict.fromkeys(_MOVE.split(), Role.MOVE),
}
NORMS = frozenset({"RMSNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization"})
INLINE = 1024
"""Constants of the model file up to this many elements are converted; larger ones get a Cast."""
MASK = 1e30
"""A constant beyond this magnitude says "masked": it is clamped to the type's range, not an overflow."""


CLAMPED = ".clamped"
"""Ends the name of a mask that was clamped to the lowest number of the 16-bit type."""


def is_standard(node: Node) -> bool:
    """Whether a node's operator is one of ONNX's own."""
    return node.domain in (None, "", "ai.onnx")


def role_of(node: Node) -> Role:
    """The role of a node's operator; operators of other domains compute in float32."""
    return ROLES.get(node.op, Role.WIDE) if is_standard(node) else Role.WIDE


def is_float(tensor: Tensor) -> bool:
    """Whether a value is float32, the one type that this policy is about."""
    return not tensor.is_empty() and dtype_of(tensor) == np.float32


def is_inline(tensor: Tensor) -> bool:
    """Whether a constant is small and stored in the model file, so that its value may be looked at."""
    return is_constant(tensor) and external_proto(tensor) is None and _size(tensor) <= INLINE


def fits(tensor: Tensor, dtype: np.dtype[np.generic]) -> bool:
    """Whether an inline constant stays finite and normal in a type; masking constants do, since they are clamped."""
    values = np.abs(read(tensor).astype(np.float64))
    limits = float_limits(dtype)
    return not np.any(
        ((values > limits.largest) & (values < MASK)) | ((values > 0) & (values < limits.smallest_normal))
    )


@dataclass(frozen=True, slots=True)
class FloatLimits:
    """The largest finite and the smallest normal number of a type, and the step from 1 to the next number."""

    largest: float
    smallest_normal: float
    epsilon: float


_LIMITS = {
    "float16": FloatLimits(largest=65504.0, smallest_normal=2.0**-14, epsilon=2.0**-10),
    "bfloat16": FloatLimits(largest=(2 - 2.0**-7) * 2.0**127, smallest_normal=2.0**-126, epsilon=2.0**-7),
}


def float_limits(dtype: np.dtype[np.generic]) -> FloatLimits:
    """The limits of float16 or bfloat16."""
    return _LIMITS[dtype.name]


def origin(tensor: Tensor) -> Tensor:
    """What a value was before it was moved and cast: an initializer for a weight."""
    while tensor.inputs and (tensor.inputs[0].op == "Cast" or role_of(tensor.inputs[0]) is Role.MOVE):
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def is_mask(tensor: Tensor) -> bool:
    """Whether a value is an additive mask: made of graph inputs and constants alone, one of them below ``-MASK``."""
    seen: set[int] = set()
    pending = [tensor]
    masked = False
    while pending:
        current = pending.pop()
        if is_constant(current):
            masked |= is_inline(current) and bool(np.any(read(current) <= -MASK))
        for node in current.inputs:
            if node.op == "Gather" or not (node.op == "Cast" or role_of(node) in (Role.ELEMENTWISE, Role.MOVE)):
                return False
            if id(node) not in seen:
                seen.add(id(node))
                pending.extend(value for value in node.inputs if is_float(value))
    return masked


def _size(tensor: Tensor) -> int:
    return int(np.prod([int(dim) for dim in shape_of(tensor) or () if dim is not None], dtype=np.int64))
