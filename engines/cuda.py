"""The CUDA runtime of this machine: its GPU, device memory and streams.

A typed facade over ``cuda.bindings.runtime`` (package ``cuda-python``), whose functions return a status and results:
every status is checked. Addresses and streams are plain integers, as TensorRT takes them.

NOTE: on a machine without a driver, version 12 of the package raises ``RuntimeError`` from every function, while
version 13 returns cudaErrorInsufficientDriver and says that the driver's version is 0.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError

_MODULE = "cuda.bindings.runtime"
_INSTALL = "Install it with: pip install cuda-python (part of bismooth[tensorrt] and bismooth[tensorrt-rtx])"
_NO_DRIVER = "there is no NVIDIA driver on this machine"


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        capability: compute capability, ``86`` for SM86.
    """

    index: int
    name: str
    capability: int


class CudaRuntime:
    """The functions of CUDA that running an engine takes. All raise :class:`BismoothError` with CUDA's error name.

    Args:
        runtime: the module ``cuda.bindings.runtime``.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def device(self, index: int = 0) -> Device:
        """Device ``index``, among those that CUDA_VISIBLE_DEVICES leaves."""
        properties = self._call("cudaGetDeviceProperties", index)
        name = bytes(properties.name).partition(b"\0")[0].decode("utf-8", "replace")
        return Device(index, name, 10 * properties.major + properties.minor)

    def use(self, index: int) -> None:
        """Make device ``index`` the one that this thread allocates and runs on."""
        self._call("cudaSetDevice", index)

    def malloc(self, size: int) -> int:
        """The address of ``size`` bytes of device memory."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def clear(self, address: int, size: int, stream: int) -> None:
        """Start setting ``size`` bytes of device memory to zero."""
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def create_stream(self) -> int:
        return int(self._call("cudaStreamCreate"))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all that ``stream`` was given; errors of kernels arrive here."""
        self._call("cudaStreamSynchronize", stream)

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        """Start copying ``source`` (contiguous) to the device; it must stay until the stream is synchronized."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(target, _address(source), source.nbytes, kind, stream)

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        """Start copying into ``target`` (contiguous) from the device; it is there once the stream is synchronized."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(_address(target), source, target.nbytes, kind, stream)

    def _copy(self, target: int, source: int, size: int, kind: Any, stream: int) -> None:
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        """The function's result, or the one object it has.

        Raises:
            BismoothError: its status is not success.
        """
        status, results = self._raw(function, *arguments)
        if status is not None:
            raise BismoothError(
                f"CUDA: {function} failed: {self._describe(status)}. Expected cudaSuccess. {_advice(status)}"
            )
        return results[0] if results else None

    def _raw(self, function: str, *arguments: Any) -> tuple[Any, tuple[Any, ...]]:
        """The status, ``None`` for success, and the results."""
        try:
            status, *results = getattr(self._runtime, function)(*arguments)
        except RuntimeError as error:
            raise BismoothError(f"CUDA: {function} failed: {error}. Expected a working NVIDIA driver.") from error
        return (None, tuple(results)) if int(status) == 0 else (status, ())

    def _describe(self, status: Any) -> str:
        """CUDA's name of the error, with its text."""
        _, text = self._runtime.cudaGetErrorString(status)
        return f"{status.name} ({bytes(text).decode('utf-8', 'replace')})"

    def unavailable(self) -> str | None:
        """Why there is no GPU to use, or ``None`` if there is one."""
        try:
            status, results = self._raw("cudaGetDeviceCount")
        except BismoothError:
            return _NO_DRIVER
        name = None if status is None else status.name
        if name == "cudaErrorInsufficientDriver":
            return self._driver_reason()
        if name == "cudaErrorNoDevice" or (name is None and not results[0]):
            return "there is no NVIDIA GPU on this machine, or CUDA_VISIBLE_DEVICES hides it"
        return None if status is None else f"CUDA cannot start: {self._describe(status)}"

    def _driver_reason(self) -> str:
        driver, needed = (int(self._call(f"cuda{which}GetVersion")) for which in ("Driver", "Runtime"))
        if not driver:
            return _NO_DRIVER
        return (
            f"the NVIDIA driver is for CUDA {_version(driver)}, but the installed cuda-python is for "
            f"{_version(needed)}; update the driver, or run: pip install 'cuda-python<{needed // 1000}'"
        )


def load_cuda() -> CudaRuntime:
    """The CUDA runtime, with a GPU to use.

    Raises:
        BismoothError: the package ``cuda-python``, the driver or a GPU is missing.
    """
    found = _find()
    if isinstance(found, str):
        raise BismoothError(f"CUDA: {found}. Expected a host with an NVIDIA GPU.")
    return found


def cuda_available() -> str | None:
    """Why no GPU can be used here, as a phrase without a full stop; ``None`` if one can."""
    found = _find()
    return found if isinstance(found, str) else None


def _find() -> CudaRuntime | str:
    try:
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if not _MODULE.startswith(error.name or "-"):
            return f"cuda-python cannot be loaded: {error}"
        return f"it needs an NVIDIA GPU and cuda-python, and cuda-python is not installed. {_INSTALL}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"cuda-python cannot be loaded: {error}"
    runtime = CudaRuntime(module)
    return runtime.unavailable() or runtime


def _address(array: NDArray[Any]) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("expected a contiguous array")
    return int(np.asarray(array).ctypes.data)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _advice(status: Any) -> str:
    if status.name == "cudaErrorMemoryAllocation":
        return "The GPU's memory is full: end other programs on it, or build for a smaller batch and sequence."
    return "Check the GPU with nvidia-smi; after a failed kernel this process cannot use it any more."
