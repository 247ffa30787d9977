"""An existing ONNX file as an artifact: checked, named, its external data linked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import onnx

from .artifact import Manifest, place_file
from .errors import BismoothError
from .versions import tool_versions

GRAPH = "model.onnx"


def import_onnx(path: Path, folder: Path) -> Manifest:
    """Write ``model.onnx`` and the external data of an ONNX file into ``folder``; weights are not read.

    Nodes without a name get one (operator and number). Nothing else of the graph changes.

    Raises:
        BismoothError: the file is no ONNX, has a cycle or unknown operators, or its external data is missing, cut off, or lies outside
            the file's folder.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, and onnx's own
        raise BismoothError(f"{path}: not an ONNX file ({str(error).strip().splitlines()[0]}).") from error
    _check(model, path)
    locations: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = {entry.key: entry.value for entry in tensor.external_data}
            end = int(info.get("offset", 0)) + int(info.get("length", 0))
            location = info.get("location", "")
            locations[location] = max(end, locations.get(location, 0))
    for location, end in locations.items():
        place_file(_inside(path, location, end), _target(folder, location))
    _name_nodes(model)
    onnx.save(model, str(folder / GRAPH))
    return Manifest(
        kind="float",
        source={"path": str(path.absolute()), "format": "onnx", "fingerprint": _fingerprint(path)},
        graphs={"float32": GRAPH},
        tools=tool_versions(),
    )


def _check(model: onnx.ModelProto, path: Path) -> None:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for tensor in probe.graph.initializer:  # the checker refuses hard-linked data, which is checked below
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            tensor.dims[:] = [0] * len(tensor.dims)
    try:
        onnx.checker.check_model(probe)
    except onnx.checker.ValidationError as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise BismoothError(f"{path}: not a valid ONNX model: {' '.join(lines[:3])}") from error


def _inside(path: Path, location: str, end: int) -> Path:
    root = path.parent.resolve()
    data = path.parent / location
    if not location or Path(location).is_absolute() or not data.resolve().is_relative_to(root):
        raise BismoothError(f"{path}: its external data {location!r} is outside the model's folder. Expected a file beside the model.")
    if not data.is_file():
        raise BismoothError(f"{path}: its external data {location!r} is missing. Expected {data}.")
    if data.stat().st_size < end:
        raise BismoothError(f"{data}: expected at least {end} bytes of weights, got {data.stat().st_size}. The file is cut off.")
    return data


def _target(folder: Path, location: str) -> Path:
    target = folder / location
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _name_nodes(model: onnx.ModelProto) -> None:
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        name = node.name or f"{node.op_type}_{number}"
        if name in taken:
            name = f"{name}_{number}"
        taken.add(name)
        node.name = name


def _fingerprint(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return cast(Any, hashlib).file_digest(file, "sha256").hexdigest()
