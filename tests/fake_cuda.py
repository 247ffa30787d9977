"""A stand-in for the module ``cuda.bindings.runtime``: device memory that is real memory, and streams that run late.

New memory is full of NaN, whatever the float type.

What is given to a stream runs when the stream is synchronized, and not before: code that reads results too early, or
lets go of memory that a copy still needs, fails its test.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorUnknown = 999


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class FakeCuda:
    """The module. ``calls`` are the calls that matter, in order; :attr:`memory` and :attr:`streams` what is not freed.

    Args:
        capability: of every device.
        devices: how many there are.
        failing: function name → the status it returns from then on.
        driver: version of the driver's CUDA, 0 for no driver.
    """

    cudaMemcpyKind = Kind

    def __init__(
        self,
        capability: int = 89,
        devices: int = 1,
        failing: dict[str, Status] | None = None,
        driver: int = 13040,
        name: bytes = b"NVIDIA Test\0\0\0",
    ) -> None:
        self.capability, self.devices, self.driver, self.name = capability, devices, driver, name
        self.failing = dict(failing or {})
        self.calls: list[tuple[Any, ...]] = []
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.freed = 0
        self.device: int | None = None

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    @property
    def names(self) -> list[str]:
        return [str(call[0]) for call in self.calls]

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        self.streams[stream].append(work)

    def bytes_at(self, address: int) -> Any:
        """The whole allocation at ``address``, as an array of bytes that can be written."""
        return self.memory[address]

    def _answer(self, name: str, *arguments: Any, result: Any = None) -> tuple[Any, ...]:
        self.calls.append((name, *arguments))
        if status := self.failing.get(name):
            return (status, None) if result is not None else (status,)
        return (Status.cudaSuccess,) if result is None else (Status.cudaSuccess, result)

    def cudaGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        return Status.cudaSuccess, f"text of {int(status)}".encode()

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self._answer("cudaGetDeviceCount", result=self.devices)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return self._answer("cudaDriverGetVersion", result=self.driver)

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return self._answer("cudaRuntimeGetVersion", result=13040)

    def cudaGetDeviceProperties(self, index: int) -> tuple[Any, ...]:
        major, minor = divmod(self.capability, 10)
        properties = SimpleNamespace(name=self.name, major=major, minor=minor)
        return self._answer("cudaGetDeviceProperties", index, result=properties)

    def cudaSetDevice(self, index: int) -> tuple[Any, ...]:
        self.device = index
        return self._answer("cudaSetDevice", index)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        buffer = (ctypes.c_char * size).from_buffer(bytearray(b"\xff" * size))
        address = ctypes.addressof(buffer)
        answer = self._answer("cudaMalloc", size, result=address)
        if answer[0] is Status.cudaSuccess:
            self.memory[address] = buffer
        return answer

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        del self.memory[address]
        self.freed += 1
        return self._answer("cudaFree", address)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        answer = self._answer("cudaStreamCreate", result=1000 + len(self.streams))
        if answer[0] is Status.cudaSuccess:
            self.streams[answer[1]] = []
        return answer

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        assert not self.streams.pop(stream), "destroyed a stream that had work to do"
        return self._answer("cudaStreamDestroy", stream)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        work, self.streams[stream] = self.streams[stream], []
        for item in work:
            item()
        return self._answer("cudaStreamSynchronize", stream)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Kind, stream: int) -> tuple[Any, ...]:
        device = target if kind is Kind.cudaMemcpyHostToDevice else source
        assert size <= len(self.memory[device]), "copied past the end of device memory"
        answer = self._answer("cudaMemcpyAsync", kind.name, size, stream)
        if answer[0] is Status.cudaSuccess:
            self.enqueue(stream, lambda: self._copy(target, source, size))
        return answer

    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: int) -> tuple[Any, ...]:
        assert size <= len(self.memory[target]), "cleared past the end of device memory"
        answer = self._answer("cudaMemsetAsync", value, size, stream)
        if answer[0] is Status.cudaSuccess:
            self.enqueue(stream, lambda: self._set(target, value, size))
        return answer

    @staticmethod
    def _set(target: int, value: int, size: int) -> None:
        ctypes.memset(target, value, size)

    @staticmethod
    def _copy(target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)
