"""Parameters of a torch model that stay in their files: an operation reads them, in float32, and lets them go again.

Where an operation needs but a part of them, only that is read: a look-up reads rows, a large linear goes through slices
of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch.utils import _pytree

from ..export.errors import BismoothError
from ..export.safetensors_file import TensorEntry

MOST = 1 << 26
"""Bytes of the largest float32 weight that a linear reads as a whole."""

SLICE = 1 << 24
"""Bytes of the float32 copy of a slice."""

_TYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FLOAT_BYTES = 4
_Arguments: TypeAlias = Sequence[Any]
_Options: TypeAlias = Mapping[str, Any]


def read_rows(
    path: Path, entry: TensorEntry, first: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A tensor of a safetensors file, or the rows [first, stop) of it, in another type.

    Raises:
        BismoothError: the file ends before the tensor does, or torch does not have its type.
    """
    if entry.dtype not in _TYPES:
        raise BismoothError(f"{path}: tensor {entry.name} has type {entry.dtype}. Expected one of {', '.join(_TYPES)}.")
    stored, width = _TYPES[entry.dtype], prod(entry.shape[1:])
    count = (entry.shape[0] if entry.shape else 1) if stop is None else stop
    size = (count - first) * width * stored.itemsize
    data = np.fromfile(path, np.uint8, size, offset=entry.offset + first * width * stored.itemsize)
    if data.size != size:
        raise BismoothError(
            f"{path}: tensor {entry.name} is cut off at byte {path.stat().st_size}. Get the whole file."
        )
    shape = (count - first, *entry.shape[1:]) if entry.shape else ()
    return cast(Any, torch).from_numpy(data).view(stored).reshape(shape).to(dtype)


class StoredTensor(torch.Tensor):
    """A float32 tensor in a file, there in another float type as a rule.

    In memory there is one NaN, whatever the shape: an operation that torch does not tell this class about gives NaN.

    Attributes:
        path: what it is of the model, for messages.
        place: its file and entry; None if the checkpoint has no such tensor, which is an error once it is read.
        told: called with ``path`` whenever it is read.
    """

    path: str
    place: tuple[Path, TensorEntry] | None
    told: Callable[[str], None]

    @staticmethod
    def of(
        shape: Sequence[int], path: str, place: tuple[Path, TensorEntry] | None, told: Callable[[str], None]
    ) -> StoredTensor:
        """A parameter of this shape."""
        nan: Any = torch.full((), float("nan")).expand(tuple(shape))
        tensor: StoredTensor = nan.as_subclass(StoredTensor)
        tensor.path, tensor.place, tensor.told = path, place, told
        return tensor

    def load(self, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """The values, or the rows [first, stop) of them, read anew on each call.

        Raises:
            BismoothError: the checkpoint has no such tensor, or its file is cut off.
        """
        if self.place is None:
            raise BismoothError(f"the checkpoint has no tensor {self.path}. Expected one: is it complete?")
        self.told(self.path)
        return read_rows(*self.place, first, stop)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _RUNS.get(func, _run_whole)
        with cast(Any, torch)._C.DisableTorchFunctionSubclass():
            return run(func, args, kwargs or {})


def _run_described(func: Any, args: _Arguments, kwargs: _Options) -> Any:
    """What asks for no values."""
    return func(*args, **kwargs)


def _run_whole(func: Any, args: _Arguments, kwargs: _Options) -> Any:
    """Any operation, on the values."""
    args, kwargs = cast(Any, _pytree).tree_map(_loaded, (tuple(args), dict(kwargs)))
    return func(*args, **kwargs)


def _loaded(value: Any) -> Any:
    return value.load() if isinstance(value, StoredTensor) else value


def _run_linear(func: Any, args: _Arguments, kwargs: _Options) -> Any:
    x, weight, bias = _linear_operands(*args, **kwargs)
    if not isinstance(weight, StoredTensor) or _FLOAT_BYTES * weight.numel() <= MOST:
        return _run_whole(func, (x, weight, bias), {})
    count, width = weight.shape
    x, bias, step = _loaded(x), _loaded(bias), max(1, SLICE // (_FLOAT_BYTES * width))
    result = x.new_empty((*x.shape[:-1], count))
    for start in range(0, count, step):
        stop = min(start + step, count)
        result[..., start:stop] = func(x, weight.load(start, stop), None if bias is None else bias[start:stop])
    return result


def _linear_operands(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """The arguments of ``torch.nn.functional.linear``."""
    return input, weight, bias


def _run_embedding(func: Any, args: _Arguments, kwargs: _Options) -> Any:
    if len(args) != 2 or kwargs.get("max_norm") is not None:  # which would change the table
        return _run_whole(func, args, kwargs)
    ids, table = args
    rows, places = ids.unique(return_inverse=True)
    if not 0 <= rows[0] <= rows[-1] < table.shape[0]:  # they are in order
        raise IndexError(f"index out of range: rows {rows[0]} to {rows[-1]} of {table.shape[0]}")
    parts = [table.load(row, row + 1) for row in rows.tolist()]
    return func(places, torch.cat(parts))


def _run_index(func: Any, args: _Arguments, kwargs: _Options) -> Any:
    """One matrix of a stack, such as an expert's."""
    tensor, index = args
    if not isinstance(tensor, StoredTensor) or not _is_number(index):
        return _run_whole(func, args, kwargs)
    row = range(tensor.shape[0])[int(index)]
    return tensor.load(row, row + 1)[0]


def _is_number(index: Any) -> bool:
    if isinstance(index, torch.Tensor):
        return index.ndim == 0 and not index.is_floating_point() and index.dtype != torch.bool
    return type(index) is int


_tensor: Any = torch.Tensor
_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_meta", "is_cuda", "is_sparse", "requires_grad")
_METHODS = ("size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "__len__", "__hash__")
_RUNS: Mapping[Any, Callable[[Any, _Arguments, _Options], Any]] = {
    **{getattr(_tensor, name).__get__: _run_described for name in _PROPERTIES},
    **{getattr(_tensor, name): _run_described for name in _METHODS},
    torch.nn.functional.linear: _run_linear,
    torch.nn.functional.embedding: _run_embedding,
    _tensor.__getitem__: _run_index,
}
