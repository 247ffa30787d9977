"""An engine loaded with a TensorRT Python module: its tensors, and an execution context to run it.

One code for ``tensorrt_rtx`` 1.x and ``tensorrt`` 10.x and 11.x, whose run-time APIs are the same but for when kernels
are compiled. ``trt: Any`` is that untyped module, everywhere below.

NOTE: TensorRT keeps the first logger of a process while anything made with it lives, so there is one per module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..export.errors import BismoothError
from .base import Shape
from .tensorrt_runtime import Runtime

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "HALF": np.dtype(np.float16),
    "FLOAT": np.dtype(np.float32),
    "BF16": np.dtype(np.uint16),  # the bits: numpy has no such type
}
_PROFILE = 0


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine.

    Attributes:
        kind: TensorRT's name of the type: ``HALF``, ``INT64``, …
        dtype: what holds it in numpy.
        shapes: of an input, the smallest, the fastest and the largest; of an output ``None``.
    """

    name: str
    kind: str
    dtype: np.dtype[Any]
    shapes: tuple[Shape, Shape, Shape] | None


class EngineContext:
    """A deserialized engine and one execution context, on the current CUDA device. :meth:`close` frees both.

    Args:
        trt: the module of ``runtime``.
        label: the engine's name in messages.
        plan: the engine file's content.

    Raises:
        BismoothError: TensorRT cannot load the engine, or a tensor has a type that cannot be passed.
    """

    def __init__(self, trt: Any, runtime: Runtime, label: str, plan: bytes) -> None:
        self._trt, self._label, self._title = trt, label, f"{runtime.title} {trt.__version__}"
        self._log = _logger(trt)
        self._runtime = self._engine = self._context = None
        try:
            self._open(runtime, plan)
        except BaseException:  # an interrupt too: what was opened is not the garbage collector's to free
            self.close()
            raise

    def _open(self, runtime: Runtime, plan: bytes) -> None:
        self._log.errors.clear()
        self._runtime = self._made("start", self._trt.Runtime(self._log))
        self._engine = self._made("load the engine", self._runtime.deserialize_cuda_engine(plan))
        self._context = self._made("prepare to run the engine", self._create_context(self._engine, runtime))
        self.tensors = tuple(self._tensor(index) for index in range(self._engine.num_io_tensors))

    def _create_context(self, engine: Any, runtime: Runtime) -> Any:
        """TensorRT-RTX compiles kernels where it runs: by default while slower ones run, here before the first run."""
        if not runtime.ahead_of_time:
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
        return engine.create_execution_context(config)

    def _tensor(self, index: int) -> EngineTensor:
        engine: Any = self._engine
        name: str = engine.get_tensor_name(index)
        kind: str = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise BismoothError(
                f"{self._label}: '{name}' has type {kind}. Expected one of {', '.join(_DTYPES)}. "
                "Export the model with inputs and outputs of these types."
            )
        if engine.get_tensor_mode(name) != self._trt.TensorIOMode.INPUT:
            return EngineTensor(name, kind, _DTYPES[kind], None)
        smallest, fastest, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, _PROFILE))
        return EngineTensor(name, kind, _DTYPES[kind], (smallest, fastest, largest))

    def set_shape(self, name: str, shape: Shape) -> None:
        """Say which shape the input has in the next run.

        Raises:
            BismoothError: the engine does not take it.
        """
        self._done(f"take the input '{name}' with shape {list(shape)}", self._live().set_input_shape(name, shape))

    def shape(self, name: str) -> Shape:
        """The tensor's shape in the next run.

        Raises:
            BismoothError: it does not follow from the shapes of the inputs.
        """
        shape = tuple(self._live().get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise BismoothError(
                f"{self._label}: the shape of '{name}' is {list(shape)}, which depends on values. "
                "Expected one that follows from the inputs' shapes. Export the model again."
            )
        return shape

    def bind(self, name: str, address: int) -> None:
        """Say where on the device the tensor lies."""
        self._done(f"take an address for '{name}'", self._live().set_tensor_address(name, address))

    def execute(self, stream: int) -> None:
        """Start a run on ``stream``.

        Raises:
            BismoothError: TensorRT refuses. Errors of kernels arrive when the stream is synchronized.
        """
        self._done("run the engine", self._live().execute_async_v3(stream))

    def close(self) -> None:
        """Free the context, then the engine, then the runtime."""
        self._context = None
        self._engine = None
        self._runtime = None

    def _live(self) -> Any:
        assert self._context is not None, "closed"
        return self._context

    def _made(self, task: str, made: Any) -> Any:
        self._done(task, made is not None)
        return made

    def _done(self, task: str, success: bool) -> None:
        if not success:
            reasons = "; ".join(dict.fromkeys(self._log.errors)).rstrip(".") or "it gives no reason"
            raise BismoothError(
                f"{self._label}: {self._title} cannot {task}: {reasons}. "
                "Build the engine again on this host, and check with nvidia-smi that the GPU has free memory."
            )
        self._log.errors.clear()


@cache
def _logger(trt: Any) -> Any:
    """Keeps ``errors``, from any thread, and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message.strip())

    return Logger()
