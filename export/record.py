"""What each block of a model computes, recorded in one run on tensors without storage.

Two blocks with equal records apply the same operations, with the same constants, to their own parameters, to the
output of the block before, and to the same shared values. So a block that is recorded need not be traced to know its
graph: it is a copy of another one. The record sees what depends on a block's number, whether the model's code decides
it when it is made or when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _python_dispatch as dispatch

from .hashing import array_sha256
from .trace import fake_transformer, own_tensors

_without_modes: Any = cast(Any, dispatch)._disable_current_modes
Operations = tuple[Any, ...]


@dataclass(frozen=True)
class Record:
    """Operations of a model: those of each block, and those around the blocks."""

    blocks: tuple[Operations, ...]
    around: Operations


def record_blocks(
    cls: Any, config: Any, prefix: str, buffers: Mapping[str, torch.Tensor], *, kv_cache: bool = False
) -> Record:
    """Run the model of ``config`` on tensors without storage; its blocks are ``prefix.0``, ``prefix.1``, …

    Args:
        cls: class of the model.
        config: its configuration.
        prefix: module path of the list of blocks.
        buffers: values of the tensors that are made by the model's code; those of a block belong to its record.
        kv_cache: whether the blocks append to a cache; what it holds for a block is the block's own, like parameters.

    Raises:
        BismoothError: the model cannot be run.
    """
    with fake_transformer(cls, config, kv_cache=kv_cache) as fake:
        model = fake.model
        blocks = list(cast(torch.nn.ModuleList, model.get_submodule(prefix)))
        recorder = _Recorder(prefix, len(blocks))
        for name, tensor in [*model.named_parameters(), *own_tensors(model).items(), *fake.inputs.items()]:
            recorder.know(tensor, ("name", name))
        if fake.cache is not None:
            for name, tensor in zip(fake.cache.names(prefix), fake.cache.tensors, strict=True):
                recorder.know(tensor, ("name", name))
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(recorder.entering(number), with_kwargs=True)
            block.register_forward_hook(recorder.leaving)
        with recorder:
            model(**fake.arguments)
    own = [_contents(buffers, f"{prefix}.{number}.") for number in range(len(blocks))]
    parts = [(*operations, *contents) for operations, contents in zip(recorder.blocks, own, strict=True)]
    return Record(tuple(parts), tuple(recorder.around))


def _contents(buffers: Mapping[str, torch.Tensor], prefix: str) -> Operations:
    """Names and contents of the buffers below ``prefix``."""
    names = sorted(name for name in buffers if name.startswith(prefix))
    return tuple((name.removeprefix(prefix), *_content(buffers[name])) for name in names)


def _content(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], str]:
    """Type, shape, and SHA-256 of the values."""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return str(tensor.dtype), tuple(tensor.shape), array_sha256(values)


class _Recorder(dispatch.TorchDispatchMode):
    """Writes down every operation, with a name for each tensor that says where it comes from.

    ``("own", name)`` is a parameter of the block, ``("stream",)`` what the block before gave, ``("here", i, k)`` a
    result of the block's operation i, ``("around", i, k)`` one of the operations outside of all blocks.
    """

    def __init__(self, prefix: str, count: int) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]: torch leaves its argument untyped
        self.blocks: list[list[Any]] = [[] for _ in range(count)]
        self.around: list[Any] = []
        self._prefix = prefix
        self._block: int | None = None
        self._stream: torch.Tensor | None = None
        self._origins: dict[int, tuple[Any, ...]] = {}
        self._alive: list[torch.Tensor] = []  # an id is unique only while its tensor lives

    def know(self, tensor: torch.Tensor, origin: tuple[Any, ...]) -> None:
        self._alive.append(tensor)
        self._origins[id(tensor)] = origin

    def entering(self, number: int) -> Any:
        """A hook to run before block ``number``."""

        def hook(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            if number == 0 and isinstance(given, torch.Tensor):
                self._stream = given
                self._alive.append(given)
            self._block = number

        return hook

    def leaving(self, _module: Any, _args: Any, output: Any) -> None:
        """A hook to run after each block."""
        self._block = None
        self._stream = cast(torch.Tensor, output[0] if isinstance(output, tuple | list) else output)
        self._alive.append(self._stream)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = self._name((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        operations = self.around if self._block is None else self.blocks[self._block]
        tensors = [value for value in _flat(result) if isinstance(value, torch.Tensor)]
        for index, tensor in enumerate(tensors):
            self.know(tensor, ("made", self._block, len(operations), index))
        operations.append((str(func), named, tuple((tuple(t.shape), str(t.dtype)) for t in tensors)))
        return result

    def _name(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._name_tensor(value)
        if isinstance(value, list | tuple):
            return tuple(self._name(item) for item in cast(Sequence[Any], value))
        if isinstance(value, dict):
            return tuple((key, self._name(item)) for key, item in sorted(cast(dict[str, Any], value).items()))
        return repr(value)

    def _name_tensor(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        if tensor is self._stream:
            return ("stream",)
        match self._origins.get(id(tensor)):
            case ("name", str(name)):
                own = f"{self._prefix}.{self._block}."
                return ("own", name.removeprefix(own)) if name.startswith(own) else ("name", name)
            case ("made", block, index, k) if block == self._block:
                return ("here", index, k)
            case ("made", None, index, k):
                return ("around", index, k)
            case ("made", block, index, k):
                return ("block", block, index, k)
            case _:
                return self._name_constant(tensor)

    def _name_constant(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        constant = tensor.constant if isinstance(tensor, FakeTensor) else tensor
        self._alive.append(tensor)
        if constant is None:
            return ("unknown", object())  # equal to nothing but itself
        with _without_modes():
            return ("constant", *_content(constant))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [item for part in cast(Sequence[Any], value) for item in _flat(part)]
    return [value]
