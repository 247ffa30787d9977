"""A stand-in for running engines with ``tensorrt`` or ``tensorrt_rtx``: engines compute in :class:`FakeCuda`'s memory.

An engine's logits are a table's rows for its token ids. It reads them from where its inputs are bound and writes to
where its output is bound, when the stream runs; its end is recorded among the calls of CUDA, to show the order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bismooth.engines.audit import Audit
from bismooth.engines.base import EngineRecord, Shape
from bismooth.engines.publish import publish
from bismooth.export.hashing import file_sha256
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import Logger, Severity

VOCAB = 5
PROFILE = ((1, 2), (1, 4), (2, 6))
TABLE = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float16)


class Mode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class FakeTensorRT:
    """The module.

    Args:
        cuda: where engines compute.
        version: of the module.
        kinds: type of each tensor; the last is the output.
        failing: what does not work: ``deserialize``, ``context``, ``shape``, ``bind``, ``execute``.
        static: the output's shape follows from those of the inputs.
        noise: plan → how wrong its logits are.
    """

    ILogger = Logger
    TensorIOMode = Mode
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    ComputeCapability = SimpleNamespace(__members__={"SM75": 75, "SM86": 86, "SM89": 89, "CURRENT": 0})

    def __init__(
        self,
        cuda: FakeCuda,
        version: str = "1.7.1",
        kinds: Mapping[str, str] | None = None,
        failing: str = "",
        static: bool = True,
        noise: Callable[[bytes], float] = lambda plan: 0.0,
        table: NDArray[np.float16] = TABLE,
    ) -> None:
        self.__version__ = version
        self.cuda, self.failing, self.static, self.noise, self.table = cuda, failing, static, noise, table
        self.kinds = dict(kinds or {"input_ids": "INT64", "attention_mask": "INT32", "logits": "HALF"})
        self.profile = PROFILE
        self.logger: Any = None

    def call(self, *what: Any) -> None:
        self.cuda.calls.append(what)

    def works(self, step: str) -> bool:
        if step == self.failing:
            self.logger.log(Severity.VERBOSE, "not of interest")
            self.logger.log(Severity.ERROR, f"{step} is broken.")
        return step != self.failing

    def Runtime(self, logger: Any) -> _Runtime:
        self.logger = logger
        return _Runtime(self)


class _Tracked:
    """Records its end."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt

    def __del__(self) -> None:
        self.trt.call(f"end of {type(self).__name__}")


class _Runtime(_Tracked):
    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        self.trt.call("deserialize", len(plan))
        return _Engine(self.trt, plan) if self.trt.works("deserialize") else None


class _Engine(_Tracked):
    def __init__(self, trt: FakeTensorRT, plan: bytes) -> None:
        super().__init__(trt)
        self.plan = plan
        self.num_io_tensors = len(trt.kinds)

    def get_tensor_name(self, index: int) -> str:
        return list(self.trt.kinds)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.trt.kinds[name])

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.OUTPUT if name == list(self.trt.kinds)[-1] else Mode.INPUT

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Shape]:
        assert profile == 0
        return list(self.trt.profile)

    def create_runtime_config(self) -> Any:
        return SimpleNamespace()

    def create_execution_context(self, config: Any = None) -> _Context | None:
        self.trt.call("create context", vars(config) if config else None)
        return _Context(self.trt, self.plan) if self.trt.works("context") else None


class _Context(_Tracked):
    def __init__(self, trt: FakeTensorRT, plan: bytes) -> None:
        super().__init__(trt)
        self.plan = plan
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self.trt.call("set shape", name, shape)
        self.shapes[name] = shape
        return self.trt.works("shape")

    def get_tensor_shape(self, name: str) -> Shape:
        if name in self.shapes:
            return self.shapes[name]
        return (*next(iter(self.shapes.values())), VOCAB if self.trt.static else -1)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.trt.works("bind")

    def execute_async_v3(self, stream: int) -> bool:
        self.trt.call("execute", stream)
        assert set(self.addresses) == set(self.trt.kinds)
        self.trt.cuda.enqueue(stream, self._run)
        return self.trt.works("execute")

    def _run(self) -> None:
        ids = self._read("input_ids", np.int64)
        if "attention_mask" in self.trt.kinds:
            assert (self._read("attention_mask", np.int32) == 1).all()
        name = list(self.trt.kinds)[-1]
        logits = self.trt.table[ids] + np.float16(self.trt.noise(self.plan)) * np.sin(
            np.arange(VOCAB), dtype=np.float16
        )
        kind = self.trt.kinds[name]
        if kind == "BF16":
            bits = (logits.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            bits = logits.astype(np.float32 if kind == "FLOAT" else np.float16)
        data = np.ascontiguousarray(bits).tobytes()
        assert len(data) <= len(self.trt.cuda.bytes_at(self.addresses[name])), "wrote past the end of device memory"
        ctypes.memmove(self.addresses[name], data, len(data))

    def _read(self, name: str, dtype: type[Any]) -> NDArray[Any]:
        size = int(np.prod(self.shapes[name])) * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(self.addresses[name], size), dtype).reshape(self.shapes[name])


def write_engine(folder: Path, content: bytes = b"plan", **changes: Any) -> Path:
    """An engine file with its record, of TensorRT-RTX for SM86 and SM89 if not said otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / "staged"
    staged.write_bytes(content)
    plain = EngineRecord("tensorrt-rtx", "1.7.1", (86, 89), {}, len(content), file_sha256(staged), {})
    publish(staged, folder / "model.engine", replace(plain, **changes), Audit({}, 0, 0, 0))
    return folder / "model.engine"
