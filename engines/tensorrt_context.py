"""An engine loaded with a TensorRT Python module: its tensors, and execution contexts to run it.

One code for ``tensorrt_rtx`` 1.x and ``tensorrt`` 10.x and 11.x, whose run-time APIs are the same but for when kernels
are compiled. ``trt: Any`` is that untyped module, everywhere below.

NOTE: TensorRT keeps the first logger of a process while anything made with it lives, so there is one per module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True)
class Jit:
    """How TensorRT-RTX makes the kernels of a context, which it compiles for each new shape where it runs.

    Attributes:
        eager: before the first run of a shape, which then is slow; otherwise slower kernels run meanwhile.
        replay: capture the kernels of a shape as a CUDA graph, so that later runs are launched at once.
        kernels: an ``IRuntimeCache`` with kernels that need not be compiled again.
    """

    eager: bool = True
    replay: bool = False
    kernels: Any = None


class LoadedEngine:
    """A deserialized engine on the current CUDA device. :meth:`close` frees it, with the contexts made from it.

    Args:
        trt: the module of ``runtime``.
        label: the engine's name in messages.
        plan: the engine file's content.

    Raises:
        BismoothError: TensorRT cannot load the engine, or a tensor has a type that cannot be passed.
    """

    def __init__(self, trt: Any, runtime: Runtime, label: str, plan: bytes) -> None:
        self._trt, self._label, self._title = trt, label, f"{runtime.title} {trt.__version__}"
        self._ahead_of_time = runtime.ahead_of_time
        self._log = _logger(trt)
        self._runtime = self._engine = None
        self._contexts: list[EngineContext] = []
        try:
            self._open(plan)
        except BaseException:  # an interrupt too: what was opened is not the garbage collector's to free
            self.close()
            raise

    def _open(self, plan: bytes) -> None:
        self._log.errors.clear()
        self._runtime = self.made("start", self._trt.Runtime(self._log))
        self._engine = self.made("load the engine", self._runtime.deserialize_cuda_engine(plan))
        self.tensors = tuple(self._tensor(index) for index in range(self._engine.num_io_tensors))

    def context(self, profile: int = 0, stream: int = 0, jit: Jit | None = None) -> EngineContext:
        """A context that runs shapes of the optimization profile of this number.

        Args:
            stream: on which a profile other than the first is set.
            jit: how TensorRT-RTX compiles kernels where it runs; by default :class:`Jit`'s defaults.

        Raises:
            BismoothError: TensorRT cannot make it.
        """
        made = self.made("prepare to run the engine", self._create_context(jit or Jit()))
        context = EngineContext(self, self._label, made)
        self._contexts.append(context)
        if profile:
            self.done(f"choose profile {profile}", made.set_optimization_profile_async(profile, stream))
        return context

    def _create_context(self, jit: Jit) -> Any:
        engine: Any = self._engine
        if not self._ahead_of_time:
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if jit.eager else strategies.LAZY
        if jit.replay:
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if jit.kernels is not None:
            config.set_runtime_cache(jit.kernels)
        return engine.create_execution_context(config)

    def kernel_cache(self) -> Any:
        """An empty ``IRuntimeCache``, of compiled kernels; ``None`` of a runtime that compiles nothing when it runs."""
        engine: Any = self._engine
        return engine.create_runtime_config().create_runtime_cache() if self._ahead_of_time else None

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
        smallest, fastest, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
        return EngineTensor(name, kind, _DTYPES[kind], (smallest, fastest, largest))

    def close(self) -> None:
        """Free the contexts, then the engine, then the runtime."""
        for context in self._contexts:
            context.close()
        self._contexts.clear()
        self._engine = None
        self._runtime = None

    def made(self, task: str, made: Any) -> Any:
        """``made``; raises :class:`BismoothError` with what TensorRT logged if it is ``None``."""
        self.done(task, made is not None)
        return made

    def done(self, task: str, success: bool) -> None:
        """Raise :class:`BismoothError` with what TensorRT logged unless ``success``."""
        if not success:
            reasons = "; ".join(dict.fromkeys(self._log.errors)).rstrip(".") or "it gives no reason"
            raise BismoothError(
                f"{self._label}: {self._title} cannot {task}: {reasons}. "
                "Build the engine again on this host, and check with nvidia-smi that the GPU has free memory."
            )
        self._log.errors.clear()


class EngineContext:
    """An execution context, made by :meth:`LoadedEngine.context`: shapes and addresses of one run after another."""

    def __init__(self, engine: LoadedEngine, label: str, context: Any) -> None:
        self._engine, self._label, self._context = engine, label, context

    def set_shape(self, name: str, shape: Shape) -> None:
        """Say which shape the input has in the next run.

        Raises:
            BismoothError: the engine does not take it.
        """
        self._engine.done(
            f"take the input '{name}' with shape {list(shape)}", self._live().set_input_shape(name, shape)
        )

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
        self._engine.done(f"take an address for '{name}'", self._live().set_tensor_address(name, address))

    def execute(self, stream: int) -> None:
        """Start a run on ``stream``.

        Raises:
            BismoothError: TensorRT refuses. Errors of kernels arrive when the stream is synchronized.
        """
        self._engine.done("run the engine", self._live().execute_async_v3(stream))

    def close(self) -> None:
        self._context = None

    def _live(self) -> Any:
        assert self._context is not None, "closed"
        return self._context


def to_float32(values: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """The numbers of a tensor of this kind, as they came from the device."""
    if kind == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


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
