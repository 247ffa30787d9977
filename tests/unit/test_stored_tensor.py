"""Tensors in files: what an operation reads of them, and that it computes the same as on tensors in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.nn import functional

from bismooth.export.errors import BismoothError
from bismooth.export.safetensors_file import SafetensorsWriter
from bismooth.tools import stored_tensor
from bismooth.tools.stored_tensor import StoredTensor, read_rows

RNG = np.random.default_rng(0)
F: Any = functional


class File:
    """A tensor in a file, the same in memory, and a list of the reads."""

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: Any = np.float32) -> None:
        values = RNG.standard_normal(shape).astype(dtype)
        self.path = folder / f"{len(list(folder.iterdir()))}.safetensors"
        with SafetensorsWriter(
            self.path, [("other", np.dtype(np.float32), (3,)), ("w", values.dtype, shape)]
        ) as writer:
            writer.write("other", np.zeros(3, np.float32))
            writer.write("w", values)
            self.entry = writer.entries["w"]
        self.reads: list[str] = []
        self.expected: Any = cast(Any, torch).from_numpy(values.astype(np.float32))
        self.tensor: Any = StoredTensor.of(shape, "layer.w", (self.path, self.entry), self.reads.append)


def assert_equal(got: Any, expected: Any) -> None:
    assert type(got) is torch.Tensor
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3), (4,), (), (2, 3, 4)])
def test_any_operation_reads_the_values(tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    file = File(tmp_path, shape, dtype)
    assert_equal(file.tensor * 2, file.expected * 2)
    assert_equal(torch.stack([file.tensor, file.tensor]), torch.stack([file.expected] * 2))
    assert file.reads == ["layer.w"] * 3


def test_what_describes_a_tensor_reads_nothing(tmp_path: Path) -> None:
    file = File(tmp_path, (5, 3), np.float16)
    tensor = file.tensor
    assert (tensor.shape, tensor.dtype, tensor.device.type, tensor.ndim) == ((5, 3), torch.float32, "cpu", 2)
    assert (tensor.size(0), tensor.dim(), tensor.numel(), len(tensor)) == (5, 2, 15, 5)
    assert tensor.is_floating_point()
    assert not tensor.is_meta
    assert not tensor.requires_grad
    assert file.reads == []


def test_a_look_up_reads_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, sizes = File(tmp_path, (50, 3), np.float16), list[int]()

    def counted(path: Path, entry: Any, first: int, stop: int) -> Any:
        sizes.append(stop - first)
        return read_rows(path, entry, first, stop)

    monkeypatch.setattr(stored_tensor, "read_rows", counted)
    ids = torch.tensor([[3, 49, 3], [0, 1, 3]])
    embedding: Any = torch.nn.Embedding(50, 3, padding_idx=0)
    embedding._parameters["weight"] = file.tensor
    assert_equal(embedding(ids), file.expected[ids])
    assert sizes == [1] * 4
    with pytest.raises(IndexError, match="index out of range: rows 1 to 50 of 50"):
        embedding(torch.tensor([1, 50]))


def test_a_table_that_is_normed_is_read_whole(tmp_path: Path) -> None:
    file, ids = File(tmp_path, (5, 3)), torch.tensor([4, 1])
    expected = F.embedding(ids, file.expected.clone(), max_norm=1.0)
    assert_equal(F.embedding(ids, file.tensor, max_norm=1.0), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_large_linear_goes_through_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    weight, offsets = File(tmp_path, (70, 16), np.float16), File(tmp_path, (70,))
    linear: Any = torch.nn.Linear(16, 70, bias=bias)
    linear._parameters["weight"] = weight.tensor
    if bias:
        linear._parameters["bias"] = offsets.tensor
    x = torch.randn(2, 3, 16)
    expected = F.linear(x, weight.expected, offsets.expected if bias else None)
    assert_equal(linear(x), expected)
    assert len(weight.reads) == 1
    monkeypatch.setattr(stored_tensor, "MOST", 1000)
    monkeypatch.setattr(stored_tensor, "SLICE", 2000)
    torch.testing.assert_close(linear(x), expected, rtol=1e-6, atol=1e-6)
    assert len(weight.reads) == 1 + 3  # 31 rows each
    assert len(offsets.reads) == (2 if bias else 0)


def test_one_matrix_of_a_stack_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, places = File(tmp_path, (4, 3, 2)), list[tuple[int, int | None]]()

    def placed(path: Path, entry: Any, first: int, stop: int | None) -> Any:
        places.append((first, stop))
        return read_rows(path, entry, first, stop)

    monkeypatch.setattr(stored_tensor, "read_rows", placed)
    for index in (2, -1, torch.tensor(1)):
        assert_equal(file.tensor[index], file.expected[index])
    assert places == [(2, 3), (3, 4), (1, 2)]
    for index in (slice(1, 3), torch.tensor([0, 2]), (0, 1), None, torch.tensor(True)):
        assert_equal(file.tensor[index], file.expected[index])
    assert places[3:] == [(0, None)] * 5
    with pytest.raises(IndexError, match="range object index out of range"):
        file.tensor[4]


def test_an_operation_that_torch_does_not_tell_of_gives_nan(tmp_path: Path) -> None:
    file = File(tmp_path, (5, 3))
    with cast(Any, torch)._C.DisableTorchFunctionSubclass():
        assert torch.isnan(F.linear(torch.ones(1, 3), file.tensor)).all()
    assert file.reads == []


def test_what_cannot_be_read(tmp_path: Path) -> None:
    missing: Any = StoredTensor.of((2,), "layer.w", None, lambda _path: None)
    with pytest.raises(BismoothError, match=r"the checkpoint has no tensor layer\.w\. Expected one: is it complete\?"):
        missing.sum()
    file = File(tmp_path, (5, 3))
    file.path.write_bytes(file.path.read_bytes()[:-4])
    with pytest.raises(BismoothError, match=r"0\.safetensors: tensor w is cut off at byte \d+\. Get the whole file\."):
        file.tensor.sum()
    eighth = File(tmp_path, (5, 3), ml_dtypes.float8_e4m3fn)
    with pytest.raises(BismoothError, match=r"tensor w has type F8_E4M3\. Expected one of F64, F32, F16, BF16, I64"):
        eighth.tensor.sum()
