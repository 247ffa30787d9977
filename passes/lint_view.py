"""A model as the lint rules see it: who computes and reads each value, types and shapes, and the Q/DQ nodes."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from ..export.errors import BismoothError
from ._gs import Array, external_location

T = onnx.TensorProto
FLOAT16, BFLOAT16, FLOAT = int(T.FLOAT16), int(T.BFLOAT16), int(T.FLOAT)
LINEAR = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_MOVES = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Slice"})
_KEEPS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"})
_READABLE = 1 << 22
"""Constants up to this many elements may be read: scales and zero points."""
_STRIPPED = 1 << 10
"""Larger initializers go without their values into shape inference."""


def read_model(path: Path) -> onnx.ModelProto:
    """The model in a file, its external data left where it is.

    Raises:
        BismoothError: No such file, or not an ONNX model.
    """
    try:
        return onnx.ModelProto.FromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise BismoothError(
            f"{path}: cannot be read as an ONNX model. Expected a serialized onnx.ModelProto, got {error}. "
            "Check the path, or export the model again."
        ) from error


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear node.

    Attributes:
        node: The node.
        scale: Its scale, or None where it is not a constant or cannot be read.
        scales: The number of its scales; 1 where it is not known.
        zero_point: Its zero point, or None where there is none or it cannot be read.
        dtype: The quantized type.
        on_weight: Whether it (de)quantizes a constant.
    """

    node: onnx.NodeProto
    scale: Array | None
    scales: int
    zero_point: Array | None
    dtype: int
    on_weight: bool

    @property
    def axis(self) -> int:
        """The axis that scales run along."""
        return int(attribute(self.node, "axis", 1))

    @property
    def block_size(self) -> int:
        """Elements per scale along ``axis``; 0 without blocks."""
        return int(attribute(self.node, "block_size", 0))

    @property
    def is_per_channel(self) -> bool:
        """Whether there are several scales, not in blocks."""
        return self.block_size == 0 and self.scales > 1


@dataclass(frozen=True, eq=False)
class Gemm:
    """A linear operator whose two operands are dequantized."""

    node: onnx.NodeProto
    operands: tuple[Quantizer, Quantizer]


class View:
    """A model and look-ups over it. ``folder`` is where external data lies; unknown for a model that has no file."""

    def __init__(
        self, model: onnx.ModelProto, target: str, capabilities: tuple[int, ...] = (), folder: Path | None = None
    ) -> None:
        self.model = model
        self.target = target
        self.capabilities = capabilities
        self.folder = folder
        self.nodes: Sequence[onnx.NodeProto] = model.graph.node
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.opsets = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
        self.producers: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        for node in self.nodes:
            self.producers.update((value, node) for value in node.output if value)
            for place, value in enumerate(node.input):
                self.readers[value].append((node, place))

    @cached_property
    def inference_error(self) -> str:
        """Why types cannot be inferred; empty if they can."""
        try:
            onnx.shape_inference.infer_shapes(_skeleton(self.model), check_type=True, strict_mode=True)
        except Exception as error:  # it raises several types, none of them public
            return " ".join(str(error).split())
        return ""

    @cached_property
    def types(self) -> dict[str, int]:
        """Element type by value, as recorded or inferred."""
        return {info.name: info.type.tensor_type.elem_type for info in self._infos}

    @cached_property
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Shape by value, as recorded or inferred; None for sizes that are not fixed."""
        found: dict[str, tuple[int | None, ...]] = {}
        for info in self._infos:
            if info.type.tensor_type.HasField("shape"):
                dims = info.type.tensor_type.shape.dim
                found[info.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
        return found

    @cached_property
    def _infos(self) -> list[onnx.ValueInfoProto]:
        graph = self.model.graph
        try:
            graph = onnx.shape_inference.infer_shapes(_skeleton(self.model)).graph
        except Exception:  # a model that is too broken to infer: what it declares must do
            graph = self.model.graph
        made = [onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in graph.initializer]
        return [*graph.value_info, *graph.input, *graph.output, *made]

    def type(self, value: str) -> int:
        """The element type of a value, 0 if unknown."""
        return self.types.get(value, 0)

    def rank(self, value: str) -> int | None:
        """The number of axes of a value, None if unknown."""
        shape = self.shapes.get(value)
        return None if shape is None else len(shape)

    def origin(self, value: str) -> str:
        """The value that this one is a reordering of."""
        seen: set[str] = set()
        while value not in seen and (node := self.producers.get(value)) is not None and node.op_type in _MOVES:
            seen.add(value)
            value = node.input[0]
        return value

    @cached_property
    def constants(self) -> frozenset[str]:
        """Values that depend on no graph input."""
        known = set(self.initializers)
        for node in self.nodes:
            if all(value in known or not value for value in node.input):
                known.update(node.output)
        return frozenset(known)

    def array(self, value: str) -> Array | None:
        """A small constant's values, flattened or cast if the graph does so; None if it is computed or out of reach."""
        node = self.producers.get(value)
        if node is not None and node.op_type in _KEEPS:
            kept = self.array(node.input[0])
            return kept if kept is None or node.op_type != "Cast" else _cast(kept, node)
        tensor = self._tensor(value)
        if tensor is None or int(np.prod(list(tensor.dims), dtype=np.int64)) > _READABLE:
            return None
        if tensor.data_location != T.EXTERNAL:
            return numpy_helper.to_array(tensor)
        return None if self.folder is None else _read_external(tensor, self.folder)

    def _tensor(self, value: str) -> onnx.TensorProto | None:
        node = self.producers.get(value)
        if node is not None and node.op_type == "Constant":
            return next((entry.t for entry in node.attribute if entry.name == "value"), None)
        return self.initializers.get(value)

    @cached_property
    def quantizers(self) -> dict[str, Quantizer]:
        """The Q and DQ nodes by their output, in graph order."""
        return {
            node.output[0]: self._quantizer(node)
            for node in self.nodes
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 1
        }

    def _quantizer(self, node: onnx.NodeProto) -> Quantizer:
        is_quantize = node.op_type == "QuantizeLinear"
        zero_point = node.input[2] if len(node.input) > 2 else ""
        source = self.producers.get(self.origin(node.input[0]))
        data = source.input[0] if source is not None and source.op_type == "QuantizeLinear" else node.input[0]
        return Quantizer(
            node=node,
            scale=self.array(node.input[1]),
            scales=int(np.prod([size or 1 for size in self.shapes.get(node.input[1], ())], dtype=np.int64)),
            zero_point=self.array(zero_point) if zero_point else None,
            dtype=self.type(node.output[0] if is_quantize else node.input[0]),
            on_weight=self.origin(data) in self.constants,
        )

    def dequantizer(self, value: str) -> Quantizer | None:
        """The DequantizeLinear that a value comes from, moved or not."""
        found = self.quantizers.get(self.origin(value))
        return found if found is not None and found.node.op_type == "DequantizeLinear" else None

    def linears(self) -> Iterator[onnx.NodeProto]:
        """The nodes that multiply by a matrix."""
        return (node for node in self.nodes if node.op_type in LINEAR and len(node.input) > 1)

    def integer_gemms(self) -> Iterator[Gemm]:
        """The linear nodes with two dequantized operands, of which at most one is a weight."""
        for node in self.linears():
            first, second = (self.dequantizer(value) for value in node.input[:2])
            if first is not None and second is not None and not (first.on_weight and second.on_weight):
                yield Gemm(node, (first, second))


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


def label(node: onnx.NodeProto) -> str:
    """The name of a node, or a description of one that has none."""
    return node.name or f"{node.op_type} → {', '.join(node.output)}"


def _cast(values: Array, node: onnx.NodeProto) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(onnx.helper.tensor_dtype_to_np_dtype(int(attribute(node, "to", FLOAT))))


def _read_external(tensor: onnx.TensorProto, folder: Path) -> Array | None:
    try:
        place = external_location(tensor, folder)
    except BismoothError:
        return None  # a rule of its own reports it
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = int(np.prod(list(tensor.dims), dtype=np.int64))
    return np.fromfile(place.file, dtype=dtype, count=count, offset=place.offset).reshape(tuple(tensor.dims))


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the values of its larger initializers."""
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    graph = bare.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    for tensor in model.graph.initializer:
        if int(np.prod(list(tensor.dims), dtype=np.int64)) <= _STRIPPED and tensor.data_location != T.EXTERNAL:
            graph.initializer.append(tensor)
        else:
            graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return bare
