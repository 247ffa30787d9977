"""Open an engine file where it is to run: everything that is checked before TensorRT touches it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from .base import EngineRecord
from .cuda import CudaRuntime, Device, load_cuda
from .publish import read_record
from .tensorrt_context import LoadedEngine
from .tensorrt_runtime import RUNTIMES, Runtime, load_module


@dataclass(frozen=True)
class EngineFile:
    """An engine that fits its record, the installed runtime and a GPU of this machine, in memory but not loaded."""

    label: str
    record: EngineRecord
    runtime: Runtime
    trt: Any
    cuda: CudaRuntime
    device: Device
    plan: bytes

    def load(self) -> LoadedEngine:
        """Load it onto the current CUDA device; raises as :class:`.tensorrt_context.LoadedEngine`."""
        return LoadedEngine(self.trt, self.runtime, self.label, self.plan)


def open_engine(engine: Path, device: int = 0) -> EngineFile:
    """Read an engine that ``bismooth build`` wrote, for a GPU among those that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        BismoothError: the engine does not fit the record beside it, the installed runtime or the GPU, or there is no
            GPU to use.
    """
    record = read_record(engine)
    runtime = _runtime_of(engine, record)
    trt = load_module(runtime)
    _check_version(engine, record, runtime, trt.__version__)
    cuda = load_cuda()
    gpu = cuda.device(device)
    _check_capability(engine, record, gpu)
    return EngineFile(str(engine), record, runtime, trt, cuda, gpu, _read_plan(engine, record))


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


def _check_capability(engine: Path, record: EngineRecord, device: Device) -> None:
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
