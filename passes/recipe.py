"""A recipe: what to quantize and how, as data. The format is in ``docs/recipes.md`` and ``recipe.schema.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from ..export.errors import BismoothError
from . import recipe_file
from .gates import Gates
from .nearest import nearest
from .recipe_file import Document
from .settings import UNSET, Settings
from .spec import ComputeType, LinearSpec, PerMagnitude, RangeMethod, SiteKind, StaticActivation, WeightSpec

DEFAULT = "w8a8"
"""The recipe that others extend where they do not say which."""

HEAD = "@head"
"""Selects the linears that make the logits."""

GATED_PRODUCT = f"@{SiteKind.GATED_PRODUCT}"
"""Selects the linears that read a product of two activations: the down projection of a gated MLP."""

WALLS = "@walls"
"""Selects the linears whose weights, after smoothing, break with one scale per output channel."""

SELECTORS = (HEAD, GATED_PRODUCT, WALLS)
"""They select linears by what they do in the graph, whatever their names. A model may have none of them."""

Selected = Mapping[str, Collection[str]]
"""By selector, the names of the linears that it fits; none where a selector is missing."""

_COMPLETE = {"extends", "compute_dtype", "weights", "activations", "smoothing", "layers", "gates"}


@dataclass(frozen=True, slots=True)
class Rule:
    """``settings`` for every linear that ``match`` fits: a glob on module paths, or a selector."""

    match: str
    settings: Settings

    def fits(self, name: str, selected: Selected) -> bool:
        return name in selected.get(self.match, ()) if self.match in SELECTORS else fnmatchcase(name, self.match)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A complete recipe.

    Attributes:
        name: of the built-in, or the file's name without its ending.
        settings: for every linear that no rule touches; all three are set.
        max_share: share of the linears that ``@walls`` selects at most, those with the largest weight error.
        layers: rules, in order; a later one wins.
    """

    name: str
    description: str
    compute_dtype: ComputeType
    settings: Settings
    max_share: float | None
    layers: tuple[Rule, ...]
    gates: Gates

    @staticmethod
    def load(source: str | Path | Recipe) -> Recipe:
        """A built-in recipe by name, or one from a YAML file; a recipe is returned as it is.

        Raises:
            BismoothError: unknown name, unreadable file, unknown key, wrong type or range; with file and key path.
        """
        if isinstance(source, Recipe):
            return source
        name, file = recipe_file.find(source)
        return Recipe.from_dict(recipe_file.read(file), name=name, where=str(file))

    @staticmethod
    def from_dict(document: object, *, name: str, where: str | None = None) -> Recipe:
        """The recipe that ``document`` (as in a file) describes; ``where`` starts the error messages.

        Raises:
            BismoothError: as for :meth:`load`.
        """
        where = where or f"recipe {name}"
        own = recipe_file.validate(document, where)
        parent = _parent(own, where)
        settings = parent.settings.overridden(Settings.from_dict(own, parent.settings, where))
        rules = (_rule(entry, settings, f"{where}: layers[{i}]") for i, entry in enumerate(own.get("layers", ())))
        recipe = Recipe(
            name=name,
            description=own.get("description", ""),
            compute_dtype=ComputeType(own.get("compute_dtype", parent.compute_dtype)),
            settings=settings,
            max_share=own.get("max_share", parent.max_share),
            layers=(*parent.layers, *rules),
            gates=parent.gates.replaced(own.get("gates", {})),
        )
        if own.get("max_share") is not None and not recipe.selects_walls:
            raise BismoothError(f"{where}: max_share: Expected a rule for {WALLS} in 'layers', got none.")
        return recipe

    def to_dict(self) -> Document:
        """The same recipe as plain data that extends nothing: ``from_dict`` gives an equal recipe."""
        return {
            "description": self.description,
            "extends": None,
            "compute_dtype": str(self.compute_dtype),
            **self.settings.to_dict(),
            "max_share": self.max_share,
            "layers": [{"match": rule.match, **rule.settings.to_dict()} for rule in self.layers],
            "gates": self.gates.to_dict(),
        }

    def to_yaml(self) -> str:
        """The text of a file that extends nothing and means the same."""
        return recipe_file.dump(self.to_dict())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the recipe says; its name, description and gates do not change what is built."""
        said = {key: value for key, value in self.to_dict().items() if key not in ("description", "gates")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration takes part: to choose α, or for static scales."""
        return self.smooths or self.has_static_scales

    @property
    def has_static_scales(self) -> bool:
        """Whether any activation has a constant scale."""
        return any(isinstance(item.activations, StaticActivation) for item in self._all_settings)

    @property
    def asks_for_walls(self) -> bool:
        """Whether weights are to be searched for channels that stand out."""
        weights = [item.weights for item in (self.settings, *(rule.settings for rule in self.layers))]
        grouped = any(isinstance(w, WeightSpec) and isinstance(w.granularity, PerMagnitude) for w in weights)
        return self.selects_walls or grouped

    @property
    def selects_walls(self) -> bool:
        """Whether a rule is for the linears that break: ``max_share`` caps those."""
        return any(rule.match == WALLS for rule in self.layers)

    @property
    def smooths(self) -> bool:
        """Whether any linear is smoothed."""
        return any(item.smoothing for item in self._all_settings)

    @property
    def needs_histograms(self) -> bool:
        """Whether static ranges come from histograms, not from maxima."""
        activations = [item.activations for item in self._all_settings]
        return any(isinstance(a, StaticActivation) and a.method is not RangeMethod.MINMAX for a in activations)

    @property
    def _all_settings(self) -> list[Settings]:
        """Those of the recipe and of its rules, with what was left unsaid as nothing."""
        said = [self.settings, *(rule.settings for rule in self.layers)]
        return [
            replace(item, **{f: None for f in ("activations", "smoothing") if getattr(item, f) is UNSET})
            for item in said
        ]

    def with_alpha(self, alpha: float) -> Recipe:
        """This recipe with α fixed wherever it smooths."""
        return replace(
            self,
            settings=self.settings.with_alpha(alpha),
            layers=tuple(replace(rule, settings=rule.settings.with_alpha(alpha)) for rule in self.layers),
        )

    def resolve(self, linear_names: Collection[str], selected: Selected) -> dict[str, LinearSpec]:
        """The specification of every linear, by module path (``model.layers.0.mlp.down_proj``).

        Raises:
            BismoothError: a rule fits no linear.
        """
        for rule in self.layers:
            if rule.match not in SELECTORS and not any(rule.fits(name, selected) for name in linear_names):
                raise BismoothError(f"recipe {self.name}: {_no_match(rule.match, linear_names)}")
        return {name: self._spec(name, selected) for name in linear_names}

    def _spec(self, name: str, selected: Selected) -> LinearSpec:
        chosen = self.settings
        for rule in self.layers:
            if rule.fits(name, selected):
                chosen = chosen.overridden(rule.settings)
        return chosen.linear()


def _no_match(pattern: str, names: Collection[str]) -> str:
    paths = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    patterns = sorted(paths | {f"*.{path.rpartition('.')[2]}" for path in paths})
    near = get_close_matches(pattern, patterns, n=3, cutoff=0.5) or patterns[:3]
    hint = f" Near it: {', '.join(map(repr, near))}." if near else ""
    return f"layers: {pattern!r} fits none of the {len(names)} linears.{hint}"


def _parent(own: Document, where: str) -> Recipe:
    """The recipe that ``own`` starts from."""
    parent = own.get("extends", DEFAULT)
    if parent is None:
        if missing := sorted(_COMPLETE - own.keys()):
            raise BismoothError(f"{where}: Expected every key with 'extends: null', got no {', '.join(missing)}.")
        return Recipe("", "", ComputeType(own["compute_dtype"]), Settings(), None, (), Gates())
    if parent not in recipe_file.BUILTIN:
        hint = nearest(parent, recipe_file.BUILTIN)
        raise BismoothError(f"{where}: extends: Expected a built-in recipe, got {parent!r}.{hint}")
    return Recipe.load(parent)


def _rule(entry: Document, above: Settings, where: str) -> Rule:
    match = entry["match"]
    if match.startswith("@") and match not in SELECTORS:
        known = ", ".join(SELECTORS)
        raise BismoothError(
            f"{where}.match: Unknown selector {match!r}. Expected a glob on module paths, or one of {known}."
        )
    return Rule(match, Settings.from_dict(entry, above, where))
