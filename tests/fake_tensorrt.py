"""A stand-in for the modules ``tensorrt`` and ``tensorrt_rtx`` that records how it is driven."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

LISTING = (
    "Layers:\n"
    "Name: fc_kernel, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,256], Datatype: Int8 }], "
    "Constants: [ { Name: w, Dimensions: [256,256], Datatype: Int8 }], "
    "Outputs: [ { Name: y, Dimensions: [-1,256], Datatype: Half }], TacticName: , StreamId: 0, "
    "Metadata: [ONNX Layer: fc/MatMul]\n"
)
NO_GPU = "CUDA initialization failure with error: 35. Please check your CUDA installation."


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    VERBOSE = 4


class Logger:
    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    VERBOSE = Severity.VERBOSE

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class Monitor:
    """What ``IProgressMonitor`` is; the builder calls its three methods."""


class Capability(IntEnum):
    NONE = 0
    CURRENT = 1
    SM75 = 75
    SM86 = 86
    SM89 = 89


class NetworkFlag(IntEnum):
    STRONGLY_TYPED = 1


class Input:
    """A network input; dimensions are sizes, names or ``None``."""

    def __init__(self, name: str, *dimensions: int | str | None) -> None:
        self.name = name
        self.shape = tuple(size if isinstance(size, int) else -1 for size in dimensions)
        self._dimensions = dimensions

    def get_dimension_name(self, axis: int) -> str | None:
        name = self._dimensions[axis]
        return name if isinstance(name, str) else None


@dataclass
class ParserError:
    text: str
    node: str = ""
    operator: str = ""
    kind: str = "ErrorCode.UNSUPPORTED_NODE"

    def desc(self) -> str:
        return self.text

    def node_name(self) -> str:
        return self.node

    def node_operator(self) -> str:
        return self.operator

    def code(self) -> str:
        return self.kind


@dataclass
class Fake:
    """The module. ``calls`` are the calls and assignments that matter, in order.

    Attributes:
        version: of the module.
        listing: what the builder logs about its kernels; empty for nothing.
        gpu: whether there is one.
        plan: the engine; ``None`` for a build that fails.
        errors: logged as errors by the parser if it fails, else by the build.
        parser_errors: of a graph that cannot be parsed.
        inspected: what the engine inspector says; ``None`` for an engine that cannot be loaded.
    """

    version: str
    listing: str = LISTING
    gpu: bool = True
    plan: bytes | None = b"plan"
    errors: tuple[str, ...] = ()
    parser_errors: tuple[ParserError, ...] = ()
    inputs: tuple[Input, ...] = (Input("x", "batch", "sequence", 256),)
    outputs: int = 1
    inspected: str | None = LISTING
    profile_index: int = 0
    calls: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]])

    ILogger = Logger
    IProgressMonitor = Monitor
    NetworkDefinitionCreationFlag = NetworkFlag
    ComputeCapability = Capability
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    LayerInformationFormat = SimpleNamespace(ONELINE="oneline")

    @property
    def __version__(self) -> str:
        return self.version

    def call(self, *what: Any, result: Any = None) -> Any:
        self.calls.append(what)
        return result

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def Builder(self, logger: Any) -> _Builder:
        if not self.gpu:
            logger.log(Severity.ERROR, NO_GPU)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return _Builder(self, logger)

    def OnnxParser(self, network: Any, logger: Any) -> _Parser:
        return _Parser(self, logger)

    def Runtime(self, logger: Any) -> _Runtime:
        return _Runtime(self)


@dataclass
class _Network:
    fake: Fake

    @property
    def num_inputs(self) -> int:
        return len(self.fake.inputs)

    @property
    def num_outputs(self) -> int:
        return self.fake.outputs

    def get_input(self, index: int) -> Input:
        return self.fake.inputs[index]


@dataclass
class _Builder:
    fake: Fake
    logger: Any

    def create_network(self, flags: int) -> _Network:
        return self.fake.call("create_network", flags, result=_Network(self.fake))

    def create_builder_config(self) -> _Config:
        return _Config(self.fake)

    def create_optimization_profile(self) -> _Profile:
        return _Profile(self.fake)

    def build_serialized_network(self, network: _Network, config: Any) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        assert monitor.step_complete("Building engine", 0)
        monitor.phase_start("Compiling", "Building engine", 3)
        monitor.phase_finish("Compiling")
        for error in self.fake.errors:
            self.logger.log(Severity.ERROR, error)
        if self.fake.listing:
            self.logger.log(Severity.VERBOSE, self.fake.listing)
        return self.fake.plan


@dataclass
class _Profile:
    fake: Fake

    def set_shape(self, *arguments: Any) -> None:
        self.fake.call("set_shape", *arguments)


@dataclass
class _Parser:
    fake: Fake
    logger: Any

    @property
    def num_errors(self) -> int:
        return len(self.fake.parser_errors)

    def get_error(self, index: int) -> ParserError:
        return self.fake.parser_errors[index]

    def parse_from_file(self, path: str) -> bool:
        self.fake.call("parse_from_file", path)
        return self._parsed()

    def parse(self, model: bytes, path: str) -> bool:
        self.fake.call("parse", model, path)
        return self._parsed()

    def _parsed(self) -> bool:
        for error in self.fake.errors if self.num_errors else ():
            self.logger.log(Severity.ERROR, error)
        return not self.num_errors


@dataclass
class _Runtime:
    """The runtime, the engine and the inspector in one."""

    fake: Fake

    def deserialize_cuda_engine(self, plan: Any) -> _Runtime | None:
        return self.fake.call("deserialize", plan, result=None if self.fake.inspected is None else self)

    def create_engine_inspector(self) -> _Runtime:
        return self

    def get_engine_information(self, form: str) -> str:
        return self.fake.call("inspect", form, result=self.fake.inspected)


class _Config:
    """Records every attribute that is set and every method that is called."""

    def __init__(self, fake: Fake) -> None:
        object.__setattr__(self, "_fake", fake)

    def __setattr__(self, name: str, value: Any) -> None:
        self._fake.call("set", name, value)
        object.__setattr__(self, name, value)

    def set_compute_capability(self, capability: Capability, index: int) -> None:
        self._fake.call("set_compute_capability", capability, index)

    def add_optimization_profile(self, profile: Any) -> int:
        return self._fake.call("add_optimization_profile", profile, result=self._fake.profile_index)

    _fake: Fake
