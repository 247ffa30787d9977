"""An existing ONNX file as an artifact: checked, named, its external data linked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto

from ._onnx import check_proto, save_proto
from .artifact import RESERVED, Manifest, place_file
from .errors import BismoothError
from .external_data import check_locations, external_tensors, find_locations, load_model
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
    model = load_model(path)
    files = _weight_files(model, path)
    _check(model, path)
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        place_file(file, target, copy=copy)
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
        BismoothError: the file is no ONNX, or its external data is missing, cut off, or lies outside its folder.
    """
    return [path, *_weight_files(load_model(path), path).values()]


def _weight_files(model: ModelProto, path: Path) -> dict[str, Path]:
    locations = find_locations(model, path)
    for location in locations:
        if location.endswith(RESERVED):
            raise BismoothError(
                f"{path}: its external data is called {location!r}, a name that an artifact needs for itself. "
                "Save the model with another name for its data, for example 'weights.bin'."
            )
    return check_locations(path, locations)


def _check(model: ModelProto, path: Path) -> None:
    """Run the checker of onnx, on a model without weights: it refuses external data that has several hard links."""
    probe = ModelProto()
    probe.CopyFrom(model)
    for tensor in external_tensors(probe):
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
