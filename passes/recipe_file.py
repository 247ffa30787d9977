"""Reads recipe files: strict YAML, then the JSON schema. Errors name the file, the key path, expected and got."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from ..export.errors import BismoothError
from .nearest import did_you_mean, nearest

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

Document = dict[str, Any]

_DATA = files(__name__.rpartition(".")[0])
SCHEMA: Document = json.loads(_DATA.joinpath("recipe.schema.json").read_text("utf-8"))
BUILTIN: dict[str, Traversable] = {
    file.name.removesuffix(".yaml"): file
    for file in sorted(_DATA.joinpath("recipes").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".yaml")
}


def find(source: str | Path) -> tuple[str, Traversable]:
    """Name and file of a recipe, given a built-in name or a path.

    Raises:
        BismoothError: it is neither.
    """
    if str(source) in BUILTIN:
        return str(source), BUILTIN[str(source)]
    path = Path(source)
    if not path.is_file():
        raise BismoothError(
            f"recipe: {str(source)!r} is no file and no built-in recipe.{nearest(str(source), BUILTIN)}"
        )
    return path.stem, path


def read(file: Traversable) -> object:
    """What ``file`` holds, not yet validated.

    Raises:
        BismoothError: it cannot be read or is no YAML.
    """
    try:
        return yaml.load(file.read_text("utf-8"), _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, OSError) as error:  # ValueError: no UTF-8, or no such date
        raise BismoothError(f"{file}: The recipe cannot be read as YAML: {' '.join(str(error).split())}") from error


def validate(document: object, where: str) -> Document:
    """``document``, if the schema allows it; ``where`` stands first in the message otherwise.

    Raises:
        BismoothError: it breaks the schema.
    """
    from jsonschema import Draft202012Validator  # 50 ms, which 'bismooth --help' need not wait for

    errors = cast("list[ValidationError]", list(Draft202012Validator(SCHEMA).iter_errors(document)))  # pyright: ignore
    if errors:
        first = min(errors, key=lambda error: [str(part) for part in error.absolute_path])
        raise BismoothError(f"{where}: {_message(first)}")
    return cast(Document, document)


def dump(document: Document) -> str:
    """``document`` as YAML, keys in their order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)


def key_path(parts: Sequence[str | int]) -> str:
    """``layers[0].weights`` from ``("layers", 0, "weights")``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".") or "the file"


def _message(error: ValidationError) -> str:
    where = key_path(list(error.absolute_path))
    got: Any = error.instance
    rule: Any = error.validator_value
    if error.validator == "additionalProperties":
        known = cast(Mapping[str, Any], error.schema)["properties"]
        key = next(key for key in got if key not in known)
        return f"{where}: Unknown key {key!r}.{nearest(str(key), known)}"
    if error.validator == "required":
        missing = [key for key in rule if key not in got]
        return f"{where}: Expected the key {missing[0]!r}, got {'only ' if got else 'none'}{', '.join(got)}."
    if error.validator == "enum":
        hint = did_you_mean(got, rule) if isinstance(got, str) else ""
        return f"{where}: Expected {' or '.join(map(str, rule))}, got {_shown(got)}.{hint}"
    expected = {
        "type": lambda: " or ".join(_TYPES[name] for name in ([rule] if isinstance(rule, str) else rule)),
        "minimum": lambda: f"{rule} or more",
        "exclusiveMinimum": lambda: f"more than {rule}",
        "maximum": lambda: f"at most {rule}",
        "minItems": lambda: f"at least {rule} entry",
        "minLength": lambda: "some text",
        "minProperties": lambda: "'match' and something to set (weights, activations or smoothing)",
        "uniqueItems": lambda: "entries that differ",
    }[str(error.validator)]()
    return f"{where}: Expected {expected}, got {_shown(got)}."


_TYPES = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "null": "null",
}


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number and refuses keys given twice, NaN, infinity, and aliases (files can explode)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = cast(yaml.Event, self.peek_event())  # pyright: ignore[reportUnknownMemberType]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        pairs = cast(list[tuple[yaml.Node, yaml.Node]], node.value)
        for key, count in Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)).items():
            if count > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.MarkedYAMLError(problem=f"{node.value} is not a finite number", problem_mark=node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
# YAML 1.1 wants a dot in every float and reads 1e-4 as text
_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """YAML with lists of plain values on one line."""

    def represent_list(self, data: Iterable[Any]) -> yaml.SequenceNode:
        flow = not any(isinstance(item, dict) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _Dumper.represent_list)
