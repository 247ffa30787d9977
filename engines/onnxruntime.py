"""Run ONNX graphs in ONNX Runtime: token ids in, logits or any named values out.

A session runs in a thread of its own, where subnormal numbers are zero (``subnormals``).

NOTE: where ONNX Runtime's default INT8 kernels saturate (``integer_kernels``), they are wrong by several percent. Mode
"int8" sets ``session.x64quantprecision=1`` there, which is exact, and up to six times slower for long prompts.
NOTE: run FP32 graphs on the CPU. It upcasts FP16 graphs and then does not fuse their Q/DQ nodes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..export.cores import default_threads
from ..export.errors import BismoothError
from .integer_kernels import products_saturate
from .memory import return_freed_memory, return_large_blocks
from .subnormals import flush_subnormals
from .token_feeds import Port, token_feeds

Mode = Literal["int8", "reference", "plain"]
Provider = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]
_Result = TypeVar("_Result")

#: Session settings by mode: integer kernels (more in :func:`entries_of`), their float reference, ONNX Runtime's own.
#: "reference" computes every Q and DQ as the float function of its definition. Where a blocked DQ becomes MatMulNBits,
#: the CPU kernel would quantize the activations unless its accuracy level is 1.
MODES: Mapping[Mode, Mapping[str, str]] = {
    "int8": {"session.qdq_matmulnbits_accuracy_level": "1"},
    "reference": {
        "session.disable_quant_qdq": "1",
        "session.disable_double_qdq_remover": "1",
        "session.qdq_matmulnbits_accuracy_level": "1",
    },
    "plain": {},
}
PROVIDERS: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_LOAD_ADVICE = {
    True: "Expected a complete artifact folder with its weight files. Make the artifact again.",
    False: "Check that the provider's libraries are installed, or use the provider 'cpu'.",
}
#: Operators that must not end up on the CPU when a GPU was asked for. Shape arithmetic belongs there.
_COMPUTE = frozenset({"Attention", "Conv", "Gemm", "LayerNormalization", "MatMul", "RMSNormalization", "Softmax"})
#: Copies of weights in float32; and fusions across the residual stream, where a graph may be cut: a piece must compute
#: what it does in the whole graph, to the last bit.
_NOT_LEAN = ("ConstantFolding", "SkipLayerNormFusion", "MatMulScaleFusion")
#: Distributions that all install the module ``onnxruntime``.
_PACKAGES = tuple(f"onnxruntime{kind}" for kind in ("", "-gpu", "-trt-rtx", "-directml", "-openvino", "-rocm", "-qnn"))
_DTYPES = {
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
}


class _Port(Protocol):
    name: str
    type: str
    shape: list[int | str | None]


class _InferenceSession(Protocol):
    def get_inputs(self) -> list[_Port]: ...
    def get_outputs(self) -> list[_Port]: ...
    def get_providers(self) -> list[str]: ...
    def get_provider_graph_assignment_info(self) -> list[Any]: ...
    def run(
        self, output_names: list[str], input_feed: dict[str, NDArray[Any]], run_options: Any
    ) -> list[NDArray[Any]]: ...
    def io_binding(self) -> Any: ...
    def run_with_iobinding(self, iobinding: Any, run_options: Any) -> None: ...


@dataclass(frozen=True)
class InMemoryGraph:
    """A serialized ONNX graph that was never written: ``folder`` holds its external data, ``name`` is for messages."""

    name: str
    data: bytes
    folder: Path


class Session:
    """A graph loaded into ONNX Runtime; a context manager, which frees the memory on exit.

    Args:
        model: an ONNX file, or a graph in memory.
        mode: "int8" runs Q/DQ patterns on exact integer kernels, "reference" as float fake-quantization, "plain" sets
            nothing.
        provider: where to run. Another one than the CPU never falls back to it silently.
        threads: threads per operator; one per core by default (lean: :func:`..export.cores.default_threads`).
        spinning: let threads wait actively for the next operator. Many short runs are faster by a third, and all else
            on the machine is slower.
        lean: take as little memory as can be: nothing is computed ahead of a run or kept behind it. Weights are mapped
            from their files, and float32 copies of narrower ones live as long as the operator that reads them; except
            in mode "int8", nodes run one by one as they stand in the file.
        values: names of inner values to offer as further outputs (needs the package ``onnx``).

    Raises:
        BismoothError: ONNX Runtime is missing or installed twice, the provider cannot be used, or the graph cannot be
            loaded.
    """

    def __init__(
        self,
        model: Path | InMemoryGraph,
        *,
        mode: Mode = "int8",
        provider: Provider = "cpu",
        threads: int | None = None,
        spinning: bool = False,
        lean: bool = False,
        values: Sequence[str] = (),
    ) -> None:
        self.label = str(model) if isinstance(model, Path) else model.name
        runtime = import_onnxruntime()
        graph = _with_values(model, values) if values else model
        options = _session_options(runtime, graph, mode, provider, threads, spinning=spinning, lean=lean)
        _check_available(runtime, provider)
        make = partial(
            runtime.InferenceSession,
            str(graph) if isinstance(graph, Path) else graph.data,
            options,
            providers=[PROVIDERS[provider]],
            enable_fallback=0,
            disabled_optimizers=list(_NOT_LEAN) if lean else [],
        )
        if lean:
            return_large_blocks()
        self._thread = ThreadPoolExecutor(1, f"onnxruntime {self.label}", flush_subnormals)
        with ExitStack() as stack:
            stack.callback(self._thread.shutdown, wait=False)
            try:
                session: _InferenceSession = self._thread.submit(make).result()
            except Exception as error:  # ONNX Runtime's exceptions have no public base class
                raise BismoothError(
                    f"{self.label}: ONNX Runtime cannot load the graph: {reason_of(error)} "
                    f"{_LOAD_ADVICE[provider == 'cpu']}"
                ) from error
            _check_placement(session, provider)
            stack.pop_all()
        self._run_options = runtime.RunOptions
        self._session: _InferenceSession | None = session
        self.inputs = tuple(_port(port) for port in session.get_inputs())
        self.outputs = tuple(_port(port) for port in session.get_outputs())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the graph and its weights, once what runs is done; running is an error from then on."""
        self._thread.shutdown()
        self._session = None
        return_freed_memory()

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Values by name: those in ``outputs``, or all outputs of the graph. Threads that call it take turns.

        Raises:
            BismoothError: a feed is missing or has a wrong name, dtype or shape, or an operator failed.
        """
        names = [port.name for port in self.outputs] if outputs is None else list(outputs)
        values = self._run(lambda session, options: session.run(names, dict(feeds), options), feeds)
        return dict(zip(names, values, strict=True))

    def bind(self) -> Any:
        """An ``IOBinding`` for :meth:`run_bound`: inputs and outputs in buffers of the caller."""
        return self._open().io_binding()

    def run_bound(self, binding: Any, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Bind ``feeds`` too and run; the outputs are where they were bound.

        Raises:
            BismoothError: as :meth:`run` does.
        """
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        self._run(lambda session, options: session.run_with_iobinding(binding, options), feeds)

    def _open(self) -> _InferenceSession:
        if self._session is None:
            raise BismoothError(f"{self.label}: the session was closed. Run it inside its 'with' block.")
        return self._session

    def _run(self, call: Callable[[_InferenceSession, Any], _Result], feeds: Mapping[str, NDArray[Any]]) -> _Result:
        """Call ONNX Runtime in the session's thread."""
        session, options = self._open(), self._run_options()
        options.log_severity_level = 4
        running = self._thread.submit(call, session, options)
        try:
            return running.result()
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            shapes = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in feeds.items())
            raise BismoothError(
                f"{self.label}: ONNX Runtime failed: {reason_of(error)} It was fed: {shapes or 'nothing'}. "
                f"Expected: {', '.join(f'{p.name} {p.dtype} {list(p.shape)}' for p in self.inputs)}."
            ) from error
        except BaseException:  # an interrupt, which the run would hold up
            options.terminate = True
            wait([running])  # it ends after the present operator, and writes into buffers of the caller until then
            raise

    def token_feeds(
        self, ids: NDArray[np.int64], others: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Feeds for token ids [B, S] without padding, for every input that language models have, and ``others``.

        Raises:
            BismoothError: the graph has an input that token ids do not determine.
        """
        return token_feeds(self.label, self.inputs, ids, others)

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [B, S, V], float32, of token ids [B, S] without padding."""
        name = self.outputs[0].name
        return self.run(self.token_feeds(ids), [name])[name].astype(np.float32, copy=False)

    def windows(self, ids: NDArray[np.int64], batch_size: int = 1) -> Iterator[NDArray[np.float32]]:
        """Logits [B, S, V] of ``ids`` [N, S], in order, ``batch_size`` windows at a time."""
        for start in range(0, len(ids), batch_size):
            yield self.logits(ids[start : start + batch_size])


def import_onnxruntime() -> Any:
    """The module ``onnxruntime``.

    Raises:
        BismoothError: it is not installed, or two packages that overwrite each other provide it.
    """
    found = [name for name in _PACKAGES if _installed(name)]
    if len(found) > 1:
        raise BismoothError(
            f"onnxruntime: {' and '.join(found)} are both installed and overwrite each other's files. Expected one. "
            f"Run 'pip uninstall {' '.join(found)}' and install the one you need."
        )
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BismoothError(
            f"onnxruntime: cannot be imported ({error}). "
            "Run 'pip install bismooth[runtime]', or bismooth[gpu] on a machine with an NVIDIA GPU."
        ) from error


def entries_of(runtime: Any, mode: Mode, provider: Provider = "cpu") -> dict[str, str]:
    """Session settings of a mode, on a CPU those that it needs."""
    if provider == "cpu" and mode == "int8" and products_saturate(runtime):
        return {**MODES[mode], "session.x64quantprecision": "1"}
    return dict(MODES[mode])


def _installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _session_options(
    runtime: Any,
    model: Path | InMemoryGraph,
    mode: Mode,
    provider: Provider,
    threads: int | None,
    *,
    spinning: bool,
    lean: bool,
) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions; do not print them as well
    options.intra_op_num_threads = threads or (default_threads() if lean else 0)
    # In the order of the file: by default the branches to further outputs come last and keep what they read alive.
    options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
    entries = entries_of(runtime, mode, provider) | {
        "session.intra_op.allow_spinning": str(int(spinning)),
        "session.set_denormal_as_zero": "1",  # in the operators' threads; ``flush_subnormals`` does it in the session's
    }
    if lean:
        # By default memory that was freed is kept for later values of the same shape, in further blocks.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = options.enable_mem_reuse = False
        entries["session.disable_prepacking"] = "1"
        if mode != "int8":  # which its fusions make
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if isinstance(model, InMemoryGraph):
        entries["session.model_external_initializers_file_folder_path"] = str(model.folder)
    if provider != "cpu":
        entries["session.record_ep_graph_assignment_info"] = "1"
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def _with_values(model: Path | InMemoryGraph, values: Sequence[str]) -> InMemoryGraph:
    from .subgraph import add_outputs, load_graph, parse_graph

    if isinstance(model, Path):
        proto, folder, name = load_graph(model), model.parent, str(model)
    else:
        proto, folder, name = parse_graph(model.data, model.name), model.folder, model.name
    add_outputs(proto, values)
    return InMemoryGraph(name, proto.SerializeToString(), folder)


def _check_available(runtime: Any, provider: Provider) -> None:
    available: list[str] = runtime.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise BismoothError(
            f"onnxruntime: this build has no {PROVIDERS[provider]}. It has: {', '.join(available)}. Install "
            f"{'onnxruntime-trt-rtx' if provider == 'tensorrt-rtx' else 'bismooth[gpu]'} instead of onnxruntime, "
            "or use the provider 'cpu'."
        )


def _check_placement(session: _InferenceSession, provider: Provider) -> None:
    """Refuse a session that computes on the CPU though a GPU was asked for."""
    if provider == "cpu":
        return
    expected, used = PROVIDERS[provider], session.get_providers()
    if used[0] != expected:
        raise BismoothError(
            f"onnxruntime: {expected} could not be started and ONNX Runtime fell back to {used[0]}; its messages above "
            "say why. Install the CUDA libraries that this build needs and check the driver, or use the provider 'cpu'."
        )
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == PROVIDERS["cpu"]]
    stray = [node for part in parts for node in part.get_nodes() if node.op_type in _COMPUTE]
    if stray:
        raise BismoothError(
            f"onnxruntime: {expected} puts {len(stray)} nodes on the CPU, first {stray[0].name} ({stray[0].op_type}). "
            "Expected none. Use a newer onnxruntime-gpu, or the provider 'cpu'."
        )


def _port(port: _Port) -> Port:
    return Port(port.name, _DTYPES.get(port.type), tuple(port.shape))


def reason_of(error: Exception) -> str:
    """ONNX Runtime's message without its prefix and line breaks, closed by a full stop."""
    text = " ".join(str(error).split())
    return text.removeprefix("[ONNXRuntimeError] : ").rstrip(".") + "."
