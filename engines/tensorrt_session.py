"""Run TensorRT and TensorRT-RTX engines on the GPU of this machine: token ids in, logits out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from ..export.graph_names import ATTENTION_MASK
from .base import LOGITS_AT, WRITE_INDICES, Shape
from .tensorrt_context import EngineTensor, to_float32
from .tensorrt_open import EngineFile, open_engine
from .token_feeds import Port, token_feeds

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class EngineSession:
    """An engine file loaded onto a GPU; a context manager, which frees everything on exit.

    The record beside the engine is checked before the engine is touched: it must be this very file, of the installed
    version and for this GPU. Buffers are made once, for the largest shapes of the engine's profile; of an engine with
    caches, whose rows begin anew in each run, that of prompts.

    Args:
        engine: a file that ``bismooth build`` wrote, with its record beside it.
        device: which GPU, among those that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        BismoothError: the engine does not fit the record, the installed runtime or the GPU; no GPU can be used; its
            memory is full.
    """

    def __init__(self, engine: Path, *, device: int = 0) -> None:
        opened = open_engine(engine, device)
        self.label, self.record, self.device = opened.label, opened.record, opened.device
        self._cuda, self._caches = opened.cuda, opened.record.caches
        self._aliases: Mapping[str, str] = self._caches.aliases if self._caches else {}
        self._resources = ExitStack()
        self._feeds: dict[str, NDArray[Any]] = {}
        try:
            self._open(opened)
        except BaseException:  # an interrupt too: device memory is not freed by itself
            self._release()
            raise

    def _open(self, opened: EngineFile) -> None:
        """Everything that is freed again, in the opposite order."""
        cuda, resources = self._cuda, self._resources
        cuda.use(self.device.index)
        self._stream = cuda.create_stream()
        resources.callback(cuda.destroy_stream, self._stream)
        engine = opened.load()
        resources.callback(engine.close)
        self._context = engine.context()
        self._inputs = {tensor.name: tensor for tensor in engine.tensors if tensor.shapes}
        self._logits = self._pick_logits([tensor for tensor in engine.tensors if not tensor.shapes])
        self._ports = tuple(
            Port(name, tensor.dtype, ()) for name, tensor in self._inputs.items() if name not in self._aliases
        )
        sizes = self._sizes(engine.tensors)
        self._addresses = {name: self._allocate(size) for name, size in sizes.items()}
        resources.callback(cuda.synchronize, self._stream)
        self._bind(sizes)

    def _pick_logits(self, outputs: Sequence[EngineTensor]) -> EngineTensor:
        floats = [tensor for tensor in outputs if tensor.kind in ("FLOAT", "HALF", "BF16")]
        if not floats or floats[0] is not outputs[0]:
            kinds = ", ".join(f"{tensor.name} ({tensor.kind})" for tensor in outputs)
            raise BismoothError(
                f"{self.label}: the first output is no logits. Expected float numbers, got {kinds or 'no output'}. "
                "Build an engine of a language model."
            )
        return floats[0]

    def _sizes(self, tensors: Sequence[EngineTensor]) -> dict[str, int]:
        """The bytes that each tensor takes at the largest shapes of the profile, outputs that are inputs' left out."""
        for name, tensor in self._inputs.items():
            self._context.set_shape(name, _largest(tensor))
        return {
            tensor.name: math.prod(self._context.shape(tensor.name)) * tensor.dtype.itemsize
            for tensor in tensors
            if tensor.name not in self._aliases.values()
        }

    def _allocate(self, size: int) -> int:
        address = self._cuda.malloc(size)
        self._resources.callback(self._cuda.free, address)
        return address

    def _bind(self, sizes: Mapping[str, int]) -> None:
        """Tell the context where everything lies, and clear the caches: what attention does not see is no NaN."""
        for name, output in self._aliases.items():
            self._cuda.clear(self._addresses[name], sizes[name], self._stream)
            self._addresses[output] = self._addresses[name]
        for name, address in self._addresses.items():
            self._context.bind(name, address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._release()

    def close(self) -> None:
        """Wait for the GPU and free buffers, context, engine, runtime and stream; running is an error from then on."""
        resources, self._resources = self._resources, ExitStack()
        self._addresses = {}
        resources.close()

    def _release(self) -> None:
        """Free all, after an error that must not be hidden by those that follow from it."""
        with suppress(BismoothError):
            self.close()

    def logits(self, ids: Ids) -> Logits:
        """Logits [B, S, V], float32, of token ids [B, S] without padding.

        Raises:
            BismoothError: the shape is outside of the engine's profile, or the GPU failed.
        """
        self._upload(ids)
        self._context.execute(self._stream)
        result = np.empty(self._context.shape(self._logits.name), self._logits.dtype)
        self._cuda.download(result, self._addresses[self._logits.name], self._stream)
        self._cuda.synchronize(self._stream)
        return to_float32(result, self._logits.kind)

    def windows(self, ids: Ids, batch_size: int = 1) -> Iterator[Logits]:
        """Logits [B, S, V] of ``ids`` [N, S], in order, ``batch_size`` windows at a time."""
        for start in range(0, len(ids), batch_size):
            yield self.logits(ids[start : start + batch_size])

    def latencies(self, ids: Ids, runs: int = 20, warmup: int = 3) -> list[float]:
        """Wall time in seconds of each of ``runs`` executions on token ids [B, S], without copies from and to the host.

        Raises:
            BismoothError: as for :meth:`logits`.
        """
        self._upload(ids)
        self._cuda.synchronize(self._stream)
        seconds = [self._execution() for _ in range(warmup + runs)]
        return seconds[warmup:]

    def _execution(self) -> float:
        start = time.perf_counter()
        self._context.execute(self._stream)
        self._cuda.synchronize(self._stream)
        return time.perf_counter() - start

    def _upload(self, ids: Ids) -> None:
        """Set the shapes of the inputs and start to copy them; ``_feeds`` keeps what the copies read."""
        if not self._addresses:
            raise BismoothError(f"{self.label}: the session was closed. Run it inside its 'with' block.")
        if ids.ndim != 2 or ids.dtype.kind != "i":
            raise BismoothError(
                f"{self.label}: expected token ids [batch, sequence] of integers, got {ids.dtype} {list(ids.shape)}."
            )
        feeds = token_feeds(self.label, self._ports, ids, self._first_positions(*ids.shape))
        feeds = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        for name, value in feeds.items():
            self._check_shape(self._inputs[name], value.shape)
        self._feeds = feeds
        for name in self._aliases:
            self._context.set_shape(name, (len(ids), *_largest(self._inputs[name])[1:]))
        for name, value in feeds.items():
            self._context.set_shape(name, value.shape)
            self._cuda.upload(self._addresses[name], value, self._stream)

    def _first_positions(self, rows: int, length: int) -> dict[str, NDArray[np.int64]]:
        """What an engine with caches takes to begin its rows, and to compute the logits of all their positions."""
        if self._caches is None:
            return {}
        return {
            ATTENTION_MASK: np.ones((rows, self._caches.capacity), np.int64),
            WRITE_INDICES: np.zeros(rows, np.int64),
            LOGITS_AT: np.arange(length),
        }

    def _check_shape(self, tensor: EngineTensor, shape: Shape) -> None:
        assert tensor.shapes is not None
        smallest, _, largest = tensor.shapes
        inside = all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=False))
        if len(shape) != len(smallest) or not inside:
            raise BismoothError(
                f"{self.label}: the input '{tensor.name}' of shape {list(shape)} is outside of the engine's profile. "
                f"Expected {list(smallest)} to {list(largest)}. Build it for these sizes with --batch and --sequence."
            )


def _largest(tensor: EngineTensor) -> Shape:
    assert tensor.shapes is not None
    return tensor.shapes[2]
