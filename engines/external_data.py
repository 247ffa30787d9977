"""Check where a graph's weights lie before anything maps them.

NOTE: TensorRT-RTX 1.5 and 1.6 read past the end of a file that is too short. 1.7 reports it.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ..export.errors import BismoothError

if TYPE_CHECKING:
    import onnx

_REMEDY = "Make the artifact again."


def check_external_data(path: Path, graph: onnx.GraphProto) -> None:
    """Check that every external weight of the graph in the file ``path`` lies inside a file of the same folder.

    Raises:
        BismoothError: one is missing, cut off, of another size than its shape says, or outside the folder.
    """
    from onnx import TensorProto

    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_tensor(path, tensor)


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    subject = f"{path}: the weight '{tensor.name}'"
    folder = path.parent.resolve()
    file = (folder / entries.get("location", "")).resolve()
    if not file.is_relative_to(folder):
        raise BismoothError(f"{subject} lies outside the model's folder, in {file}. Expected a file beside the model.")
    if not file.is_file():
        raise BismoothError(f"{subject} lies in {file}, which does not exist. {_REMEDY}")
    size, needed = file.stat().st_size, _byte_size(tensor)
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", size - offset))
    except ValueError as error:
        raise BismoothError(f"{subject} has no valid place in {file}: {error}. {_REMEDY}") from error
    if offset < 0 or length != needed or offset + length > size:
        raise BismoothError(
            f"{subject} is not where the model says. Expected {needed} bytes, "
            f"got {length} bytes from byte {offset} of {file}, which has {size}. {_REMEDY}"
        )


def _byte_size(tensor: onnx.TensorProto) -> int:
    """Bytes that the shape and type call for; two 4-bit numbers share a byte."""
    from onnx import TensorProto, helper

    count = prod(tensor.dims)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1):
        return (count + 1) // 2
    return count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
