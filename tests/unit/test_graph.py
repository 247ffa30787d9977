"""Reading and writing graphs: weights stay in their files, and files that lie are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bismooth.export.errors import BismoothError
from bismooth.passes import _gs, graph
from bismooth.passes.graph import Index
from tests.graphs import Builder, decoder, run


def small(folder: Path) -> Path:
    b = Builder()
    b.outputs.append(b.linear(b.rms_norm(b.tokens("x", 4), "norm", 4), "fc", 3, 4))
    return b.save(folder, external=True)


def test_save_keeps_references_and_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = decoder().save(tmp_path, external=True)

    def refuse(_: _gs.FileValues) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(_gs.FileValues, "load", refuse)
    graph.save(graph.load(path), tmp_path / "again.onnx")
    before, after = (onnx.ModelProto.FromString(file.read_bytes()) for file in (path, tmp_path / "again.onnx"))
    references = {tensor.name: list(tensor.external_data) for tensor in before.graph.initializer}
    assert {tensor.name: list(tensor.external_data) for tensor in after.graph.initializer} == references
    assert (tmp_path / "again.onnx").stat().st_size < 100_000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.onnx", "model.onnx", "model.safetensors"]


def test_saved_graph_computes_the_same(tmp_path: Path) -> None:
    path = decoder().save(tmp_path, external=True)
    graph.save(graph.load(path), tmp_path / "again.onnx")
    assert np.array_equal(run(path)[0], run(tmp_path / "again.onnx")[0])


def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(BismoothError, match=r"model\.onnx: cannot be written \(disk full\)"):
        graph.save(graph.load(path), path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.safetensors"]


def test_external_weight_is_read_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    values = _gs.read(Index.of(graph.load(path)).values["fc.weight"])
    assert values.dtype == np.float32
    assert values.shape == (3, 4)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64, ml_dtypes.int4])
def test_initializer_is_read_in_its_own_type(dtype: Any, tmp_path: Path) -> None:
    values: NDArray[Any] = np.array([[1, -2, 3]], dtype)
    stored = numpy_helper.from_array(values, "w")
    (tmp_path / "w.bin").write_bytes(b"head" + stored.raw_data)
    for key, value in (("location", "w.bin"), ("offset", "4"), ("length", str(len(stored.raw_data)))):
        stored.external_data.add(key=key, value=value)
    stored.ClearField("raw_data")
    stored.data_location = TensorProto.EXTERNAL
    b = Builder()
    b.constant("w", np.zeros((1, 3), np.float32))
    b.outputs.append(b.op("MatMul", b.tokens("x", 1), b.op("Cast", "w", to=TensorProto.FLOAT)))
    model = b.model()
    model.graph.initializer[0].CopyFrom(stored)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    constant = Index.of(graph.load(tmp_path / "model.onnx")).values["w"]
    assert _gs.dtype_of(constant) == np.dtype(dtype)
    assert np.array_equal(_gs.read(constant), values)


def relocate(location: str) -> Callable[[TensorProto], None]:
    def change(tensor: TensorProto) -> None:
        entries = {entry.key: entry for entry in tensor.external_data}
        entries["location"].value = location

    return change


def resize(tensor: TensorProto) -> None:
    next(entry for entry in tensor.external_data if entry.key == "length").value = "40"


def shift(offset: str) -> Callable[[TensorProto], None]:
    def change(tensor: TensorProto) -> None:
        next(entry for entry in tensor.external_data if entry.key == "offset").value = offset

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (relocate("../secret"), "fc.weight: its data is outside the model's folder"),
        (relocate("/etc/passwd"), "is outside the model's folder. Expected a file in .*, got '/etc/passwd'"),
        (relocate("gone.bin"), "its data file is missing. Expected gone.bin"),
        (resize, r"Expected 48 bytes for shape \[3, 4\], got 40 at offset"),
        (shift("100000"), "got 48 at offset 100000 of model.safetensors"),
        (shift("-8"), "got 48 at offset -8 of model.safetensors"),
        (shift("zero"), "got 48 at offset zero of model.safetensors"),
    ],
)
def test_external_data_that_lies_is_refused(
    tmp_path: Path, change: Callable[[TensorProto], None], message: str
) -> None:
    path = small(tmp_path)
    model = onnx.ModelProto.FromString(path.read_bytes())
    change(next(tensor for tensor in model.graph.initializer if tensor.name == "fc.weight"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BismoothError, match=message):
        graph.load(path)


def test_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = small(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(BismoothError, match="is outside the model's folder"):
        graph.load(path)


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    for data, message in ((b"\x07garbage", "not an ONNX file. Expected a serialized"), (b"", "not a model. Expected")):
        (tmp_path / "model.onnx").write_bytes(data)
        with pytest.raises(BismoothError, match=message):
            graph.load(tmp_path / "model.onnx")
    with pytest.raises(BismoothError, match=r"no such file\. Expected an ONNX model"):
        graph.load(tmp_path / "none.onnx")


def test_cycle_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="second"),
    ]
    value = helper.make_tensor_value_info
    inner = helper.make_graph(nodes, "g", [value("x", 1, [2])], [value("b", 1, [2])], value_info=[value("a", 1, [2])])
    (tmp_path / "model.onnx").write_bytes(helper.make_model(inner).SerializeToString())
    with pytest.raises(
        BismoothError, match=r"node first reads b before it is computed\. Expected nodes in topological"
    ):
        graph.load(tmp_path / "model.onnx")


def test_nodes_get_unique_names_and_constants_become_initializers(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Constant", [], ["two"], value=helper.make_tensor("t", TensorProto.FLOAT, [1], [2.0])),
        helper.make_node("Constant", [], ["three"], value_float=3.0),
        helper.make_node("Constant", [], ["axes"], value_ints=[0]),
        helper.make_node("Mul", ["x", "two"], ["a"], name="same"),
        helper.make_node("Mul", ["a", "three"], ["b"], name="same"),
        helper.make_node("Unsqueeze", ["b", "axes"], ["y"]),
    ]
    (tmp_path / "model.onnx").write_bytes(
        helper.make_model(helper.make_graph(nodes, "g", [x], [y])).SerializeToString()
    )
    loaded = graph.load(tmp_path / "model.onnx")
    assert [node.name for node in loaded.nodes] == ["same", "same_1", "Unsqueeze_2"]
    index = Index.of(loaded)
    assert index.constants == {"two", "three", "axes"}
    assert index.shape("b") == ("n", 2), "shapes that are not recorded are inferred"
    assert [index.array(name) for name in ("two", "three", "axes")] == [[2.0], 3.0, [0]]


def test_constant_expressions_are_evaluated(tmp_path: Path) -> None:
    b = Builder()
    w = b.vector("w", 4)
    one = b.constant("one", np.float32(1))
    plus = b.op("Add", one, w)
    half = b.op("Cast", plus, to=TensorProto.FLOAT16)
    row = b.op("Reshape", b.op("Cast", half, to=TensorProto.FLOAT), b.ints(1, 4))
    column = b.op("Transpose", row, perm=[1, 0])
    flat = b.op("Squeeze", b.op("Unsqueeze", column, b.ints(0)), b.ints(0, 2))
    root = b.op("Sqrt", b.op("Div", b.op("Mul", flat, flat), b.op("Neg", b.op("Sub", one, flat))))
    gelu = b.op("Gelu", w)
    x = b.tokens("x", 4)
    b.outputs += [b.op("Mul", x, value) for value in (root, gelu)]
    index = Index.of(b.graph(tmp_path))
    values = (1 + b.initializers["w"]).astype(np.float16).astype(np.float32)
    found = index.array(root)
    assert found is not None
    assert np.allclose(found, np.sqrt(values * values / (values - 1)), rtol=1e-6)
    assert gelu in index.constants
    assert index.array(gelu) is None, "no rule for the operation"
    assert index.array("x") is None


def test_big_constants_are_not_read(tmp_path: Path) -> None:
    b = Builder()
    b.constant("big", np.zeros((2049, 2048), np.float32))
    b.outputs.append(b.op("MatMul", b.tokens("x", 2049), "big"))
    assert Index.of(b.graph(tmp_path)).array("big") is None


def _external(proto: TensorProto, folder: Path) -> _gs.Tensor:
    tensor = _gs.make_external("w", np.dtype(np.float32), (2, 5), folder / "data", 6)
    cast(Any, tensor).values = _gs.FileValues(proto, folder)
    return tensor


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.INT4])
def test_a_tensor_is_read_in_pieces(tmp_path: Path, dtype: int) -> None:
    values = np.arange(10).reshape(2, 5).astype(helper.tensor_dtype_to_np_dtype(dtype))
    proto = numpy_helper.from_array(values, "w")
    (tmp_path / "data").write_bytes(b"before" + proto.raw_data + b"after")
    external = TensorProto(name="w", data_type=dtype, dims=[2, 5], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "data"), ("offset", "6")):
        external.external_data.add(key=key, value=value)
    read = [piece.copy() for piece in _gs.FileValues(external, tmp_path).load_pieces(4)]
    assert [len(piece) for piece in read] == ([10] if dtype == TensorProto.INT4 else [4, 4, 2])
    np.testing.assert_array_equal(np.concatenate(read), values.reshape(-1), strict=True)
    rows, columns = np.array([1, 0]), slice(1, 4)
    for tensor in (_gs.make_constant("w", values), _external(external, tmp_path)):
        np.testing.assert_array_equal(_gs.read_rows_of(tensor, rows), values[rows], strict=True)
        np.testing.assert_array_equal(_gs.read_columns_of(tensor, columns), values[:, columns], strict=True)
    inside = list(_gs.read_pieces(_gs.make_constant("w", values), 4))
    assert [len(piece) for piece in inside] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(inside), values.reshape(-1), strict=True)
