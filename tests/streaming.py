"""Run graphs of language models piece by piece, and as they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bismooth.engines.onnxruntime import Mode, Session
from bismooth.engines.pieces import Piece, PieceMaker
from bismooth.engines.streaming import Streamed
from bismooth.engines.subgraph import load_graph
from tests.graphs import Builder

Array = NDArray[Any]


def streamed(path: Path, ids: NDArray[np.int64], mode: Mode = "plain", batch_size: int = 2, **options: Any) -> Streamed:
    """How the graph in ``path`` is run on ``ids`` [N, S]."""
    return Streamed(path, PieceMaker(load_graph(path)), mode, ids, batch_size, **options)


def run_pieces(streamed: Streamed, pieces: Sequence[Piece], folder: Path) -> Array:
    """The graph's first output for all windows, by way of files in ``folder``."""
    folder.mkdir(exist_ok=True)
    found: list[Array] = []
    for piece in pieces:
        with streamed.running(piece, folder, threads=1) as run:
            found = [array for batch in streamed.batches for array in run(batch).values()]
    return np.concatenate(found)


def run_whole(path: Path, ids: NDArray[np.int64], mode: Mode = "plain", batch_size: int = 2) -> Array:
    """The same by a session that optimizes the whole graph."""
    with Session(path, mode=mode, threads=1) as session:
        return np.concatenate(list(session.windows(ids, batch_size)))


def divide(stop: int, *ends: int) -> list[Piece]:
    """Pieces of ``stop`` segments that end at ``ends``."""
    bounds = sorted({0, stop, *ends})
    return [Piece(first, end) for first, end in pairwise(bounds)]


def save_narrow(builder: Builder, folder: Path, kind: int = TensorProto.FLOAT16) -> Path:
    """Write ``model.onnx`` with its matrices in 16 bits in ``weights.bin``, widened by a Cast, as exporters do it."""
    model, data = builder.model(), bytearray()
    casts: list[onnx.NodeProto] = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
            continue
        values = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
        wide, tensor.name = tensor.name, f"{tensor.name}.stored"
        casts.append(helper.make_node("Cast", [tensor.name], [wide], f"{wide}/Cast", to=TensorProto.FLOAT))
        model.graph.value_info.append(helper.make_tensor_value_info(wide, TensorProto.FLOAT, values.shape))
        point_outside(tensor, kind, len(data), values.nbytes)
        data += values.tobytes()
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (folder / "weights.bin").write_bytes(data)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def point_outside(tensor: TensorProto, kind: int, offset: int, length: int) -> None:
    """Let an initializer be ``length`` bytes of ``weights.bin``."""
    tensor.ClearField("raw_data")
    tensor.data_type, tensor.data_location = kind, TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
