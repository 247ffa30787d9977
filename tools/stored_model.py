"""Run a transformers model whose weights stay in their files (:mod:`.stored_tensor`), in the memory there is."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ..engines.memory import current_rss, format_bytes
from ..export.errors import BismoothError
from ..export.model_class import model_class, parameters_without_storage
from ..export.source import folder_weights
from ..export.stored_names import stored_names
from .stored_tensor import MOST, SLICE, StoredTensor, read_rows
from .torch_model import loading

MARGIN = 1 << 25
"""Bytes for what torch itself takes when it runs."""

LOGITS, LEAST_LOGITS = 1 << 27, 1 << 24
"""Bytes of the logits that are computed at once, copies included: at most, and where memory is short."""

_COPIES = 2
"""Copies of the logits that a model makes: some scale or cap them."""

_VALUES = 6
"""Activations of the widest layer's size that a block holds at one time."""

Write: TypeAlias = Callable[[int, int, NDArray[np.float32]], None]

_KEEP = "logits_to_keep"
_FLOAT_BYTES = 4


class StoredModel:
    """A transformers model in float32.

    Args:
        folder: with ``config.json`` and safetensors files.
        progress: called with how many parameters were read at least once, and how many there are.

    Raises:
        BismoothError: transformers does not know the model, or its weights cannot be found.
    """

    def __init__(self, folder: Path, progress: Callable[[int, int], None] = lambda _done, _total: None) -> None:
        self._folder, self._progress = folder, progress
        self._read: set[str] = set()
        self._parameters: dict[str, StoredTensor] = {}
        self._largest = 0
        with loading(folder):
            self._model = self._open()

    @property
    def unread(self) -> list[str]:
        """Parameters that nothing has asked for."""
        return sorted(self._parameters.keys() - self._read)

    def load_whole(self, memory: int | None = None, beside: int = 0) -> None:
        """Read all parameters now, for a model that computes with one in a way that no reading on demand can serve.

        Args:
            memory: bytes that may be taken; any number by default.
            beside: bytes that others have taken of it.

        Raises:
            BismoothError: they do not fit.
        """
        taken, size = current_rss(), sum(_FLOAT_BYTES * prod(tensor.shape) for tensor in self._parameters.values())
        if memory is not None and beside + taken + size > memory:
            raise BismoothError(
                f"{self._folder}: the model computes with {self.unread[0]} where it cannot be read on demand, and does "
                f"not fit whole. Expected --memory {format_bytes(beside + taken + size)} or more, or leave the hop out "
                "with --hop."
            )
        loaded: dict[Any, torch.nn.Parameter] = {}
        for module in self._model.modules():
            for name, tensor in module._parameters.items():
                if isinstance(tensor, StoredTensor) and tensor.place is not None:
                    if tensor.place not in loaded:
                        loaded[tensor.place] = torch.nn.Parameter(tensor.load(), requires_grad=False)
                    module._parameters[name] = loaded[tensor.place]
        self._largest = 0

    def run(self, ids: NDArray[np.int64], write: Write, memory: int | None = None, beside: int = 0) -> None:
        """The first output of the model for windows of ids [N, S]; as many as fit pass the weights together.

        Args:
            ids: token ids.
            write: told the number of a window, a position, and the values [n, T, …] from there on.
            memory: bytes that may be taken; any number by default.
            beside: bytes that others have taken of it.

        Raises:
            BismoothError: one window does not fit; the smallest memory that would do is named.
        """
        length = ids.shape[1]
        room = None if memory is None else memory - beside - current_rss()
        count = next((n for n in range(len(ids), 0, -1) if room is None or self._need(n, length) <= room), None)
        if count is None:
            raise BismoothError(
                f"{self._folder}: --memory is too small for the torch model on a window of {length} tokens. "
                f"Expected {format_bytes(beside + self.least(length))} or more, or leave the hop out with --hop."
            )
        logits = LOGITS if room is None else min(LOGITS, room - self._need(count, length) + self._least_logits)
        step = max(1, logits // (_COPIES * _FLOAT_BYTES * count * max(1, self._width)))
        for start in range(0, len(ids), count):
            windows = torch.from_numpy(ids[start : start + count])  # pyright: ignore[reportUnknownMemberType]
            if not self._keeps or step >= length:
                write(start, 0, self._values(windows))
                continue
            body: Any = self._model.base_model
            body.forward = _once(body.forward)
            for first in range(0, length, step):
                kept = torch.arange(first, min(first + step, length))
                write(start, first, self._values(windows, **{_KEEP: kept}))
            del body.forward

    def least(self, length: int) -> int:
        """Bytes that this process takes at least when it runs windows of ``length`` tokens."""
        return current_rss() + self._need(1, length)

    def _values(self, windows: torch.Tensor, **options: Any) -> NDArray[np.float32]:
        with torch.inference_mode():
            return self._model(input_ids=windows, **options)[0].float().numpy()

    @cached_property
    def _width(self) -> int:
        """Logits of a token; 0 of a model without a head."""
        head = self._model.get_output_embeddings() if hasattr(self._model, "get_output_embeddings") else None
        return 0 if head is None else head.weight.shape[0]

    @cached_property
    def _keeps(self) -> bool:
        """Whether the model can compute logits of some positions alone."""
        has_body = self._model.base_model is not self._model
        return self._width > 0 and has_body and _KEEP in inspect.signature(self._model.forward).parameters

    @property
    def _least_logits(self) -> int:
        return max(LEAST_LOGITS, _COPIES * _FLOAT_BYTES * self._width) if self._keeps else 0

    def _need(self, count: int, length: int) -> int:
        """Bytes that a run of so many windows takes, with the fewest logits at one time."""
        inner = [tensor.shape for tensor in self._parameters.values() if self._width not in tensor.shape[:1]]
        widest = max((size for shape in inner for size in shape[-2:]), default=0)
        heads = getattr(self._model.config, "num_attention_heads", 0)
        values = _FLOAT_BYTES * count * length * (_VALUES * widest + 2 * heads * length)
        logits = self._least_logits or _COPIES * _FLOAT_BYTES * count * length * self._width
        return MARGIN + self._largest + values + logits

    def _open(self) -> Any:
        """The model with stored tensors for parameters, and the buffers of the checkpoint."""
        from transformers import AutoConfig

        config = cast(Any, AutoConfig).from_pretrained(self._folder, trust_remote_code=False)
        config.dtype, config.use_cache = torch.float32, False
        with parameters_without_storage():
            model = model_class(config)(config).eval()
            model.tie_weights()
        weights = folder_weights(self._folder)
        names = stored_names(model, weights)
        for prefix, module in model.named_modules():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    name = f"{prefix}.{own}" if prefix else own
                    place = weights.entries[names[name]] if name in names else None
                    tensor = StoredTensor.of(parameter.shape, name, place, self._note)
                    module._parameters[own] = self._parameters[name] = tensor
                    self._largest = max(self._largest, _bytes_at_once(module, tensor))
            for own, buffer in module._buffers.items():
                name = names.get(f"{prefix}.{own}" if prefix else own)
                if buffer is not None and name is not None:
                    buffer.copy_(read_rows(*weights.entries[name], dtype=buffer.dtype))
        return model

    def _note(self, name: str) -> None:
        self._read.add(name)
        self._progress(len(self._read), len(self._parameters))


def _bytes_at_once(module: torch.nn.Module, tensor: StoredTensor) -> int:
    """Bytes of a weight, as it is stored and in float32, that are in memory at one time."""
    size = _FLOAT_BYTES * prod(tensor.shape)
    if isinstance(module, torch.nn.Embedding):
        return 0
    return 2 * (SLICE if isinstance(module, torch.nn.Linear) and size > MOST else size)


def _once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes its result when it is called first, and gives that from then on."""
    results: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if not results:
            results.append(forward(*args, **kwargs))
        return results[0]

    return run
