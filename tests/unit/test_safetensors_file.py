"""The safetensors format: golden bytes, every broken file, and files that other libraries read and write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import numpy as _safetensors_numpy

from bismooth.export.errors import BismoothError
from bismooth.export.safetensors_file import (
    DTYPES,
    SafetensorsWriter,
    TensorEntry,
    dtype_name,
    read_header,
    read_tensor,
)

safetensors_numpy: Any = _safetensors_numpy
Array = NDArray[Any]

GOLDEN = (
    b"\x78\x00\x00\x00\x00\x00\x00\x00"
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"I8","shape":[1,3],"data_offsets":[8,11]}}'
    b"           "
    b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    b"\x01\x02\xfd"
)
TENSORS: dict[str, Array] = {"a": np.array([1, -2], np.float32), "b": np.array([[1, 2, -3]], np.int8)}


def save(path: Path, tensors: dict[str, Array], metadata: dict[str, str] | None = None) -> None:
    declared = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with SafetensorsWriter(path, declared, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_the_bytes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, TENSORS)
    assert path.read_bytes() == GOLDEN
    assert read_header(path) == {
        "a": TensorEntry("a", "F32", (2,), 128, 8),
        "b": TensorEntry("b", "I8", (1, 3), 136, 3),
    }
    for name, entry in read_header(path).items():
        np.testing.assert_array_equal(read_tensor(path, entry), TENSORS[name], strict=True)


def test_tensors_may_be_written_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, [(name, tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()]) as writer:
        writer.write("b", TENSORS["b"])
        writer.write("a", TENSORS["a"])
    assert path.read_bytes() == GOLDEN


def test_a_tensor_may_be_written_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, [(name, tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()]) as writer:
        writer.write_pieces("b", (TENSORS["b"][:, part] for part in (slice(2), slice(2, 3))))
        writer.write("a", TENSORS["a"])
    assert path.read_bytes() == GOLDEN


def test_the_library_of_the_format_reads_what_is_written(tmp_path: Path) -> None:
    tensors = TENSORS | {"scalar": np.array(3, np.int64), "empty": np.zeros((0, 4), np.float16)}
    save(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    loaded = safetensors_numpy.load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor, strict=True)


@given(
    st.dictionaries(
        st.text(min_size=1),
        st.tuples(
            st.sampled_from(["float32", "float16", "int8", "uint64", "bool"]), st.lists(st.integers(0, 4), max_size=3)
        ),
        max_size=5,
    )
)
def test_what_the_library_of_the_format_writes_is_read(tmp_path_factory: pytest.TempPathFactory, spec: Any) -> None:
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    tensors = {name: np.ones(shape, dtype) for name, (dtype, shape) in spec.items()}
    path.write_bytes(safetensors_numpy.save(tensors))
    entries = read_header(path)
    assert entries.keys() == tensors.keys()
    for name, entry in entries.items():
        np.testing.assert_array_equal(read_tensor(path, entry), tensors[name], strict=True)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(tmp_path: Path, name: str) -> None:
    assert dtype_name(DTYPES[name]) == name
    tensor = np.array([0, 1, 1]).astype(DTYPES[name])
    save(tmp_path / "x", {"t": tensor})
    read = read_tensor(tmp_path / "x", read_header(tmp_path / "x")["t"])
    assert read.dtype == tensor.dtype
    assert read.tobytes() == tensor.tobytes()


def header_only(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def tensor(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


FOUR = b"1234"
ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "its header claims 0 bytes and the file has 0"),
    "seven bytes": (b"1234567", "and the file has 7"),
    "header longer than the file": (header_only({}, length=3), "its header claims 3 bytes and the file has 10"),
    "header of exabytes": (b"\xff" * 8 + b"{}", "its header claims 18446744073709551615 bytes and the file has 10"),
    "no JSON": (header_only(b"\x80\x04pickle"), "its header cannot be read"),
    "not an object": (header_only([1]), "its header cannot be read"),
    "deep": (header_only(b"[" * 100_000), "its header cannot be read"),
    "tensor is no object": (header_only({"t": 4}), "its header cannot be read"),
    "no shape": (header_only({"t": {"dtype": "U8", "data_offsets": [0, 4]}}, FOUR), "its header cannot be read"),
    "unknown dtype": (header_only({"t": tensor("F4")}, FOUR), "tensor t has dtype F4, which is none of F64, F32"),
    "dtype is a list": (header_only({"t": tensor([1])}, FOUR), "its header cannot be read"),
    "name twice": (
        header_only(
            b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"1",
        ),
        "t stands there twice",
    ),
    "shape too big": (header_only({"t": tensor(shape=(5,))}, FOUR), r"has 4 bytes, its shape \[5\] needs 5"),
    "shape overflows": (header_only({"t": tensor(shape=(2**32, 2**32))}, FOUR), "needs 18446744073709551616"),
    "negative shape": (header_only({"t": tensor(shape=(-2, -2))}, FOUR), r"sizes that are no counts: \[-2, -2\]"),
    "fractional shape": (header_only({"t": tensor(shape=(4.0,))}, FOUR), "sizes that are no counts"),
    "true shape": (header_only({"t": tensor(shape=(True,), offsets=(0, 1))}, b"1"), "sizes that are no counts"),
    "negative offset": (header_only({"t": tensor(offsets=(-4, 0))}, FOUR), "sizes that are no counts"),
    "offsets swapped": (header_only({"t": tensor(offsets=(4, 0))}, FOUR), "sizes that are no counts"),
    "three offsets": (header_only({"t": tensor(offsets=(0, 4, 8))}, FOUR), "its header cannot be read"),
    "hole at the start": (header_only({"t": tensor(offsets=(1, 5))}, b"12345"), "starts at byte .* ends at"),
    "hole": (header_only({"t": tensor(), "u": tensor(offsets=(5, 9))}, b"123456789"), "tensor u starts at byte"),
    "overlap": (header_only({"t": tensor(), "u": tensor(offsets=(2, 6))}, b"123456"), "tensor u starts at byte"),
    "cut off": (header_only({"t": tensor()}, b"123"), "its tensors end at byte .* and the file has"),
    "bytes left over": (header_only({"t": tensor()}, b"12345"), "its tensors end at byte .* and the file has"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_broken_file_is_refused(tmp_path: Path, attack: str) -> None:
    content, reason = ATTACKS[attack]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BismoothError, match=f"not a valid safetensors file: .*{reason}") as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "Download or write the file again." in str(caught.value)


@given(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255))
def test_a_changed_byte_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    path.write_bytes(GOLDEN[:place] + bytes([value]) + GOLDEN[place + 1 :])
    try:
        entries = read_header(path)
    except BismoothError:
        return
    assert sum(entry.length for entry in entries.values()) == 11


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, TENSORS)
    entry = read_header(path)["a"]
    os.truncate(path, entry.offset + 5)
    with pytest.raises(BismoothError, match=rf"tensor a is cut off at byte {entry.offset + 5}\. Get the whole file\."):
        read_tensor(path, entry)


def test_a_dtype_that_the_format_lacks() -> None:
    with pytest.raises(ValueError, match="safetensors files have no dtype complex64"):
        dtype_name(np.dtype(np.complex64))


def test_a_tensor_that_is_declared_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor a is declared twice"):
        SafetensorsWriter(tmp_path / "x", [("a", np.dtype(np.int8), (1,))] * 2)


Write = Callable[[SafetensorsWriter], None]
WRONG: dict[str, tuple[Write, str]] = {
    "shape": (lambda writer: writer.write("a", np.zeros(3, np.float32)), r"a: declared F32 \(2,\), got float32 \(3,\)"),
    "dtype": (lambda writer: writer.write("a", np.zeros(2, ml_dtypes.bfloat16)), r"a: declared F32 \(2,\), got bfloat"),
    "pieces of another dtype": (
        lambda writer: writer.write_pieces("a", [np.zeros(1, np.float32), np.zeros(1, np.int32)]),
        "a: declared F32, got a piece of int32",
    ),
    "too few pieces": (
        lambda writer: writer.write_pieces("a", [np.zeros(1, np.float32)]),
        "a: declared 8 bytes, got pieces of 4",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_tensor_other_than_declared(tmp_path: Path, wrong: str) -> None:
    write, message = WRONG[wrong]
    with (
        pytest.raises(ValueError, match=message),
        SafetensorsWriter(tmp_path / "x", [("a", np.dtype(np.float32), (2,))]) as writer,
    ):
        write(writer)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_was_declared_and_not_written(tmp_path: Path) -> None:
    declared = [(name, np.dtype(np.int8), (1,)) for name in "abcde"]
    with (
        pytest.raises(ValueError, match="x: 4 declared tensors were not written: a, b, d"),
        SafetensorsWriter(tmp_path / "x", declared) as writer,
    ):
        writer.write("c", np.zeros(1, np.int8))
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save(path, TENSORS)
    with pytest.raises(ZeroDivisionError), SafetensorsWriter(path, []):
        raise ZeroDivisionError
    assert path.read_bytes() == GOLDEN


def test_a_link_is_replaced_and_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    os.link(tmp_path / "precious", tmp_path / "x")
    save(tmp_path / "x", TENSORS)
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "x").read_bytes() == GOLDEN
