"""A cache of keys and values that torch can trace: each layer's two tensors are inputs, and what they become outputs.

Every layer keeps all positions, those with a sliding window too: the attention mask has the window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch.utils import _pytree
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .errors import BismoothError
from .graph_names import PARTS, cache_name


class _Layer(DynamicLayer):
    """Grows like its base class, and has a length while it is empty too."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]: transformers leaves its arguments untyped
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        return cast(torch.Tensor, self.keys).shape[-2]


class KvCache(Cache):
    """Keys and values [batch, kv_heads, past, head_dim] of a model's layers.

    Args:
        tensors: key and value of each layer that ``numbers`` names, alternating.
        numbers: the layers that have a cache; the others use another one's, or none.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], numbers: Sequence[int]) -> None:
        layers: list[Any] = [DynamicLayer() for _ in range(max(numbers) + 1)]
        given = iter(tensors)
        for number, keys, values in zip(numbers, given, given, strict=True):
            layers[number] = _Layer(keys, values)
        super().__init__(layers=layers)
        self.numbers = tuple(numbers)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors as they are now, in the order of the constructor's."""
        layers: list[Any] = [self.layers[number] for number in self.numbers]
        return [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    def names(self, prefix: str) -> list[str]:
        """A name for each of the tensors: ``past_key_values.0.key``."""
        return [cache_name(prefix, number, part) for number in self.numbers for part in PARTS]


def example_cache(model: torch.nn.Module, length: int, inputs: dict[str, torch.Tensor]) -> KvCache:
    """A cache of ``length`` positions for ``model``, whose layers are found by running it on ``inputs``.

    Raises:
        BismoothError: the model keeps another state than keys and values of attention.
    """
    cache = DynamicCache()
    model(**inputs, past_key_values=cache, use_cache=True)
    layers = dict[int, Any](enumerate(cache.layers))
    layers = {number: layer for number, layer in layers.items() if layer.is_initialized}
    if not layers or any(type(layer) is not DynamicLayer for layer in layers.values()):
        raise BismoothError(
            f"{type(model).__name__}: the model keeps no keys and values of attention in a cache. "
            "Export it with --no-kv-cache."
        )
    shapes = [tensor.shape for layer in layers.values() for tensor in (layer.keys, layer.values)]
    return KvCache([torch.zeros(*shape[:2], length, shape[3]) for shape in shapes], tuple(layers))


def _flatten(cache: KvCache) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    return cache.tensors, cache.numbers


def _flatten_with_keys(cache: KvCache) -> tuple[list[tuple[Any, torch.Tensor]], tuple[int, ...]]:
    keys = [cast(Any, _pytree).SequenceKey(index) for index in range(2 * len(cache.numbers))]
    return list(zip(keys, cache.tensors, strict=True)), cache.numbers


cast(Any, _pytree).register_pytree_node(
    KvCache,
    _flatten,
    KvCache,
    serialized_type_name="bismooth.KvCache",
    flatten_with_keys_fn=_flatten_with_keys,
)
