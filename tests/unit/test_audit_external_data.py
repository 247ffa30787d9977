"""Weights outside the ONNX file: in place, or refused before anything maps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from bismooth.engines.external_data import check_external_data
from bismooth.export.errors import BismoothError


def graph(
    location: str = "w.bin", dims: tuple[int, ...] = (3, 4), kind: int = TensorProto.FLOAT, **place: object
) -> onnx.GraphProto:
    tensor = TensorProto(name="w", data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(value))
    return onnx.GraphProto(initializer=[tensor])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model in a folder with a file of 50 bytes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w.bin").write_bytes(bytes(50))
    return folder / "model.onnx"


def test_weights_in_place(path: Path) -> None:
    check_external_data(path, graph(offset=2, length=48))
    check_external_data(path, graph(offset=2))
    check_external_data(path, graph(dims=(25,), kind=TensorProto.BFLOAT16))
    check_external_data(path, graph(dims=(3, 33), kind=TensorProto.INT4))
    (path.parent / "linked.bin").hardlink_to(path.parent / "w.bin")
    check_external_data(path, graph("linked.bin", offset=1, length=48))
    inside = onnx.numpy_helper.from_array(np.zeros(3, np.float32), "i")
    check_external_data(path, onnx.GraphProto(initializer=[inside]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (graph(offset=3, length=48), r"Expected 48 bytes, got 48 bytes from byte 3 of .*w\.bin, which has 50"),
        (graph(offset=0, length=44), "Expected 48 bytes, got 44 bytes from byte 0"),
        (graph(offset=-1, length=48), "from byte -1"),
        (graph(offset="x"), r"has no valid place in .*w\.bin: invalid literal"),
        (graph("absent.bin"), r"lies in .*absent\.bin, which does not exist"),
        (graph(""), "lies in .*model, which does not exist"),
        (graph("../w.bin"), "lies outside the model's folder"),
        (graph("/etc/passwd"), "lies outside the model's folder, in /etc/passwd"),
    ],
)
def test_weights_that_are_elsewhere(path: Path, bad: onnx.GraphProto, message: str) -> None:
    with pytest.raises(BismoothError, match=rf"model\.onnx: the weight 'w' .*{message}"):
        check_external_data(path, bad)


def test_symbolic_link_that_leaves_the_folder(path: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(48))
    (path.parent / "link.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(BismoothError, match="lies outside the model's folder"):
        check_external_data(path, graph("link.bin"))
