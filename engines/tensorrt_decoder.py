"""Generate text with TensorRT and TensorRT-RTX engines on the GPU of this machine.

Keys and values stay in buffers on the GPU, which engines update in place. Per step, token ids and positions go to the
GPU (24 bytes per row and token) and the logits of one position come back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from ..export.graph_names import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS
from .base import LOGITS_AT, WRITE_INDICES, Caches
from .decoder import Positions
from .kernel_cache import kernels_path, load_kernels, save_kernels
from .tensorrt_context import EngineContext, EngineTensor, Jit, LoadedEngine, to_float32
from .tensorrt_open import EngineFile, open_engine

_PROMPTS, _TOKENS = 0, 1
"""Numbers of the optimization profiles."""


class TensorRTDecoder:
    """A :class:`.decoder.Decoder` on a GPU.

    Everything is allocated once, for the most rows that the engine takes. Prompts longer than its longest sequence run
    in pieces. With TensorRT-RTX, kernels that were compiled are kept beside the engine when the decoder is closed.

    Args:
        engine: a file that ``bismooth build`` made of a graph with caches, with its record beside it.
        device: which GPU, among those that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        BismoothError: the engine has no caches, or does not fit the record, the installed runtime or the GPU; no GPU
            can be used; its memory is full.
    """

    def __init__(self, engine: Path, *, device: int = 0) -> None:
        opened = open_engine(engine, device)
        self.label, self.record, self.device = opened.label, opened.record, opened.device
        self._caches = _caches_of(opened)
        self._cuda = opened.cuda
        self._positions = Positions(self.label, self._caches.capacity)
        self._kernels_file = kernels_path(engine, opened.device.capability)
        self._resources = ExitStack()
        self._addresses: dict[str, int] = {}
        self._feeds: list[NDArray[Any]] = []
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
        self._tensors = {tensor.name: tensor for tensor in engine.tensors}
        self._check_inputs()
        self._kernels = engine.kernel_cache()
        if self._kernels is not None:
            load_kernels(self._kernels, self._kernels_file)
        self._contexts = self._make_contexts(engine)
        self._shapes: list[tuple[int, int]] = [(0, 0)] * len(self._contexts)
        self._batches, self._lengths = self._spans()
        sizes = self._sizes()
        self._addresses = {name: self._allocate(size) for name, size in sizes.items()}
        resources.callback(cuda.synchronize, self._stream)
        self._bind(sizes)

    def _make_contexts(self, engine: LoadedEngine) -> list[EngineContext]:
        """One per profile. Prompts come in any length, tokens in one shape, which is worth compiling for."""
        prompts = Jit(eager=False, kernels=self._kernels)
        tokens = Jit(eager=True, replay=True, kernels=self._kernels)
        return [engine.context(profile, self._stream, jit) for profile, jit in ((_PROMPTS, prompts), (_TOKENS, tokens))]

    def _check_inputs(self) -> None:
        known = {INPUT_IDS, ATTENTION_MASK, POSITION_IDS, WRITE_INDICES, LOGITS_AT, *self._caches.aliases}
        for name, tensor in self._tensors.items():
            if tensor.shapes and name not in known:
                raise BismoothError(
                    f"{self.label}: cannot generate text, since it has the input '{name}'. "
                    f"Expected {INPUT_IDS}, {ATTENTION_MASK}, {POSITION_IDS} and caches. Export the model anew."
                )

    def _spans(self) -> tuple[range, range]:
        """The numbers of rows and the lengths of prompts that the engine takes."""
        smallest, _, largest = _shapes(self._tensors[INPUT_IDS])
        batches, lengths = (range(low, high + 1) for low, high in zip(smallest, largest, strict=True))
        return batches, lengths

    def _sizes(self) -> dict[str, int]:
        """The bytes that each input and the logits take at most."""
        rows, length = self._batches[-1], self._lengths[-1]
        shapes = {name: self._shape(tensor, rows, length) for name, tensor in self._inputs().items()}
        for name, shape in shapes.items():
            self._contexts[_PROMPTS].set_shape(name, shape)
        shapes[LOGITS] = logits = self._contexts[_PROMPTS].shape(LOGITS)
        self._vocab_size = logits[-1]
        return {name: math.prod(shape) * self._tensors[name].dtype.itemsize for name, shape in shapes.items()}

    def _allocate(self, size: int) -> int:
        address = self._cuda.malloc(size)
        self._resources.callback(self._cuda.free, address)
        return address

    def _bind(self, sizes: Mapping[str, int]) -> None:
        """Tell both contexts where everything lies, and clear the caches: what attention does not see is no NaN."""
        for name, output in self._caches.aliases.items():
            self._cuda.clear(self._addresses[name], sizes[name], self._stream)
            self._addresses[output] = self._addresses[name]
        for context in self._contexts:
            for name, address in self._addresses.items():
                context.bind(name, address)

    def _inputs(self) -> dict[str, EngineTensor]:
        return {name: tensor for name, tensor in self._tensors.items() if tensor.shapes}

    def _shape(self, tensor: EngineTensor, rows: int, length: int) -> tuple[int, ...]:
        """The input's shape in a step of ``rows`` x ``length`` tokens."""
        if tensor.name == LOGITS_AT:
            return (1,)
        if tensor.name in (INPUT_IDS, POSITION_IDS):
            return rows, length
        return rows, *_shapes(tensor)[2][1:]

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def capacity(self) -> int:
        return self._caches.capacity

    @property
    def length(self) -> int:
        return self._positions.length

    def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See :meth:`.decoder.Decoder.prefill`.

        Raises:
            BismoothError: as there; also if the engine takes another number of rows, or the GPU failed.
        """
        real = self._positions.mask_of(ids, mask)
        self._check(len(ids))
        start = self._positions.length
        positions = self._positions.append(real)
        if not start or not real.all():
            self._upload(ATTENTION_MASK, self._mask())
        for piece in self._pieces(ids.shape[1]):
            self._run(ids[:, piece], positions[:, piece], start + piece.start)
        return self._logits(len(ids))

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :meth:`.decoder.Decoder.decode`."""
        return self.prefill(tokens[:, None])

    def reset(self) -> None:
        self._positions.reset()

    def _check(self, rows: int) -> None:
        if not self._addresses:
            raise BismoothError(f"{self.label}: the decoder was closed. Use it inside its 'with' block.")
        if rows not in self._batches:
            raise BismoothError(
                f"{self.label}: a batch of {rows} is outside of the engine's profile. "
                f"Expected {self._batches[0]} to {self._batches[-1]} rows. Build it for more with --batch."
            )

    def _mask(self) -> NDArray[np.int64]:
        """[rows, capacity]: 0 for padding, 1 elsewhere. What is to come is no padding, so it need not be sent again."""
        mask = np.ones((self._positions.rows, self.capacity), np.int64)
        mask[:, : self.length] = self._positions.mask
        return mask

    def _pieces(self, length: int) -> Iterator[slice]:
        """The parts in which so many positions run: as long as possible, and single ones where that is too short."""
        shortest, longest = max(self._lengths[0], 2), self._lengths[-1]
        start = 0
        while start < length:
            size = min(length - start, longest)
            size = size if size >= shortest else 1
            yield slice(start, start + size)
            start += size

    def _run(self, ids: NDArray[np.int64], positions: NDArray[np.int64], start: int) -> None:
        """Start a step with token ids [B, S], the first of which get the place ``start`` in the caches."""
        rows, length = len(ids), ids.shape[1]
        profile = _TOKENS if length == 1 else _PROMPTS
        context = self._contexts[profile]
        if self._shapes[profile] != (rows, length):
            self._shapes[profile] = (0, 0)
            for name, tensor in self._inputs().items():
                context.set_shape(name, self._shape(tensor, rows, length))
            self._shapes[profile] = rows, length
        self._upload(INPUT_IDS, ids)
        self._upload(POSITION_IDS, positions)
        self._upload(WRITE_INDICES, np.full(len(ids), start, np.int64))
        self._upload(LOGITS_AT, np.array([length - 1], np.int64))
        context.execute(self._stream)

    def _upload(self, name: str, values: NDArray[np.int64]) -> None:
        """Start copying an input to the GPU; it is kept until the stream is synchronized."""
        if name in self._tensors:  # what a graph does not use is no input
            feed = np.ascontiguousarray(values, self._tensors[name].dtype)
            self._feeds.append(feed)
            self._cuda.upload(self._addresses[name], feed, self._stream)

    def _logits(self, rows: int) -> NDArray[np.float32]:
        """Wait for the GPU; logits [B, V] of the last step."""
        tensor = self._tensors[LOGITS]
        result = np.empty((rows, self._vocab_size), tensor.dtype)
        self._cuda.download(result, self._addresses[LOGITS], self._stream)
        self._cuda.synchronize(self._stream)
        self._feeds.clear()
        return to_float32(result, tensor.kind)

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
        """Wait for the GPU, keep compiled kernels, and free everything; running is an error from then on."""
        if self._addresses and self._kernels is not None:
            save_kernels(self._kernels, self._kernels_file)
        self._free()

    def _free(self) -> None:
        resources, self._resources = self._resources, ExitStack()
        self._addresses = {}
        try:
            resources.close()
        finally:
            self._kernels = None  # after the contexts that use it

    def _release(self) -> None:
        """Free all, after an error that must not be hidden by those that follow from it."""
        with suppress(BismoothError):
            self._free()


def _caches_of(opened: EngineFile) -> Caches:
    if opened.record.caches is None:
        raise BismoothError(
            f"{opened.label}: the engine keeps no keys and values, so it generates no text. "
            "Build one of an artifact that was exported with --kv-cache."
        )
    return opened.record.caches


def _shapes(tensor: EngineTensor) -> tuple[tuple[int, ...], ...]:
    assert tensor.shapes is not None
    return tensor.shapes
