"""Which tensor of a checkpoint each parameter of a transformers model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from .errors import BismoothError
from .source import Weights

_CHUNK = 1 << 24


def stored_names(model: Any, weights: Weights) -> dict[str, str]:
    """Name of a parameter or buffer of a transformers model → the name of its tensor in the checkpoint.

    Checkpoints spell names differently from the model (old names, with or without the base model's prefix);
    transformers keeps the rules. Parameters that share storage (tied embeddings) share a tensor.

    Raises:
        BismoothError: transformers computes a parameter from several tensors, so that it has no bytes in the
            checkpoint, or the checkpoint has two different tensors for one parameter.
    """
    parameters = dict(model.state_dict(keep_vars=True))
    names: dict[str, str] = {}
    for stored in weights.entries:
        name = stored if stored in parameters else _renamed(stored, model, weights, parameters)
        names.setdefault(name, stored)
    by_parameter: dict[int, str] = {}
    for name, parameter in parameters.items():
        if name in names:
            stored = by_parameter.setdefault(id(parameter), names[name])
            _check_equal(weights, stored, names[name])
    return {name: by_parameter[id(value)] for name, value in parameters.items() if id(value) in by_parameter}


def _renamed(stored: str, model: Any, weights: Weights, parameters: Mapping[str, Any]) -> str:
    from transformers import conversion_mapping, core_model_loading

    loading: Any = core_model_loading
    transforms: list[Any] = cast(Any, conversion_mapping).get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, loading.WeightConverter)]
    name, converted = loading.rename_source_key(stored, renamings, converters, model.base_model_prefix, parameters)
    if converted is not None:
        raise BismoothError(
            f"{weights.entries[stored][0]}: tensor {stored} must be rearranged to become {name} of "
            f"{type(model).__name__}; its bytes cannot be used as they are. Load the model with transformers, save it "
            "with save_original_format=False and export that folder."
        )
    return name


def _check_equal(weights: Weights, first: str, second: str) -> None:
    """Both tensors are one parameter of the model, so their bytes must be equal."""
    if first == second:
        return
    (path, a), (other, b) = weights.entries[first], weights.entries[second]
    equal = (a.dtype, a.shape) == (b.dtype, b.shape)
    with path.open("rb") as left, other.open("rb") as right:
        left.seek(a.offset)
        right.seek(b.offset)
        for start in range(0, a.length if equal else 0, _CHUNK):
            size = min(_CHUNK, a.length - start)
            equal = equal and left.read(size) == right.read(size)
    if not equal:
        raise BismoothError(
            f"{path}: config.json ties {second} to {first}, but the checkpoint has different values for them. "
            'If they are meant to be two tensors, set "tie_word_embeddings": false in config.json.'
        )
