"""A transformers model without its weights, and a shorter one that stands for it.

Blocks of a language model repeat. Tracing two of each distinct kind is enough to know all of them, if it is certain
that they are alike: here by a record of what each block computes, later by comparing what was traced.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from .artifact import Blocks
from .errors import BismoothError
from .model_class import model_class, parameters_without_storage
from .record import record_blocks
from .trace import cannot_trace, own_tensors


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters have no storage (device ``meta``) and whose buffers are real.

    Attributes:
        model: the whole model.
        kv_cache: whether its graph is to have a cache of keys and values.
        blocks: its repeated region, if it has one.
        short_config: configuration of a model with two blocks of each kind (or one, where there is but one), or
            ``None`` if there is nothing to gain.
        short_blocks: which blocks of the whole model those are.
    """

    model: torch.nn.Module
    kv_cache: bool
    blocks: Blocks | None
    short_config: Any | None
    short_blocks: tuple[int, ...]

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Tensors that the model's code makes, by name."""
        return own_tensors(self.model)

    @property
    def short_buffers(self) -> dict[str, torch.Tensor]:
        """The buffers under the names that they have in the model of ``short_config``."""
        return _renumbered(self.buffers, self.blocks, self.short_blocks)


def build_skeleton(
    config: Any, *, kv_cache: bool | None = None, shorten: bool = True, trust_remote_code: bool = False
) -> Skeleton:
    """Build the model of ``config`` without weights and find its repeated region.

    Args:
        config: of transformers.
        kv_cache: whether the graph is to have a cache; by default, if the model can generate text.
        shorten: look for a shorter model that stands for it.
        trust_remote_code: run Python code that the model brings along.

    Raises:
        BismoothError: transformers does not know the model, or its code cannot be run on tensors without storage.
    """
    cls = model_class(config, trust_remote_code=trust_remote_code)
    with parameters_without_storage():
        model = cls(copy.deepcopy(config)).eval()
        model.tie_weights()
    cached = model.can_generate() if kv_cache is None else kv_cache
    buffers = own_tensors(model)
    prefix = _find_blocks(model, config)
    if prefix is None:
        return Skeleton(model, cached, None, None, ())
    record = record_blocks(cls, config, prefix, buffers, kv_cache=cached)
    kinds = _kinds(record.blocks)
    blocks = Blocks(prefix, kinds)
    chosen = tuple(sorted(i for kind in set(kinds) for i in [i for i, k in enumerate(kinds) if k == kind][:2]))
    if not shorten or len(chosen) == len(kinds):
        return Skeleton(model, cached, blocks, None, ())
    try:
        with cannot_trace(cls.__name__):
            short = _shorten(config, chosen, len(kinds))
        trial = record_blocks(cls, short, prefix, _renumbered(buffers, blocks, chosen), kv_cache=cached)
    except BismoothError:  # the model's code knows no such model
        return Skeleton(model, cached, blocks, None, ())
    alike = trial.around == record.around and trial.blocks == tuple(record.blocks[i] for i in chosen)
    return Skeleton(model, cached, blocks, short if alike else None, chosen if alike else ())


def _find_blocks(model: torch.nn.Module, config: Any) -> str | None:
    """Path of the first list of modules that is as long as the configuration says the model is deep."""
    depth = getattr(config, "num_hidden_layers", None) or 0
    for name, module in cast(Any, model).named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth > 1:
            return name
    return None


def _kinds(records: tuple[Any, ...]) -> tuple[int, ...]:
    numbers: dict[Any, int] = {}
    return tuple(numbers.setdefault(record, len(numbers)) for record in records)


def _shorten(config: Any, chosen: tuple[int, ...], depth: int) -> Any:
    """The same configuration with only the chosen blocks: lists with an entry per block keep theirs."""
    short = copy.deepcopy(config)
    for name, value in cast(dict[str, Any], vars(short)).copy().items():
        if isinstance(value, list | tuple) and len(cast(list[Any], value)) == depth:
            setattr(short, name, [value[i] for i in chosen])
    short.num_hidden_layers = len(chosen)
    return short


def _renumbered(
    buffers: Mapping[str, torch.Tensor], blocks: Blocks | None, chosen: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Buffers of the chosen blocks under the numbers that these have in a model of their own, and those of no block."""
    if blocks is None:
        return dict(buffers)
    result: dict[str, torch.Tensor] = {}
    for name, tensor in buffers.items():
        if not name.startswith(f"{blocks.prefix}."):
            result[name] = tensor
            continue
        number, _, rest = name.removeprefix(f"{blocks.prefix}.").partition(".")
        if int(number) in chosen:
            result[f"{blocks.prefix}.{chosen.index(int(number))}.{rest}"] = tensor
    return result
