"""A typed face for onnx-graphsurgeon, which has no types of its own.

NOTE: nothing else in the package imports onnx-graphsurgeon. A weight that lives in a file is held by
``FileValues``: it knows its folder, so that a read finds the file whatever the working directory, and saving
the graph writes the reference, never the bytes.
"""

import math
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

from ..export.errors import BismoothError
from ..export.read_ahead import read_blocks, read_columns, read_rows

_gs: Any = onnx_graphsurgeon
_gs.logger.G_LOGGER.severity = _gs.logger.G_LOGGER.ERROR  # it warns of every bfloat16 value on stdout
_LazyValues: Any = _gs.ir.tensor.LazyValues

Array = NDArray[Any]
Dim = int | str | None
"""A size, the name of a symbolic dimension, or None where the file does not say."""


class Tensor(Protocol):
    """A value of the graph: a variable, or a constant that may not have been read yet."""

    name: str
    inputs: MutableSequence["Node"]
    outputs: MutableSequence["Node"]

    def is_empty(self) -> bool:
        """Whether this stands for an optional input or output that was left out."""
        ...


class Node(Protocol):
    """An operation; assigning to ``inputs`` or ``outputs`` keeps the tensors' lists in step."""

    op: str
    name: str
    domain: str | None
    attrs: dict[str, Any]
    inputs: MutableSequence[Tensor]
    outputs: MutableSequence[Tensor]


class Graph(Protocol):
    """A graph whose ``nodes`` are in topological order."""

    name: str
    opset: int
    nodes: MutableSequence[Node]
    inputs: MutableSequence[Tensor]
    outputs: MutableSequence[Tensor]

    def copy(self) -> "Graph":
        """A copy with its own nodes and tensors; values of constants are shared."""
        ...

    def cleanup(self) -> "Graph":
        """Remove the nodes that no output needs."""
        ...


class FileValues(_LazyValues):
    """The values of a constant whose bytes stay in a file of ``folder``."""

    def __init__(self, tensor: onnx.TensorProto, folder: Path) -> None:
        super().__init__(tensor)  # pyright: ignore[reportUnknownMemberType]
        self.proto = tensor
        self.folder = folder

    def load(self) -> Array:
        """Read the bytes: one array of the tensor's own type (``ml_dtypes`` for bfloat16)."""
        place = external_location(self.proto, self.folder)
        data = np.fromfile(place.file, dtype=np.uint8, count=place.size, offset=place.offset)
        if self.proto.data_type in _PACKED_BITS:
            packed = onnx.TensorProto(dims=self.proto.dims, data_type=self.proto.data_type, raw_data=data.tobytes())
            return onnx.numpy_helper.to_array(packed)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.proto.data_type)
        return cast(Array, data.view(dtype).reshape(tuple(self.proto.dims)))

    def load_pieces(self, elements: int) -> Iterator[Array]:
        """The same, flat, so many elements at a time; each piece overwrites the one before."""
        if self.proto.data_type in _PACKED_BITS:
            yield self.load().reshape(-1)
            return
        place = external_location(self.proto, self.folder)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.proto.data_type)
        for block in read_blocks(place.file, place.offset, place.size, elements * dtype.itemsize):
            yield block.view(dtype)

    def load_rows(self, rows: NDArray[np.intp]) -> Array:
        """Some rows of a matrix, or elements of a vector."""
        if self.proto.data_type in _PACKED_BITS:
            return self.load()[rows]
        place = external_location(self.proto, self.folder)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.proto.data_type)
        shape = tuple(self.proto.dims[1:])
        found = read_rows(place.file, place.offset, math.prod(shape) * dtype.itemsize, rows)
        return found.view(dtype).reshape(len(rows), *shape)

    def load_columns(self, columns: slice) -> Array:
        """Some columns of a matrix."""
        if self.proto.data_type in _PACKED_BITS:
            return self.load()[:, columns]
        place = external_location(self.proto, self.folder)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.proto.data_type)
        size = dtype.itemsize
        shape = (self.proto.dims[0], self.proto.dims[1] * size)
        return read_columns(place.file, place.offset, shape, slice(columns.start * size, columns.stop * size)).view(
            dtype
        )


@dataclass(frozen=True)
class ExternalLocation:
    """Where the bytes of an external tensor are: checked to lie inside the file and the folder."""

    file: Path
    offset: int
    size: int


_PACKED_BITS: dict[int, int] = {
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
}
"""Types of which several elements share a byte."""


def external_location(tensor: onnx.TensorProto, folder: Path) -> ExternalLocation:
    """Where the bytes of an external tensor are.

    Raises:
        BismoothError: The reference leaves the folder, or the file is missing, too short, or of another size.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    file = folder / location
    if not location or not file.resolve().is_relative_to(folder.resolve()):
        raise BismoothError(
            f"{tensor.name}: its data is outside the model's folder. Expected a file in {folder}, "
            f"got {location!r}. Put the data file next to the model."
        )
    if not file.is_file():
        raise BismoothError(
            f"{tensor.name}: its data file is missing. Expected {PurePosixPath(location)} in {folder}, got nothing. "
            "Copy the weight files along with the model."
        )
    size = _byte_size(tensor)
    offset, length = (entries.get(key, default) for key, default in (("offset", "0"), ("length", str(size))))
    available = file.stat().st_size - int(offset) if offset.isdecimal() else -1
    if length != str(size) or available < size:
        raise BismoothError(
            f"{tensor.name}: its data does not fit. Expected {size} bytes for shape {list(tensor.dims)}, got {length} "
            f"at offset {offset} of {location} ({file.stat().st_size} bytes). The file is truncated or not this "
            "model's: export again."
        )
    return ExternalLocation(file, int(offset), size)


def _byte_size(tensor: onnx.TensorProto) -> int:
    bits = _PACKED_BITS.get(tensor.data_type)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-bits * math.prod(tensor.dims) // 8)


def import_model(model: onnx.ModelProto) -> Graph:
    """The graph of a model; no weight is read."""
    return cast(Graph, _gs.import_onnx(model))


def export_model(graph: Graph) -> onnx.ModelProto:
    """The model of a graph; constants that were not read stay references."""
    return cast(onnx.ModelProto, _gs.export_onnx(graph))


def make_graph(nodes: Sequence[Node], inputs: Sequence[Tensor], outputs: Sequence[Tensor], like: Graph) -> Graph:
    """A graph of these nodes with the opsets and the version of another one."""
    source = cast(Any, like)
    return cast(
        Graph,
        _gs.Graph(
            nodes=list(nodes),
            inputs=list(inputs),
            outputs=list(outputs),
            name=source.name,
            opset=source.opset,
            import_domains=source.import_domains,
            ir_version=source.ir_version,
        ),
    )


def make_node(
    op: str,
    name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    attrs: Mapping[str, Any] | None = None,
    domain: str | None = None,
) -> Node:
    """A node; it still has to be put into the graph's ``nodes``."""
    return cast(
        Node,
        _gs.Node(op=op, name=name, attrs=dict(attrs or {}), inputs=list(inputs), outputs=list(outputs), domain=domain),
    )


def empty_tensor() -> Tensor:
    """What stands for an optional input or output that is left out."""
    return cast(Tensor, _gs.Variable.empty())


def import_domain(graph: Graph, domain: str, version: int) -> None:
    """Declare the operators of another domain than ONNX's own."""
    others = [entry for entry in cast(Any, graph).import_domains or () if entry.domain != domain]
    cast(Any, graph).import_domains = [*others, onnx.helper.make_opsetid(domain, version)]


def make_variable(name: str, dtype: np.dtype[Any] | None, shape: Sequence[Dim] | None) -> Tensor:
    """A value that a node will produce."""
    return cast(Tensor, _gs.Variable(name, dtype=dtype, shape=None if shape is None else list(shape)))


def make_constant(name: str, values: Array) -> Tensor:
    """A constant that is stored inside the model file."""
    return cast(Tensor, _gs.Constant(name, values=np.ascontiguousarray(values).reshape(values.shape)))


def make_external(name: str, dtype: np.dtype[Any], shape: Sequence[int], file: Path, offset: int) -> Tensor:
    """A constant whose bytes are in ``file`` from byte ``offset`` on; the file may be written later."""
    length = int(np.prod(list(shape), dtype=np.int64)) * dtype.itemsize
    proto = onnx.TensorProto(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(dtype),
        dims=list(shape),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", file.name), ("offset", str(offset)), ("length", str(length))):
        proto.external_data.add(key=key, value=value)
    return cast(Tensor, _gs.Constant(name, values=FileValues(proto, file.parent)))


def copy_tensor(tensor: Tensor) -> Tensor:
    """The tensor without its nodes; the values of a constant are shared, not read."""
    return cast(Tensor, cast(Any, tensor).copy())


def copy_node(node: Node, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Node:
    """The node between other tensors."""
    return cast(Node, cast(Any, node).copy(inputs=list(inputs), outputs=list(outputs)))


def set_type(tensor: Tensor, dtype: np.dtype[Any] | None, shape: Sequence[Dim] | None) -> None:
    """Record the type of a variable; None where it is not known."""
    variable = cast(Any, tensor)
    variable.dtype, variable.shape = dtype, None if shape is None else list(shape)


def is_constant(tensor: Tensor) -> bool:
    """Whether the tensor is an initializer."""
    return isinstance(tensor, _gs.Constant)


def bind_folder(tensor: Tensor, folder: Path) -> None:
    """Make an external constant remember the folder its file is in."""
    constant = cast(Any, tensor)
    proto = external_proto(tensor)
    if proto is not None:
        constant.values = FileValues(proto, folder)


def external_proto(tensor: Tensor) -> onnx.TensorProto | None:
    """The reference of a constant whose bytes are in a file, else None."""
    values = getattr(tensor, "_values", None)
    if not isinstance(values, _LazyValues):
        return None
    proto = cast(Any, values).tensor
    if not isinstance(proto, onnx.TensorProto) or proto.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return proto


def read(tensor: Tensor) -> Array:
    """The values of a constant; those in files are read anew on each call, so that nothing is kept in memory."""
    values = cast(Any, tensor)._values
    return cast(Array, values.load() if isinstance(values, _LazyValues) else values)


def read_pieces(tensor: Tensor, elements: int = 1 << 22) -> Iterator[Array]:
    """The values of a constant in row-major order, flat, so many elements at a time; files are read on the way.

    Pieces are to be read only, and before the next one is there: it may overwrite them.
    """
    values = cast(Any, tensor)._values
    if isinstance(values, FileValues):
        yield from values.load_pieces(elements)
        return
    flat = read(tensor).reshape(-1)
    for start in range(0, flat.size, elements):
        yield flat[start : start + elements]


def read_rows_of(tensor: Tensor, rows: NDArray[np.intp]) -> Array:
    """Some rows of a constant, in this order; no others are read."""
    values = cast(Any, tensor)._values
    return values.load_rows(rows) if isinstance(values, FileValues) else read(tensor)[rows]


def read_columns_of(tensor: Tensor, columns: slice) -> Array:
    """Some columns of a constant matrix; no others are read."""
    values = cast(Any, tensor)._values
    return values.load_columns(columns) if isinstance(values, FileValues) else read(tensor)[:, columns]


def to_constant(tensor: Tensor, source: Tensor) -> None:
    """Turn a variable into a constant with the (unread) values of another constant."""
    tensor.inputs.clear()
    cast(Any, tensor).to_constant(cast(Any, source)._values)


def dtype_of(tensor: Tensor) -> np.dtype[Any] | None:
    """The element type, ``ml_dtypes`` for those that numpy lacks, or None where the file does not say."""
    dtype: Any = cast(Any, tensor).dtype
    if dtype is None:
        return None
    return onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else np.dtype(dtype)


def shape_of(tensor: Tensor) -> tuple[Dim, ...] | None:
    """The recorded shape, symbolic dimensions by name, or None where the file does not say."""
    shape: Any = cast(Any, tensor).shape
    return None if shape is None else tuple(cast("Sequence[Dim]", shape))
