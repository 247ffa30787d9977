"""Read which kernels an engine consists of from the text that TensorRT prints about it.

At VERBOSE severity and profiling verbosity DETAILED, the builder of TensorRT-RTX 1.7 logs a message like (shortened)::

    Layers:
    Name: q_proj/MatMul_myl0_2, LayerType: gemm, Inputs: [ { Name: h, Dimensions: [-1,256], Datatype: Int8, … }],
      Constants: [ { Name: w, Dimensions: [256,512], Datatype: Int8, … }], Outputs: [ … ],
      TacticName: …, StreamId: 0, Metadata: [ONNX Layer: q_proj/MatMul]␟[ONNX Layer: q_proj/DequantizeLinear]

with one line per kernel and 0x1f (␟) between metadata entries. TensorRT 8.6 to 10 print the same lines without
``Constants`` (they follow the activations in ``Inputs``), with ``Format/Datatype`` for ``Datatype``, and with 0x1e or
nothing between metadata entries.

The kernels of all optimization profiles are listed together. Those of the second and later ones have ONNX names and
tensors that end in ``[profile 1]``, or stand in one graph (``_myl1_2``: the third kernel of graph 1) with some that do.

NOTE: the format is not documented. Whatever does not parse is an error, never an engine with fewer kernels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..export.errors import BismoothError

HEADER = "Layers:"
_KERNEL = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>| .*? \})\]"
    r"(?:, Constants: \[(?P<constants>| .*? \})\])?, Outputs: \[(?P<outputs>| .*? \})\], (?:.*?, )?"
    r"Tactic(?:Name|Value): .*?Metadata: ?(?P<metadata>.*)"
)
_TENSOR = re.compile(
    r"\{ Name: (.*?),(?: Location: \w+,)? Dimensions: \[([-\d,]*)\],.*?Datatype: ([^,}]+?)(?:,.*?)? \}"
)
_PROFILE = re.compile(r" \[profile (\d+)\]")
_GRAPH = re.compile(r"_myl(\d+)_\d+$")
_ENTRY_END = re.compile(r"[\x1e\x1f]|(?<=\])(?=\[ONNX Layer: )")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*)\]")
_DRIFT = "This TensorRT version may print it differently; please report it with the log."
_TYPES = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8"}


@dataclass(frozen=True)
class Tensor:
    """An operand of a kernel: ``shape`` with -1 for dynamic sizes, ``type`` by TensorRT's name (``Int8``, ``Half``)."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def size(self) -> int:
        """Number of elements; 0 if a size is dynamic."""
        return 0 if -1 in self.shape else prod(self.shape)


@dataclass(frozen=True)
class Kernel:
    """One line of the listing.

    Attributes:
        kind: TensorRT's LayerType.
        nodes: the ONNX nodes the kernel came from.
        profile: number of the optimization profile that it runs for.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]
    profile: int = 0

    @property
    def weight(self) -> Tensor | None:
        """The largest constant but scalars; without any, the largest input of fixed size but the first."""
        constants = [constant for constant in self.constants if constant.size > 1]
        return max(constants or self.inputs[1:], key=lambda operand: operand.size, default=None)


def has_listing(log: str) -> bool:
    """Whether the text holds a listing of kernels."""
    return f"{HEADER}\n" in log


def read_kernels(log: str) -> tuple[Kernel, ...]:
    """The kernels of the engine that ``log`` is about (of the last one, if it lists several).

    Raises:
        BismoothError: there is no listing, it is empty, a line of it cannot be read, or no kernel names an ONNX node.
    """
    if not has_listing(log):
        raise BismoothError(
            f"audit: the builder's log ({log.count(chr(10))} lines) has no '{HEADER}' listing. "
            f"Expected one kernel per line at verbosity DETAILED. {_DRIFT}"
        )
    lines = tuple(_listing(log))
    kernels = tuple(
        replace(_read_kernel(line), profile=profile) for line, profile in zip(lines, _profiles(lines), strict=True)
    )
    if not kernels:
        raise BismoothError(
            f"audit: the '{HEADER}' listing in the builder's log is empty. Expected one line per kernel."
        )
    if not any(kernel.nodes for kernel in kernels):
        raise BismoothError(
            f"audit: none of the {len(kernels)} kernels in the builder's log names an ONNX node. "
            f"Expected metadata like '[ONNX Layer: name]'. {_DRIFT}"
        )
    return kernels


def _listing(log: str) -> Iterator[str]:
    """The lines between the last header and the blank line after it."""
    for line in log.rpartition(f"{HEADER}\n")[2].split("\n"):
        if not line.strip():
            return
        yield line


def _profiles(lines: Sequence[str]) -> list[int]:
    """The optimization profile of each line."""
    graphs = [_graph(line) for line in lines]
    named = [int(match[1]) if (match := _PROFILE.search(line)) else 0 for line in lines]
    of_graph = dict[str, int]()
    for graph, profile in zip(graphs, named, strict=True):
        of_graph[graph] = max(of_graph.get(graph, 0), profile)
    return [of_graph[graph] if graph else profile for graph, profile in zip(graphs, named, strict=True)]


def _graph(line: str) -> str:
    """The graph of a kernel whose name tells it."""
    match = _GRAPH.search(line.partition(", LayerType: ")[0])
    return match[1] if match else ""


def _read_kernel(line: str) -> Kernel:
    match = _KERNEL.fullmatch(line)
    if match is None:
        raise _unreadable(line, "Expected 'Name: …, LayerType: …, Inputs: […], …, Metadata: …'")
    inputs, constants, outputs = (_read_tensors(line, match[part] or "") for part in ("inputs", "constants", "outputs"))
    return Kernel(match["name"], match["kind"], inputs, constants, outputs, _read_nodes(line, match["metadata"]))


def _read_tensors(line: str, text: str) -> tuple[Tensor, ...]:
    found = [_tensor(*groups) for groups in _TENSOR.findall(text)]
    if len(found) != text.count("{ Name: "):
        raise _unreadable(line, "Expected every tensor as '{ Name: …, Dimensions: […], …, Datatype: … }'")
    return tuple(found)


def _tensor(name: str, dimensions: str, datatype: str) -> Tensor:
    """Types come as ``Half`` or inside a phrase such as ``Row major linear FP16 format``."""
    named = next((name for word, name in _TYPES.items() if word in datatype), datatype)
    return Tensor(name, tuple(int(size) for size in dimensions.split(",") if size), named)


def _read_nodes(line: str, metadata: str) -> tuple[str, ...]:
    entries = [entry for entry in _ENTRY_END.split(metadata.strip(" ")) if entry]
    matches = [_ONNX_LAYER.fullmatch(entry) for entry in entries]
    if not all(matches):
        raise _unreadable(line, "Expected metadata entries '[ONNX Layer: …]'")
    return tuple(match[1] for match in matches if match)


def _unreadable(line: str, expected: str) -> BismoothError:
    return BismoothError(
        f"audit: a line of the kernel listing in the builder's log cannot be read. {expected}, got {line[:300]!r}. "
        f"{_DRIFT}"
    )
