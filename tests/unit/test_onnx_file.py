"""ONNX files as artifacts: a small CNN comes out as it went in; hostile files do not."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]: the package has no stubs
import pytest
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from bismooth.export.errors import BismoothError
from bismooth.export.external_data import weight_files
from bismooth.export.model import export_model
from bismooth.export.onnx_file import import_onnx
from bismooth.passes.spec import ComputeType
from bismooth.tools import stages

ORT: Any = onnxruntime
Array = NDArray[Any]
Edit = Callable[[ModelProto], Any]
DATA = "weights.bin"


def external(name: str, shape: list[int], offset: int, location: str = DATA) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", 4 * int(np.prod(shape)))):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def cnn(folder: Path, edit: Edit = lambda _: None, name: str = "cnn.onnx") -> Path:
    """Conv, Relu, mean, Gemm on [batch, 3, 8, 8]; weights outside of the graph, nodes without names but the first."""
    folder.mkdir(exist_ok=True)
    np.random.default_rng(0).standard_normal(400, np.float32).tofile(folder / DATA)
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], "features/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axes"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "head.weight"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [
            external("conv.weight", [8, 3, 3, 3], 0),
            external("conv.bias", [8], 864),
            external("head.weight", [5, 8], 896),
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    edit(model)
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "artifact").mkdir()
    return tmp_path / "artifact"


def run(path: Path) -> Array:
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8), np.float32)
    return ORT.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def load(path: Path) -> ModelProto:
    return onnx.load(str(path), load_external_data=False)  # pyright: ignore[reportUnknownMemberType]


@pytest.mark.parametrize("weights", ["link", "copy"])
def test_a_cnn_comes_out_as_it_went_in(tmp_path: Path, target: Path, weights: Any) -> None:
    path = cnn(tmp_path / "source")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.parent.iterdir()}
    manifest = export_model(path, target, weights=weights)
    assert manifest.graphs == {"float32": "model.onnx"}
    assert manifest.source == {
        "path": str(path),
        "format": "onnx",
        "fingerprint": hashlib.sha256(path.read_bytes()).hexdigest(),
        "files": {
            file.name: {"size": len(content), "mtime_ns": time} for file, (content, time) in sorted(before.items())
        },
    }
    np.testing.assert_array_equal(run(target / "model.onnx"), run(path))
    assert (target / DATA).samefile(path.parent / DATA) == (weights == "link")
    original, imported = load(path), load(target / "model.onnx")
    assert [node.name for node in imported.graph.node] == ["features/Conv", "Relu_1", "ReduceMean_2", "Gemm_3"]
    for node in imported.graph.node[1:]:
        node.ClearField("name")
    assert imported == original
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.parent.iterdir()}


def test_names_become_unique(tmp_path: Path, target: Path) -> None:
    def rename(model: ModelProto) -> None:
        for node, name in zip(model.graph.node, ["Relu_1", "", "Relu_1", "Relu_1_2"], strict=True):
            node.name = name

    import_onnx(cnn(tmp_path, rename), target)
    names = [node.name for node in load(target / "model.onnx").graph.node]
    assert names == ["Relu_1", "Relu_1_Relu_1", "Relu_1_2_Relu_1_2", "Relu_1_2"]


def test_data_in_a_folder_below_and_without_offset_and_length(tmp_path: Path, target: Path) -> None:
    def shorten(model: ModelProto) -> None:
        weight = model.graph.initializer[0]
        del weight.external_data[1:]
        weight.external_data[0].value = "sub/conv.bin"

    path = cnn(tmp_path, shorten)
    (tmp_path / "sub").mkdir()
    np.ones((8, 3, 3, 3), np.float32).tofile(tmp_path / "sub/conv.bin")
    import_onnx(path, target)
    np.testing.assert_array_equal(run(target / "model.onnx"), run(path))


def with_subgraph(model: ModelProto, tensor: TensorProto) -> None:
    """Add an If whose branches hold ``tensor`` as the value of a Constant."""
    output = helper.make_tensor_value_info("k", TensorProto.FLOAT, [8])
    branch = helper.make_graph([helper.make_node("Constant", [], ["k"], value=tensor)], "branch", [], [output])
    condition = helper.make_tensor("condition", TensorProto.BOOL, [], [True])
    model.graph.initializer.append(condition)
    model.graph.node.append(helper.make_node("If", ["condition"], ["k"], then_branch=branch, else_branch=branch))


def test_data_of_subgraphs_is_taken_along(tmp_path: Path, target: Path) -> None:
    (tmp_path / "inner.bin").write_bytes(b"\0" * 32)
    import_onnx(cnn(tmp_path, lambda m: with_subgraph(m, external("", [8], 0, "inner.bin"))), target)
    assert (target / "inner.bin").is_file()


def place(**entries: object) -> Edit:
    """Change the external data of the first weight."""

    def edit(model: ModelProto) -> None:
        for entry in model.graph.initializer[0].external_data:
            entry.value = str(entries.get(entry.key, entry.value))

    return edit


def cycle(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "m"


def declare(**fields: Any) -> Edit:
    """Change fields of the first weight."""

    def edit(model: ModelProto) -> None:
        for name, value in fields.items():
            if name == "dims":
                model.graph.initializer[0].dims[:] = value
            else:
                setattr(model.graph.initializer[0], name, value)

    return edit


OUTSIDE = r"is outside the model's folder. Expected a file beside the model, named without '\.\.'\."
CANNOT = "the external data of tensor conv.weight cannot be"
HOSTILE: dict[str, tuple[Edit, str]] = {
    "cycle": (cycle, "not a valid ONNX model: .*topological order|sorted"),
    "unknown operator": (lambda m: setattr(m.graph.node[1], "op_type", "Reluu"), "not a valid ONNX model: .*Reluu"),
    "unknown attribute": (
        lambda m: m.graph.node[1].attribute.append(helper.make_attribute("slope", 1.0)),
        "not a valid ONNX model: .*slope",
    ),
    "no opset": (lambda m: m.ClearField("opset_import"), "not a valid ONNX model"),
    "undefined input": (lambda m: m.graph.node[1].input.__setitem__(0, "q"), "not a valid ONNX model: .*q"),
    "parent": (place(location="../weights.bin"), f"'../weights.bin' {OUTSIDE}"),
    "absolute": (place(location="/etc/passwd"), f"'/etc/passwd' {OUTSIDE}"),
    "no location": (place(location=""), f"'' {OUTSIDE}"),
    "symbolic link": (place(location="link.bin"), f"'link.bin' {OUTSIDE}"),
    "in a subgraph": (lambda m: with_subgraph(m, external("", [8], 0, "../x")), f"'../x' {OUTSIDE}"),
    "missing": (place(location="gone.bin"), "its external data 'gone.bin' is missing. Expected .*gone.bin"),
    "folder": (place(location="sub"), "its external data 'sub' is missing"),
    "cut off": (
        place(offset=1000),
        "weights.bin: expected at least 1864 bytes of weights, got 1600. The file is cut off",
    ),
    "beyond any file": (place(offset=2**62), "The file is cut off"),
    "negative offset": (place(offset=-4), CANNOT),
    "not a number": (place(offset="x"), CANNOT),
    "shorter than its shape": (place(length=860), f"{CANNOT}: .8, 3, 3, 3. of type 1, offset 0, length 860. Export"),
    "negative shape": (declare(dims=[-8, -3, 3, 3]), CANNOT),
    "unknown type": (declare(data_type=99), CANNOT),
    "like the graph": (
        place(location="model.onnx"),
        "is called 'model.onnx', a name that an artifact needs for itself",
    ),
    "like the manifest": (place(location="bismooth.json"), "a name that an artifact needs"),
    "like a stage's": (place(location="quantized.safetensors"), "Save the model with another name for its data"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, target: Path, case: str) -> None:
    edit, reason = HOSTILE[case]
    path = cnn(tmp_path / "source", edit)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 2000)
    (path.parent / "link.bin").symlink_to(tmp_path / "weights.bin")
    (path.parent / "sub").mkdir()
    with pytest.raises(BismoothError, match=reason) as caught:
        import_onnx(path, target)
    assert str(path.parent) in str(caught.value)


LOCATIONS: dict[str, tuple[str, str]] = {
    "absolute": ("/etc/passwd", OUTSIDE),
    "parent": ("../weights.bin", OUTSIDE),
    "parent and back": ("sub/../weights.bin", OUTSIDE),
    "the folder itself": ("./", OUTSIDE),
    "symbolic link": ("link.bin", OUTSIDE),
    "too long": ("x" * 300, r"cannot be read \(.*File name too long.*\). Expected a file beside the model."),
    "NUL": ("weights\0.bin", r"cannot be read \(embedded null byte\). Expected"),
    "circle of links": ("loop.bin", r"cannot be read \(.*[Ll]oop.*\). Expected|is missing"),
}


@pytest.mark.parametrize("case", LOCATIONS)
def test_an_export_refuses_a_hostile_location(tmp_path: Path, case: str) -> None:
    location, reason = LOCATIONS[case]
    path = cnn(tmp_path / "source", place(location=location))
    (tmp_path / "weights.bin").write_bytes(b"\0" * 2000)
    (path.parent / "link.bin").symlink_to(tmp_path / "weights.bin")
    (path.parent / "loop.bin").symlink_to("loop.bin")
    (path.parent / "sub").mkdir()
    with pytest.raises(BismoothError, match=f"cnn.onnx: its external data {re.escape(repr(location))} {reason}"):
        stages.export(path, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"source", "weights.bin"}


@pytest.mark.parametrize("location", ["/etc/passwd", "../weights.bin"])
def test_what_is_outside_by_its_name_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    path, looked = cnn(tmp_path / "source", place(location=location)), list[str]()
    stat = os.stat

    def spy(name: Any, **options: Any) -> os.stat_result:
        looked.append(str(name))
        return stat(name, **options)

    monkeypatch.setattr(os, "stat", spy)
    with pytest.raises(BismoothError, match="is outside"):
        stages.export(path, tmp_path / "out")
    assert looked
    assert not [name for name in looked if name.endswith(location)]


def test_two_names_of_one_file(tmp_path: Path) -> None:
    path = cnn(tmp_path / "source", place(location=f"./{DATA}"))
    made = stages.export(path, tmp_path / "out", dtype=ComputeType.FLOAT32)
    assert {file.name for file in made.artifact.iterdir()} == {"bismooth.json", "model.onnx", DATA}
    assert made.weights_bytes == 1600
    np.testing.assert_array_equal(run(made.artifact / "model.onnx"), run(path))


@pytest.mark.parametrize("content", [b"\x80\x04not a protobuf", b"PK\x03\x04" + b"\xff" * 100])
def test_a_file_that_is_no_onnx(tmp_path: Path, target: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(BismoothError, match=r"m.onnx: not an ONNX file \("):
        import_onnx(path, target)


def test_an_empty_file(tmp_path: Path, target: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(BismoothError, match=r"m\.onnx: not a valid ONNX model"):
        import_onnx(tmp_path / "m.onnx", target)


@pytest.mark.parametrize(("data_type", "length"), [(TensorProto.INT4, 8), (TensorProto.INT8, 16)])
def test_packed_types_need_fewer_bytes(tmp_path: Path, target: Path, data_type: int, length: int) -> None:
    def add(model: ModelProto) -> None:
        tensor = external("packed", [4], 0)
        tensor.data_type, tensor.dims[:] = data_type, [16]
        tensor.external_data[2].value = str(length)
        model.graph.initializer.append(tensor)

    import_onnx(cnn(tmp_path, add), target)
    with pytest.raises(BismoothError, match="the external data of tensor packed cannot be"):
        import_onnx(cnn(tmp_path, lambda m: (add(m), place_last(m, length - 1))), target)


def place_last(model: ModelProto, length: int) -> None:
    model.graph.initializer[-1].external_data[2].value = str(length)


def foreign(*tensors: TensorProto) -> NodeProto:
    node = NodeProto(op_type="Custom", domain="somewhere", output=["z"])
    node.attribute.append(AttributeProto(name="t", type=AttributeProto.TENSORS, tensors=tensors))
    sparse = SparseTensorProto(values=external("v", [8], 0, "values.bin"), dims=[8])
    node.attribute.append(AttributeProto(name="s", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse))
    return node


def test_attributes_with_lists_of_tensors_and_graphs_are_seen(tmp_path: Path, target: Path) -> None:
    """A foreign operator may have any attribute; what it refers to must still be inside."""

    def add(model: ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("somewhere", 1))
        model.graph.node.append(foreign(external("t", [8], 0, "../x")))

    with pytest.raises(BismoothError, match=r"'../x' is outside"):
        import_onnx(cnn(tmp_path, add), target)


def test_weight_files_are_found_wherever_a_model_may_name_them(tmp_path: Path) -> None:
    def add(model: ModelProto) -> None:
        with_subgraph(model, external("", [8], 0, "branch.bin"))
        model.graph.node.append(foreign(external("t", [8], 0, "./list.bin")))
        model.functions.add(name="f", domain="somewhere").node.append(
            helper.make_node("Constant", [], ["c"], value=external("", [8], 0, "function.bin"))
        )

    names = ("branch.bin", "function.bin", "list.bin", "values.bin")
    for name in names:
        (tmp_path / name).write_bytes(b"\0" * 32)
    found = weight_files(cnn(tmp_path, add))
    assert list(found) == sorted([*names, DATA])
    assert all(file == tmp_path / name for name, file in found.items())
