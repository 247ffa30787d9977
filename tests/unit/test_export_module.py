"""Torch modules: an MLP and a CNN come out as they compute."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]: the package has no stubs
import pytest
import torch
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto
from torch import Tensor, nn

import bismooth
from bismooth.export.errors import BismoothError
from bismooth.export.module import export_module
from bismooth.export.safetensors_file import read_header, read_tensor

ORT: Any = onnxruntime
Array = NDArray[Any]


class Mlp(nn.Module):
    """Tied weights, a dropout, a buffer that is not stored, one of integers that is, an input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.second = nn.Linear(16, 8)
        self.third = nn.Linear(8, 16)
        self.third.weight = self.first.weight
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("offsets", torch.arange(16.0) / 7, persistent=False)
        self.register_buffer("order", torch.tensor([1, 0] * 8))

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        x = self.dropout(torch.relu(self.norm(self.first(x))))
        return (self.third(self.second(x)) * scale + cast(Tensor, self.offsets))[..., cast(Tensor, self.order)]


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def run(folder: Path, **feeds: Tensor) -> Array:
    session = ORT.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in feeds.items()})[0]


def graph_of(folder: Path) -> GraphProto:
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)  # pyright: ignore[reportUnknownMemberType]
    assert (model.producer_name, model.producer_version) == ("bismooth", bismooth.__version__)
    return model.graph


def external(folder: Path) -> set[str]:
    return {t.name for t in graph_of(folder).initializer if t.data_location == TensorProto.EXTERNAL}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_mlp(tmp_path: Path, dtype: torch.dtype, generator: torch.Generator) -> None:
    module = Mlp().to(dtype)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    manifest = export_module(
        module,
        tmp_path,
        (torch.randn(2, 3, 8, generator=generator).to(dtype),),
        {"scale": torch.tensor(2.0, dtype=dtype)},
        dynamic_shapes={"x": {0: "batch", 1: "sequence"}, "scale": None},
        output_names=["y"],
    )
    assert (manifest.kind, manifest.architecture, manifest.source["format"]) == ("float", "Mlp", "torch")
    x, scale = torch.randn(4, 7, 8, generator=generator), torch.tensor(3.0)
    expected = copy.deepcopy(module).float().eval()(x, scale=scale).detach().numpy()
    np.testing.assert_allclose(run(tmp_path, x=x, scale=scale), expected, atol=1e-5)

    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    stored = read_header(tmp_path / "model.safetensors")
    assert stored.keys() == before.keys() - {"third.weight"}
    assert stored["first.weight"].dtype == ("F32" if dtype == torch.float32 else "BF16")
    values = read_tensor(tmp_path / "model.safetensors", stored["second.weight"]).astype(np.float32)
    np.testing.assert_array_equal(values, before["second.weight"].float().numpy())
    assert external(tmp_path) == stored.keys() - {"order"}


def test_names_of_an_mlp(tmp_path: Path) -> None:
    export_module(
        Mlp(), tmp_path, (torch.zeros(1, 2, 8),), {"scale": torch.tensor(2.0)}, input_names=["data", "factor"]
    )
    graph = graph_of(tmp_path)
    names = [node.name for node in graph.node]
    assert {"first/MatMul", "norm/LayerNormalization", "graph/Relu", "third/MatMul"} <= set(names)
    assert len(set(names)) == len(names)
    assert [value.name for value in graph.input] == ["data", "factor"]


def test_a_cnn(tmp_path: Path, generator: torch.Generator) -> None:
    module = Cnn()
    module(torch.randn(4, 3, 8, 8, generator=generator))  # gives the batch norm statistics
    shapes = ({0: "batch", 2: "height", 3: "width"},)
    export_module(module, tmp_path, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=shapes)
    x = torch.randn(3, 3, 10, 12, generator=generator)
    np.testing.assert_allclose(run(tmp_path, x=x), module.eval()(x).detach().numpy(), atol=1e-5)
    kinds = Counter(node.op_type for node in graph_of(tmp_path).node)
    assert (kinds["Conv"], kinds["BatchNormalization"]) == (2, 1)
    assert external(tmp_path) == set(module.state_dict()) - {"features.1.num_batches_tracked"}


def test_views_of_one_storage_are_tensors_of_their_own(tmp_path: Path) -> None:

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.arange(32.0).reshape(2, 4, 4)
            self.first, self.second = nn.Parameter(both[0]), nn.Parameter(both[1].T)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.first @ self.second

    module = Views()
    export_module(module, tmp_path, (torch.eye(4),))
    np.testing.assert_array_equal(run(tmp_path, x=torch.eye(4)), module(torch.eye(4)).detach().numpy())
    assert read_header(tmp_path / "model.safetensors").keys() == {"first", "second"}


def test_a_module_that_cannot_be_traced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(
        BismoothError, match=r"Moody: the model cannot be traced: .* Export it to ONNX by its own means"
    ):
        export_module(Moody(), tmp_path, (torch.zeros(2),))
    assert capfd.readouterr() == ("", ""), "the exporter's dumps are no message for users"


def test_a_module_without_values(tmp_path: Path) -> None:
    with pytest.raises(
        BismoothError, match=r"Linear: the module has tensors without values \(device meta\)\. Load its"
    ):
        export_module(nn.Linear(2, 2, device="meta"), tmp_path, (torch.zeros(2),))


def test_a_tensor_that_cannot_be_stored(tmp_path: Path) -> None:
    module = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(
        BismoothError,
        match=r"Linear: its state has a tensor that cannot be stored: .*complex64.* Expected float and integer tensors",
    ):
        export_module(module, tmp_path, (torch.zeros(2),))
