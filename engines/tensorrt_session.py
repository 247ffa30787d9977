"""Run TensorRT and TensorRT-RTX engines on the GPU of this machine: token ids in, logits out."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from .base import EngineRecord, Shape
from .cuda import Device, load_cuda
from .publish import read_record
from .tensorrt_context import EngineContext, EngineTensor
from .tensorrt_runtime import RUNTIMES, Runtime, load_module
from .token_feeds import Port, token_feeds

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class EngineSession:
    """An engine file loaded onto a GPU; a context manager, which frees everything on exit.

    The record beside the engine is checked before the engine is touched: it must be this very file, of the installed
    version and for this GPU. Buffers are made once, for the largest shapes of the engine's profile.

    Args:
        engine: a file that ``bismooth build`` wrote, with its record beside it.
        device: which GPU, among those that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        BismoothError: the engine does not fit the record, the installed runtime or the GPU; no GPU can be used; its
            memory is full.
    """

    def __init__(self, engine: Path, *, device: int = 0) -> None:
        self.label = str(engine)
        self.record = read_record(engine)
        runtime = _runtime_of(engine, self.record)
        trt = load_module(runtime)
        _check_version(engine, self.record, runtime, trt.__version__)
        self._cuda = load_cuda()
        self.device = self._cuda.device(device)
        _check_capability(engine, self.record, runtime, self.device)
        plan = _read_plan(engine, self.record)
        self._resources = ExitStack()
        self._feeds: dict[str, NDArray[Any]] = {}
        try:
            self._open(trt, runtime, plan)
        except BaseException:  # an interrupt too: device memory is not freed by itself
            self._release()
            raise

    def _open(self, trt: Any, runtime: Runtime, plan: bytes) -> None:
        """Everything that is freed again, in the opposite order."""
        cuda, resources = self._cuda, self._resources
        cuda.use(self.device.index)
        self._stream = cuda.create_stream()
        resources.callback(cuda.destroy_stream, self._stream)
        self._context = EngineContext(trt, runtime, self.label, plan)
        resources.callback(self._context.close)
        self._inputs = {tensor.name: tensor for tensor in self._context.tensors if tensor.shapes}
        self._logits = self._pick_logits([tensor for tensor in self._context.tensors if not tensor.shapes])
        self._ports = tuple(Port(name, tensor.dtype, ()) for name, tensor in self._inputs.items())
        self._addresses = self._allocate()
        resources.callback(cuda.synchronize, self._stream)

    def _pick_logits(self, outputs: Sequence[EngineTensor]) -> EngineTensor:
        floats = [tensor for tensor in outputs if tensor.kind in ("FLOAT", "HALF", "BF16")]
        if not floats or floats[0] is not outputs[0]:
            kinds = ", ".join(f"{tensor.name} ({tensor.kind})" for tensor in outputs)
            raise BismoothError(
                f"{self.label}: the first output is no logits. Expected float numbers, got {kinds or 'no output'}. "
                "Build an engine of a language model."
            )
        return floats[0]

    def _allocate(self) -> dict[str, int]:
        """A buffer per tensor, large enough for the largest shapes of the profile; addresses by name."""
        for name, tensor in self._inputs.items():
            self._context.set_shape(name, _largest(tensor))
        addresses: dict[str, int] = {}
        for tensor in self._context.tensors:
            size = math.prod(self._context.shape(tensor.name)) * tensor.dtype.itemsize
            addresses[tensor.name] = address = self._cuda.malloc(size)
            self._resources.callback(self._cuda.free, address)
            self._context.bind(tensor.name, address)
        return addresses

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
        return _to_float32(result, self._logits.kind)

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
        feeds = token_feeds(self.label, self._ports, ids)
        feeds = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        for name, value in feeds.items():
            self._check_shape(self._inputs[name], value.shape)
        self._feeds = feeds
        for name, value in feeds.items():
            self._context.set_shape(name, value.shape)
            self._cuda.upload(self._addresses[name], value, self._stream)

    def _check_shape(self, tensor: EngineTensor, shape: Shape) -> None:
        assert tensor.shapes is not None
        smallest, _, largest = tensor.shapes
        inside = all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=False))
        if len(shape) != len(smallest) or not inside:
            raise BismoothError(
                f"{self.label}: the input '{tensor.name}' of shape {list(shape)} is outside of the engine's profile. "
                f"Expected {list(smallest)} to {list(largest)}. Build it for these sizes with --batch and --sequence."
            )


def _runtime_of(engine: Path, record: EngineRecord) -> Runtime:
    if record.runtime not in RUNTIMES:
        raise BismoothError(
            f"{engine}: expected an engine of {' or '.join(RUNTIMES)}, got one of {record.runtime}. "
            "Build one with 'bismooth build --engine'."
        )
    return RUNTIMES[record.runtime]


def _check_version(engine: Path, record: EngineRecord, runtime: Runtime, version: str) -> None:
    if record.version != version:
        raise BismoothError(
            f"{engine}: it was built with {runtime.title} {record.version}, and runs with no other version. "
            f"Installed is {version}. Install that version, or build the engine again."
        )


def _check_capability(engine: Path, record: EngineRecord, runtime: Runtime, device: Device) -> None:
    """Only ahead-of-time engines name capabilities; the others are checked by TensorRT when they are loaded."""
    if record.capabilities and device.capability not in record.capabilities:
        raise BismoothError(
            f"{engine}: it was built for compute capability {', '.join(map(str, record.capabilities))}. "
            f"This GPU, {device.name}, has {device.capability}. Build the engine with --capability {device.capability}."
        )


def _read_plan(engine: Path, record: EngineRecord) -> bytes:
    try:
        plan = engine.read_bytes()
    except OSError as error:
        raise BismoothError(
            f"{engine}: the engine cannot be read: {error.strerror or error}. Build the engine again."
        ) from error
    digest = hashlib.sha256(plan).hexdigest()
    if digest != record.sha256:
        raise BismoothError(
            f"{engine}: the engine is not the one that was recorded. Expected {record.bytes} bytes with SHA-256 "
            f"{record.sha256[:16]}…, got {len(plan)} bytes with {digest[:16]}…. Build the engine again."
        )
    return plan


def _largest(tensor: EngineTensor) -> Shape:
    assert tensor.shapes is not None
    return tensor.shapes[2]


def _to_float32(logits: NDArray[Any], kind: str) -> Logits:
    if kind == "BF16":
        return (logits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return logits.astype(np.float32, copy=False)
