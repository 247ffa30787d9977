"""How each linear is computed, as values: a setting that no runtime can honour cannot be constructed.

Shapes: a linear is Y = X Wᵀ with tokens X [T, K] and weight W [N, K], whatever the layout in the file.
Quantization is symmetric INT8: q = clip(round(x / scale)) with zero point 0; weights use -127 … 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, TypeAlias

from ..export.errors import BismoothError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BismoothError(message)


class ComputeType(StrEnum):
    """The float type that a deployed graph computes in; scales and rescales are float32 in all of them."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class IntegerType(StrEnum):
    """The integer types that weights are stored in."""

    INT8 = "int8"


class RangeMethod(StrEnum):
    """How the range of a tensor is chosen from the histogram of its calibration values."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"


class SiteKind(StrEnum):
    """Where a per-channel factor folds away, named after what produces the tensor that the linears read."""

    NORM = "norm"
    ATTENTION_VALUE = "attention_value"
    GATED_PRODUCT = "gated_product"
    ELEMENTWISE = "elementwise"


class StandinKind(StrEnum):
    """How a stand-in gets its walls: by scaling channels of norms and linears, or by a rotation of the stream."""

    SCALE = "scale"
    ROTATE = "rotate"


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale per index of ``axis``; axis 0 of W [N, K] is the output channel."""

    axis: int = 0

    def __post_init__(self) -> None:
        _require(self.axis >= 0, f"per_channel: Expected an axis of 0 or more, got {self.axis}.")


@dataclass(frozen=True, slots=True)
class PerToken:
    """One scale per row of X, computed at run time."""


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale per run of ``size`` input channels, in every row of W and of X; the last run may be shorter."""

    size: int

    def __post_init__(self) -> None:
        _require(self.size > 0, f"per_group: Expected a group_size of 1 or more, got {self.size}.")


@dataclass(frozen=True, slots=True)
class PerMagnitude:
    """One scale for the input channels whose weights stand out ("walls"), and one for all others, in every row.

    Attributes:
        groups: At most so many: 2 puts all walls into one group, 3 parts the higher from the lower ones.
        wall_bits: 16: walls and what they multiply are two INT8 digits each. They are few and carry most of the sum,
            so that 8 bits of them can be coarser than all that the other channels contribute.
        walls: The channels of each group of walls, in order; none until they were looked for in the weight.
    """

    groups: int = 2
    wall_bits: int = 16
    walls: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        _require(self.wall_bits in (8, 16), f"per_magnitude: Expected 8 or 16 as wall_bits, got {self.wall_bits}.")
        _require(self.groups > 1, f"per_magnitude: Expected 2 or more groups, got {self.groups}.")
        _require(
            len(self.walls) < self.groups,
            f"per_magnitude: Expected at most {self.groups - 1} groups of walls, got {len(self.walls)}.",
        )


Groups: TypeAlias = PerGroup | PerMagnitude
"""Granularities that give the input channels of a linear more than one scale per row."""


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """How W [N, K] is stored: INT8 with one scale per output channel, or per output channel and group of inputs.

    Raises:
        BismoothError: per-channel scales on another axis than 0. On the reduction axis they force a float GEMM.
    """

    granularity: PerChannel | Groups = PerChannel()
    dtype: IntegerType = IntegerType.INT8

    def __post_init__(self) -> None:
        axis = self.granularity.axis if isinstance(self.granularity, PerChannel) else 0
        _require(
            axis == 0,
            f"weights: Expected scales per channel of axis 0, the output channel, got axis {axis}.",
        )


@dataclass(frozen=True, slots=True)
class DynamicActivation:
    """X is quantized with one scale per token, max|row| / 127, computed at run time; needs no calibration.

    With weights in groups the scale is one per token and group.
    """

    granularity: ClassVar[PerToken] = PerToken()


@dataclass(frozen=True, slots=True)
class StaticActivation:
    """X is quantized with one scale from calibration; ``percentile`` (of |X|, in %) goes with that method alone.

    With weights in groups the scale is one per group.

    Raises:
        BismoothError: a percentile is missing, superfluous or outside (50, 100].
    """

    method: RangeMethod
    percentile: float | None = None

    granularity: ClassVar[PerTensor] = PerTensor()

    def __post_init__(self) -> None:
        if self.method is RangeMethod.PERCENTILE:
            _require(
                self.percentile is not None and 50 < self.percentile <= 100,
                f"activations: Expected a percentile above 50 and up to 100, got {self.percentile}.",
            )
        else:
            _require(
                self.percentile is None,
                f"activations: Expected no percentile with the range method '{self.method}', got {self.percentile}.",
            )


ActivationSpec: TypeAlias = DynamicActivation | StaticActivation


@dataclass(frozen=True, slots=True)
class SmoothSpec:
    """Bi-smoothing (arXiv 2408.15301): X / s and W · s, s = max|X|^α / max|W|^(1-α) per input channel, also below 1.

    ``alphas`` is the grid that α is chosen from, per site, by output error; one value fixes α.
    ``kinds`` are the kinds of site that are smoothed. ``refine_steps`` is how many gradient steps each s then takes
    down the expected output error; 0 leaves it at the formula.

    Raises:
        BismoothError: no alpha, one outside [0, 1], one twice, no kind, or a negative number of steps.
    """

    alphas: tuple[float, ...]
    kinds: frozenset[SiteKind] = frozenset(SiteKind)
    refine_steps: int = 0

    def __post_init__(self) -> None:
        _require(
            bool(self.alphas) and all(0 <= alpha <= 1 for alpha in self.alphas),
            f"smoothing: Expected one or more alphas from 0 to 1, got {list(self.alphas)}.",
        )
        _require(
            len(set(self.alphas)) == len(self.alphas),
            f"smoothing: Expected different alphas, got {list(self.alphas)}.",
        )
        _require(bool(self.kinds), "smoothing: Expected one or more kinds of site, got none.")
        _require(self.refine_steps >= 0, f"smoothing: Expected refine_steps of 0 or more, got {self.refine_steps}.")


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """How one linear is computed; ``LinearSpec()`` leaves it in float.

    ``smoothing`` concerns the linear's input, so the linears that share an input must agree on it.

    Raises:
        BismoothError: activations are quantized and weights are not (there is no such GEMM).
    """

    weights: WeightSpec | None = None
    activations: ActivationSpec | None = None
    smoothing: SmoothSpec | None = None

    def __post_init__(self) -> None:
        _require(
            self.weights is not None or self.activations is None,
            "linear: Expected quantized weights with quantized activations, got float weights. "
            "Set weights, or set activations to null.",
        )

    @property
    def quantized(self) -> bool:
        """Whether the weights are stored as integers."""
        return self.weights is not None

    @property
    def has_rescale(self) -> bool:
        """Whether the weight is dequantized with one scalar, and its scales follow the product.

        So in products of integers, and where the scales of a float product's groups differ.
        """
        return self.activations is not None or isinstance(self.groups, PerGroup)

    @property
    def groups(self) -> Groups | None:
        """How the input channels are grouped; None if all of a row share a scale, or the linear is float."""
        match self.weights.granularity if self.weights else None:
            case PerGroup() as groups:
                return groups
            case PerMagnitude(walls=walls) as groups if walls:
                return groups
            case _:
                return None
