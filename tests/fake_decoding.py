"""A stand-in for running engines with caches: an engine's plan is the ONNX graph that it was built from.

A context computes when the stream runs, from and to where its tensors are bound, with the shapes that it had when it
was started. What a real engine leaves undefined fails: shapes outside of the profile, a cache whose input and output
are not one buffer, keys that are NaN, kernels that are let go of before the context that uses them.
"""

from __future__ import annotations

import ctypes
import json
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
import pytest
from numpy.typing import NDArray

from bismooth.engines import tensorrt_open
from bismooth.engines.base import Caches, Profile, Shape, Shapes, Span, shapes_from_json, shapes_to_json
from bismooth.engines.cuda import CudaRuntime
from bismooth.engines.inplace_caches import update_in_place
from bismooth.engines.kept_logits import keep_logits
from bismooth.engines.tensorrt import TENSORRT, TENSORRT_RTX
from tests.cached_model import cached_model
from tests.fake_cuda import FakeCuda
from tests.fake_engine import FakeTensorRT, Mode, write_engine
from tests.fake_tensorrt import Severity

CAPACITY, ROWS, LONGEST = 16, 3, 6
"""Positions of a row; most rows; longest sequence that runs at once."""

_TYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
}


def write_decoding_engine(
    folder: Path, *, window: int | None = None, half: bool = False, fewest: int = 1, shortest: int = 1, **changes: Any
) -> Path:
    """An engine of :func:`.cached_model.cached_model`, with its record.

    Args:
        fewest: rows; :data:`ROWS` are the most.
        shortest: sequence of the profile for prompts; :data:`LONGEST` is the longest.
        changes: of the record.
    """
    model = cached_model(window=window, half=half)
    aliases = update_in_place(model, CAPACITY, "model.onnx")
    keep_logits(model)
    rows = Span(fewest, fewest, ROWS)
    prompts = _shapes(model, Profile(rows, Span(shortest, LONGEST, LONGEST), {"kept": Span(1, 1, LONGEST)}))
    tokens = _shapes(model, Profile(rows, Span(1, 1, 1), {"kept": Span(1, 1, 1)}))
    model.metadata_props.add(key="profiles", value=json.dumps([shapes_to_json(prompts), shapes_to_json(tokens)]))
    caches = Caches(CAPACITY, aliases, {name: shapes for name, shapes in tokens.items() if shapes != prompts[name]})
    return write_engine(folder, model.SerializeToString(), **{"shapes": prompts, "caches": caches, **changes})


def _shapes(model: onnx.ModelProto, profile: Profile) -> Shapes:
    dims = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    return {
        name: profile.shapes(name, tuple(d.dim_param or d.dim_value for d in sizes)) for name, sizes in dims.items()
    }


def install(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda | None = None, **options: Any) -> FakeCuda:
    """Put stand-ins in place of CUDA and TensorRT; ``options`` are those of :class:`FakeDecodingTensorRT`."""
    fake = cuda or FakeCuda()
    trt = FakeDecodingTensorRT(fake, **options)
    monkeypatch.setattr(tensorrt_open, "load_cuda", lambda: CudaRuntime(fake))
    monkeypatch.setattr(tensorrt_open, "load_module", {TENSORRT: trt, TENSORRT_RTX: trt}.__getitem__)
    return fake


class Strategy(IntEnum):
    LAZY = 0
    EAGER = 1
    WHOLE_GRAPH_CAPTURE = 2


class FakeDecodingTensorRT(FakeTensorRT):
    """The module.

    Args:
        kernels: what its ``IRuntimeCache`` serializes to; ``None`` if that fails.
        options: as :class:`FakeTensorRT`; also ``profile`` can fail.
    """

    DynamicShapesKernelSpecializationStrategy = Strategy
    CudaGraphStrategy = Strategy

    def __init__(self, cuda: FakeCuda, kernels: bytes | None = b"kernels", **options: Any) -> None:
        super().__init__(cuda, **options)
        self.kernels = kernels
        self.contexts = 0

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=partial(_Engine, self))

    def refuse(self, reason: str) -> bool:
        self.logger.log(Severity.ERROR, reason)
        return False


class _Engine:
    def __init__(self, trt: FakeDecodingTensorRT, plan: bytes) -> None:
        self.trt = trt
        runtime: Any = onnxruntime
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # it warns of every cache that it copies
        self.session = runtime.InferenceSession(plan, options)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        values = (*self.session.get_inputs(), *self.session.get_outputs())
        self.types = {value.name: _TYPES[value.type] for value in values}
        self.fixed: dict[str, list[int | str]] = {value.name: value.shape for value in values}
        (profiles,) = onnx.ModelProto.FromString(plan).metadata_props
        self.profiles = [shapes_from_json(shapes) for shapes in json.loads(profiles.value)]
        self.num_io_tensors = len(self.types)

    def get_tensor_name(self, index: int) -> str:
        return list(self.types)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.types[name][0])

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        return self.profiles[profile][name]

    def create_runtime_config(self) -> _Config:
        return _Config(self.trt)

    def create_execution_context(self, config: _Config | None = None) -> _Context | None:
        self.trt.call("create context", config.settings if config else None)
        return _Context(self, config) if self.trt.works("context") else None


class _Config:
    def __init__(self, trt: FakeDecodingTensorRT) -> None:
        self._trt = trt
        self.kernels: _Kernels | None = None

    @property
    def settings(self) -> dict[str, str]:
        return {name: value.name for name, value in vars(self).items() if isinstance(value, Strategy)}

    def create_runtime_cache(self) -> _Kernels:
        return _Kernels(self._trt)

    def set_runtime_cache(self, kernels: _Kernels) -> None:
        self.kernels = kernels


class _Kernels:
    """``IRuntimeCache``. The contexts that use it keep no reference to it."""

    def __init__(self, trt: FakeDecodingTensorRT) -> None:
        self._trt = trt

    def deserialize(self, content: bytes) -> bool:
        self._trt.call("deserialize kernels", content)
        return True

    def serialize(self) -> memoryview | None:
        return None if self._trt.kernels is None else memoryview(self._trt.kernels)

    def __del__(self) -> None:
        self._trt.call("end of kernels", self._trt.contexts)


class _Context:
    def __init__(self, engine: _Engine, config: _Config | None) -> None:
        self._engine, self._trt = engine, engine.trt
        self._profile = 0
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._trt.contexts += 1

    def __del__(self) -> None:
        self._trt.contexts -= 1

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream in self._trt.cuda.streams
        self._profile = profile
        self._shapes.clear()
        return self._trt.works("profile")

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self._trt.call("set shape", name, shape)
        smallest, _, largest = self._engine.profiles[self._profile][name]
        if not all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)):
            return self._trt.refuse(f"{name} {shape} is outside of profile {self._profile}.")
        self._shapes[name] = shape
        return self._trt.works("shape")

    def get_tensor_shape(self, name: str) -> Shape:
        if name in self._shapes:
            return self._shapes[name]
        known = {"batch": self._shapes["input_ids"][0], "kept": self._shapes["logits_at"][0]}
        return tuple(known[size] if isinstance(size, str) else size for size in self._engine.fixed[name])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return self._trt.works("bind")

    def execute_async_v3(self, stream: int) -> bool:
        shapes = {name: self._shapes[name] for name in self._engine.inputs}
        self._trt.call("execute", self._profile, *shapes["input_ids"])
        self._trt.cuda.enqueue(stream, lambda: self._run(shapes))
        return self._trt.works("execute")

    def _run(self, shapes: dict[str, Shape]) -> None:
        feeds = {name: self._read(name, shape) for name, shape in shapes.items()}
        ends = feeds["write_indices"] + shapes["input_ids"][1]
        assert (ends <= CAPACITY).all(), "wrote past the end of the caches"
        results: list[NDArray[Any]] = self._engine.session.run(None, feeds)
        for name, result in zip(self._engine.outputs, results, strict=True):
            past = name.replace("present", "past_key_values")
            if past != name:
                assert self._addresses[name] == self._addresses[past], "a cache is two buffers"
                assert not np.isnan(feeds[past]).any(), "a cache was not cleared"
            data = np.ascontiguousarray(result).tobytes()
            assert len(data) <= len(self._trt.cuda.bytes_at(self._addresses[name])), (
                "wrote past the end of device memory"
            )
            ctypes.memmove(self._addresses[name], data, len(data))

    def _read(self, name: str, shape: Shape) -> NDArray[Any]:
        dtype = np.dtype(self._engine.types[name][1])
        size = int(np.prod(shape)) * dtype.itemsize
        assert size <= len(self._trt.cuda.bytes_at(self._addresses[name])), "read past the end of device memory"
        return np.frombuffer(ctypes.string_at(self._addresses[name], size), dtype).reshape(shape)
