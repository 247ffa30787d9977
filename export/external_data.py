"""The files that the weights of an ONNX model lie in: which they are, and whether they may be used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import tensor_dtype_to_np_dtype

from ._onnx import load_proto
from .errors import BismoothError


@dataclass(frozen=True)
class Extent:
    """Bytes of a file: its name as the model gives it, and where in it they are."""

    location: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def load_model(path: Path) -> ModelProto:
    """The model in an ONNX file, its external data left where it is.

    Raises:
        BismoothError: the file is no ONNX.
    """
    try:
        return load_proto(path)
    except Exception as error:  # protobuf's DecodeError, and onnx's own
        raise BismoothError(f"{path}: not an ONNX file ({str(error).strip().splitlines()[0]}).") from error


def weight_files(path: Path) -> dict[str, Path]:
    """The files of external data of an ONNX file, sorted, by their paths in its folder.

    Raises:
        BismoothError: as :func:`load_model` and :func:`check_locations`.
    """
    return check_locations(path, find_locations(load_model(path), path))


def find_locations(model: ModelProto, path: Path) -> dict[str, int]:
    """Paths of external data as the model in the file ``path`` names them, and the bytes it needs of each.

    Raises:
        BismoothError: a tensor's place in its file cannot be.
    """
    locations: dict[str, int] = {}
    for tensor in external_tensors(model):
        extent = find_extent(path, tensor)
        locations[extent.location] = max(extent.end, locations.get(extent.location, 0))
    return locations


def check_locations(path: Path, locations: dict[str, int]) -> dict[str, Path]:
    """The files of ``locations`` (as of :func:`find_locations`), sorted, by their paths in the folder of ``path``.

    Raises:
        BismoothError: one lies outside of the folder, is missing, or cut off.
    """
    files = {_plain(location): _data_file(path, location, end) for location, end in locations.items()}
    return dict(sorted(files.items()))


def external_tensors(model: ModelProto) -> list[TensorProto]:
    """The tensors whose values lie in other files, those of subgraphs, functions and nodes' attributes included."""
    nodes = (node for function in model.functions for node in function.node)
    tensors = (*_in_graph(model.graph), *_in_nodes(nodes))
    return [tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]


def _in_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for subgraph in (attribute.g, *attribute.graphs):
            yield from _in_graph(subgraph)


def find_extent(path: Path, tensor: TensorProto) -> Extent:
    """Where an external tensor of the model in the file ``path`` lies.

    Raises:
        BismoothError: its place in its file cannot be.
    """
    info = {entry.key: entry.value for entry in tensor.external_data}
    try:
        needed = math.ceil(math.prod(tensor.dims) * _bits(tensor.data_type) / 8)
        offset, length = int(info.get("offset", 0)), int(info.get("length", needed))
    except (KeyError, ValueError):
        offset = length = needed = -1
    if min(offset, length, *tensor.dims) < 0 or length < needed:
        raise BismoothError(
            f"{path}: the external data of tensor {tensor.name} cannot be: {list(tensor.dims)} of type "
            f"{tensor.data_type}, offset {info.get('offset', 0)}, length {info.get('length')}. Export the model again."
        )
    return Extent(info.get("location", ""), offset, length)


def _bits(data_type: int) -> int:
    """Bits per element; ``KeyError`` or ``ValueError`` if ONNX has no such type."""
    name = cast(Any, TensorProto.DataType).Name(data_type)
    if name.endswith("INT2"):
        return 2
    return 4 if name.endswith(("INT4", "FLOAT4E2M1")) else 8 * tensor_dtype_to_np_dtype(data_type).itemsize


def _plain(location: str) -> str:
    """Without ``.`` and doubled slashes: two names of one file become the same."""
    return PurePosixPath(location).as_posix()


def _data_file(path: Path, location: str, end: int) -> Path:
    """The file of external data, after checking that it may be used; one with a name outside is not looked at."""
    plain = PurePosixPath(location)
    data = path.parent / plain
    inside = bool(plain.parts) and not plain.is_absolute() and ".." not in plain.parts
    try:
        if not inside or not data.resolve().is_relative_to(path.parent.resolve()):
            raise BismoothError(
                f"{path}: its external data {location!r} is outside the model's folder. "
                "Expected a file beside the model, named without '..'."
            )
        if not data.is_file():
            raise BismoothError(f"{path}: its external data {location!r} is missing. Expected {data}.")
        size = data.stat().st_size
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, no permission; links in a circle
        raise BismoothError(
            f"{path}: its external data {location!r} cannot be read ({error}). Expected a file beside the model."
        ) from error
    if size < end:
        raise BismoothError(f"{data}: expected at least {end} bytes of weights, got {size}. The file is cut off.")
    return data
