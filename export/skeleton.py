"""A transformers model without its weights, and a shorter one that stands for it.

Blocks of a language model repeat. Tracing two of each distinct kind is enough to know all of them, if it is checked that they are alike:
here by comparing modules (types, settings, parameter shapes), later by comparing what was traced.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from .artifact import Blocks
from .errors import BismoothError

_POSITION = {"layer_idx", "layer_id", "layer_index", "layer_number"}


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters have no storage (device ``meta``) and whose buffers are real.

    Attributes:
        model: the whole model.
        blocks: its repeated region, if it has one.
        short_config: configuration of a model with two blocks of each kind (or one, where there is but one), or ``None`` if there is
            nothing to gain.
        short_blocks: which blocks of the whole model those are.
    """

    model: torch.nn.Module
    blocks: Blocks | None
    short_config: Any | None
    short_blocks: tuple[int, ...]


def model_class(config: Any) -> Any:
    """The class of transformers that ``config.architectures`` names; the causal one of the model type when it names none."""
    import transformers

    names = cast(list[str], config.architectures or [])
    if names and hasattr(transformers, names[0]):
        return getattr(transformers, names[0])
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise BismoothError(
        f"model type {config.model_type!r} ({', '.join(names) or 'no architecture named'}) is unknown to transformers."
    )


@contextmanager
def parameters_without_storage() -> Iterator[None]:
    """Modules made inside have parameters on the ``meta`` device and real buffers; their initializers do nothing."""
    from transformers.initialization import no_init_weights

    register = torch.nn.Module.register_parameter

    def register_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = torch.nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_meta  # type: ignore[method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(config: Any, *, shorten: bool = True) -> Skeleton:
    """Build the model of ``config`` without weights and find its repeated region."""
    cls = model_class(config)
    with parameters_without_storage():
        model = cls(copy.deepcopy(config)).eval()
        model.tie_weights()
    found = _find_blocks(model, config)
    if found is None:
        return Skeleton(model, None, None, ())
    prefix, modules = found
    kinds = _kinds([_signature(module) for module in modules])
    blocks = Blocks(prefix, kinds)
    chosen = tuple(sorted(i for kind in set(kinds) for i in [i for i, k in enumerate(kinds) if k == kind][:2]))
    if not shorten or len(chosen) == len(kinds):
        return Skeleton(model, blocks, None, ())
    short = _shorten(config, chosen, len(kinds))
    with parameters_without_storage():
        trial = cls(copy.deepcopy(short)).eval()
    found = _find_blocks(trial, short)
    alike = found is not None and [_signature(m) for m in found[1]] == [_signature(modules[i]) for i in chosen]
    return Skeleton(model, blocks, short if alike else None, chosen if alike else ())


def _find_blocks(model: torch.nn.Module, config: Any) -> tuple[str, list[torch.nn.Module]] | None:
    """The longest list of modules as long as the configuration says the model is deep."""
    depth = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth and depth > 1:
            return name, list(module)
    return None


def _signature(module: torch.nn.Module) -> tuple[Any, ...]:
    """What two blocks must share to compute the same function of their parameters."""
    simple = (bool, int, float, str, type(None), torch.dtype)
    settings = sorted(
        (name, repr(value) if isinstance(value, simple) else getattr(value, "__qualname__", type(value).__qualname__))
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _POSITION and name != "config"
    )
    tensors = [(name, tuple(p.shape), p.dtype) for name, p in module.named_parameters(recurse=False)]
    tensors += [(name, tuple(b.shape), b.dtype) for name, b in module.named_buffers(recurse=False)]
    children = [(name, _signature(child)) for name, child in module.named_children()]
    return type(module).__qualname__, tuple(settings), tuple(tensors), tuple(children)


def _kinds(signatures: list[tuple[Any, ...]]) -> tuple[int, ...]:
    numbers: dict[tuple[Any, ...], int] = {}
    return tuple(numbers.setdefault(signature, len(numbers)) for signature in signatures)


def _shorten(config: Any, chosen: tuple[int, ...], depth: int) -> Any:
    """The same configuration with only the chosen blocks: lists with an entry per block keep theirs."""
    short = copy.deepcopy(config)
    for name, value in list(vars(short).items()):
        if isinstance(value, list | tuple) and len(cast(list[Any], value)) == depth and depth > 1:
            setattr(short, name, [cast(list[Any], value)[i] for i in chosen])
    short.num_hidden_layers = len(chosen)
    return short
