"""The options of a linear as a recipe states them: what is left unsaid stays as it was said before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Final, TypeVar

from ..export.errors import BismoothError
from .spec import (
    ActivationSpec,
    DynamicActivation,
    IntegerType,
    LinearSpec,
    PerChannel,
    PerGroup,
    PerMagnitude,
    RangeMethod,
    SiteKind,
    SmoothSpec,
    StaticActivation,
    WeightSpec,
)

Plain = dict[str, Any]
T = TypeVar("T")


class Unset(Enum):
    """Type of :data:`UNSET`: nothing was said, as opposed to ``None``, which says float, or no smoothing."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a linear, each of them optional."""

    weights: WeightSpec | Unset | None = UNSET
    activations: ActivationSpec | Unset | None = UNSET
    smoothing: SmoothSpec | Unset | None = UNSET

    @staticmethod
    def from_dict(entry: Mapping[str, Any], above: Settings, where: str) -> Settings:
        """The settings in ``entry``, valid by the schema; ``above`` fills in what its smoothing leaves out.

        Raises:
            BismoothError: keys of ``entry`` contradict each other.
        """
        smoothing: Plain = above.to_dict().get("smoothing") or {}

        def parsed(key: str, parse: Callable[[Plain, str], T]) -> T | Unset | None:
            if key not in entry:
                return UNSET
            return None if entry[key] is None else parse(entry[key], f"{where}: {key}")

        return Settings(
            weights=parsed("weights", _weights),
            activations=parsed("activations", _activations),
            smoothing=parsed(
                "smoothing", lambda plain, where: _smoothing({**smoothing, **_fixed(plain), **plain}, where)
            ),
        )

    def to_dict(self) -> Plain:
        """What is said, as it stands in a recipe file."""
        said: dict[str, Plain | Unset | None] = {
            "weights": _each(self.weights, _plain_weights),
            "activations": _each(self.activations, _plain_activations),
            "smoothing": _each(self.smoothing, _plain_smoothing),
        }
        return {key: value for key, value in said.items() if value is not UNSET}

    def overridden(self, other: Settings) -> Settings:
        """These settings with everything that ``other`` says."""
        said = {field.name: getattr(other, field.name) for field in fields(other)}
        return replace(self, **{name: value for name, value in said.items() if value is not UNSET})

    def with_alpha(self, alpha: float) -> Settings:
        """These settings with α fixed and s left at the formula, if they smooth."""
        if not isinstance(self.smoothing, SmoothSpec):
            return self
        return replace(self, smoothing=replace(self.smoothing, alphas=(alpha,), refine_steps=0))

    def linear(self) -> LinearSpec:
        """The specification; float weights make the linear float, whatever was said of its activations."""
        weights = _or_none(self.weights)
        return LinearSpec(weights, _or_none(self.activations) if weights else None, _or_none(self.smoothing))


def _or_none(value: T | Unset | None) -> T | None:
    return None if isinstance(value, Unset) else value


def _each(value: T | Unset | None, convert: Callable[[T], Plain]) -> Plain | Unset | None:
    return value if value is None or isinstance(value, Unset) else convert(value)


def _require(condition: bool, where: str, message: str) -> None:
    if not condition:
        raise BismoothError(f"{where}: {message}")


def _weights(plain: Plain, where: str) -> WeightSpec:
    kind = plain["granularity"]
    _require(
        (kind == "per_group") == ("group_size" in plain),
        where,
        "Expected 'group_size' with granularity per_group, and only there.",
    )
    superfluous = sorted(plain.keys() & {"groups", "wall_bits"})
    _require(
        kind == "per_magnitude" or not superfluous,
        where,
        f"Expected {' and '.join(map(repr, superfluous))} with granularity per_magnitude only.",
    )
    match kind:
        case "per_group":
            granularity = PerGroup(plain["group_size"])
        case "per_magnitude":
            granularity = PerMagnitude(**{key: plain[key] for key in superfluous})
        case _:
            granularity = PerChannel()
    return WeightSpec(granularity, IntegerType(plain.get("dtype", IntegerType.INT8)))


def _plain_weights(spec: WeightSpec) -> Plain:
    match spec.granularity:
        case PerGroup(size):
            granularity: Plain = {"granularity": "per_group", "group_size": size}
        case PerMagnitude(groups, wall_bits):
            granularity = {"granularity": "per_magnitude", "groups": groups, "wall_bits": wall_bits}
        case PerChannel():
            granularity = {"granularity": "per_channel"}
    return {"dtype": str(spec.dtype), **granularity}


def _activations(plain: Plain, where: str) -> ActivationSpec:
    if plain["granularity"] == "per_token":
        superfluous = plain.keys() & {"range", "percentile"}
        _require(not superfluous, where, "Expected no 'range' or 'percentile' with granularity per_token.")
        return DynamicActivation()
    _require("range" in plain, where, "Expected 'range' with granularity per_tensor.")
    method = RangeMethod(plain["range"])
    wanted = method is RangeMethod.PERCENTILE
    _require(wanted == ("percentile" in plain), where, "Expected 'percentile' with range percentile, and only there.")
    return StaticActivation(method, plain.get("percentile"))


def _plain_activations(spec: ActivationSpec) -> Plain:
    if isinstance(spec, DynamicActivation):
        return {"granularity": "per_token"}
    percentile = {} if spec.percentile is None else {"percentile": spec.percentile}
    return {"granularity": "per_tensor", "range": str(spec.method), **percentile}


def _fixed(plain: Plain) -> Plain:
    """One α means that α: s then stays at the formula, unless the entry itself asks for steps."""
    return {"refine_steps": 0} if len(plain.get("alphas", ())) == 1 else {}


def _smoothing(plain: Plain, where: str) -> SmoothSpec:
    _require("alphas" in plain, where, "Expected 'alphas', since nothing before sets them.")
    kinds = frozenset(map(SiteKind, plain.get("kinds", SiteKind)))
    return SmoothSpec(tuple(float(alpha) for alpha in plain["alphas"]), kinds, plain.get("refine_steps", 0))


def _plain_smoothing(spec: SmoothSpec) -> Plain:
    kinds = [str(kind) for kind in SiteKind if kind in spec.kinds]
    return {"alphas": list(spec.alphas), "kinds": kinds, "refine_steps": spec.refine_steps}
