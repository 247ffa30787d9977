"""An existing ONNX file as an artifact: checked, named, its external data linked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import tensor_dtype_to_np_dtype

from ._onnx import check_proto, load_proto, save_proto
from .artifact import RESERVED, Manifest, place_file
from .errors import BismoothError
from .hashing import file_sha256
from .versions import tool_versions

GRAPH = "model.onnx"


def import_onnx(path: Path, folder: Path, *, copy: bool = False) -> Manifest:
    """Write ``model.onnx`` and the external data of an ONNX file into ``folder``; weights are not read.

    Nodes without a name get one (operator and number). Nothing else of the graph changes. The external data become hard
    links of the files, or copies (``copy``, and where links are not possible).

    Raises:
        BismoothError: the file is no ONNX, has a cycle or unknown operators, or its external data is missing, cut
            off, or lies outside the file's folder.
    """
    model = _load(path)
    locations = _locations(model, path)
    _check(model, path)
    for location, end in locations.items():
        target = folder / location
        target.parent.mkdir(parents=True, exist_ok=True)
        place_file(_data_file(path, location, end), target, copy=copy)
    _name_nodes(model.graph.node)
    save_proto(model, folder / GRAPH)
    return Manifest(
        kind="float",
        source={"path": str(path.absolute()), "format": "onnx", "fingerprint": file_sha256(path)},
        graphs={"float32": GRAPH},
        tools=tool_versions(),
    )


def list_files(path: Path) -> list[Path]:
    """An ONNX file and the files of its external data.

    Raises:
        BismoothError: as :func:`import_onnx`.
    """
    return [path, *(path.parent / location for location in _locations(_load(path), path))]


def _load(path: Path) -> ModelProto:
    try:
        return load_proto(path)
    except Exception as error:  # protobuf's DecodeError, and onnx's own
        raise BismoothError(f"{path}: not an ONNX file ({str(error).strip().splitlines()[0]}).") from error


def _locations(model: ModelProto, path: Path) -> dict[str, int]:
    """Files of external data, as the model names them, and how many bytes it needs of each."""
    locations: dict[str, int] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            location, end = _extent(path, tensor)
            locations[location] = max(end, locations.get(location, 0))
    return locations


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All constant tensors, those of subgraphs and of nodes' attributes included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors
        for subgraph in (attribute.g, *attribute.graphs):
            yield from _tensors(subgraph)


def _extent(path: Path, tensor: TensorProto) -> tuple[str, int]:
    """Where the bytes of an external tensor are: the file's name as the model gives it, and where in it they end."""
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
    return info.get("location", ""), offset + length


def _bits(data_type: int) -> int:
    """Bits per element; ``KeyError`` or ``ValueError`` if ONNX has no such type."""
    name = cast(Any, TensorProto.DataType).Name(data_type)
    if name.endswith("INT2"):
        return 2
    return 4 if name.endswith(("INT4", "FLOAT4E2M1")) else 8 * tensor_dtype_to_np_dtype(data_type).itemsize


def _data_file(path: Path, location: str, end: int) -> Path:
    """The file of external data, after checking that it may be used."""
    data = path.parent / location
    absolute = Path(location).is_absolute()
    if not location or absolute or not data.resolve().is_relative_to(path.parent.resolve()):
        raise BismoothError(
            f"{path}: its external data {location!r} is outside the model's folder. Expected a file beside the model."
        )
    if location.endswith(RESERVED):
        raise BismoothError(
            f"{path}: its external data is called {location!r}, a name that an artifact needs for itself. "
            "Save the model with another name for its data, for example 'weights.bin'."
        )
    if not data.is_file():
        raise BismoothError(f"{path}: its external data {location!r} is missing. Expected {data}.")
    if data.stat().st_size < end:
        raise BismoothError(
            f"{data}: expected at least {end} bytes of weights, got {data.stat().st_size}. The file is cut off."
        )
    return data


def _check(model: ModelProto, path: Path) -> None:
    """Run the checker of onnx, on a model without weights: it refuses external data that has several hard links."""
    probe = ModelProto()
    probe.CopyFrom(model)
    for tensor in _tensors(probe.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            tensor.dims[:] = [0] * len(tensor.dims)
    try:
        check_proto(probe)
    except onnx.checker.ValidationError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BismoothError(f"{path}: not a valid ONNX model: {' '.join(lines[:3])}") from error


def _name_nodes(nodes: Sequence[NodeProto]) -> None:
    taken = {node.name for node in nodes}
    seen: set[str] = {""}
    for number, node in enumerate(nodes):
        if node.name in seen:
            name = base = f"{node.name or node.op_type}_{number}"
            while name in taken:
                name = f"{name}_{base}"
            node.name = name
            taken.add(name)
        seen.add(node.name)
