"""Any torch module as the contents of an artifact folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ._ir import save_ir
from .artifact import Manifest
from .errors import BismoothError
from .link import link_weights
from .naming import name_constants, name_nodes
from .safetensors_file import SafetensorsWriter, dtype_name
from .source import WEIGHTS, read_weights
from .trace import cannot_trace, give_values, own_tensors, quiet, simplify, trace
from .versions import tool_versions

GRAPH = "model.onnx"
_map_tensors: Any = cast(Any, pytree).tree_map_only


def export_module(
    module: torch.nn.Module,
    folder: Path,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Manifest:
    """Write ``model.onnx`` (FP32 compute, opset 23) and ``model.safetensors`` of a module into ``folder``.

    The state dict is written tensor by tensor, in its own types; tensors that share storage are written once. The
    module is exported as it is in evaluation mode; neither it nor its tensors are changed.

    Args:
        module: floating-point tensors of any float type.
        folder: an existing empty folder.
        args: example inputs; floating-point ones become FP32 inputs of the graph.
        kwargs: example inputs by name.
        dynamic_shapes: which sizes may vary and how they are called, as in ``torch.onnx.export``:
            ``({0: "batch"},)`` for one input with a dynamic first axis.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs.

    Returns:
        The manifest, without ``files``; the caller writes it when the folder is complete.

    Raises:
        BismoothError: the module cannot be traced, or has a tensor of a type that safetensors files lack.
    """
    name = type(module).__name__
    state = cast(dict[str, torch.Tensor], module.state_dict(keep_vars=True))
    if any(tensor.is_meta for tensor in state.values()):
        raise BismoothError(f"{name}: the module has tensors without values (device meta). Load its weights first.")
    names = _distinct(state)
    _write_state({stored: state[stored] for stored in dict.fromkeys(names.values())}, folder / WEIGHTS, name)
    made = own_tensors(module)
    computed = {key: _floats(t) for key, t in made.items() if key not in state or not t.is_floating_point()}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with cannot_trace(name), quiet(), torch.no_grad():
        double = _without_storage(module, mode)
        examples = _floats((args, dict(kwargs or {})))
        with mode:
            model = trace(
                double,
                *examples,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
            )
    give_values(model, computed)
    simplify(model)
    weights = read_weights([folder / WEIGHTS])
    link_weights(model, weights, names)
    name_constants(model, set(weights.entries))
    name_nodes(model)
    save_ir(model, folder / GRAPH)
    return Manifest(
        kind="float",
        source={"path": name, "format": "torch", "fingerprint": weights.fingerprint()},
        graphs={"float32": GRAPH},
        architecture=name,
        tools=tool_versions(),
    )


def _distinct(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Name → the first name of the same tensor."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault((id(t) if t.numel() == 0 else t.data_ptr(), t.dtype, t.shape, t.stride()), name)
        for name, t in state.items()
    }


def _write_state(state: Mapping[str, torch.Tensor], path: Path, module: str) -> None:
    def numpy_dtype(tensor: torch.Tensor) -> np.dtype[Any]:
        if tensor.dtype == torch.bfloat16:
            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(str(tensor.dtype).removeprefix("torch."))

    try:
        declared = [(name, numpy_dtype(tensor), tuple(tensor.shape)) for name, tensor in state.items()]
        for _, dtype, _ in declared:
            dtype_name(dtype)
    except (TypeError, ValueError) as error:
        raise BismoothError(
            f"{module}: its state has a tensor that cannot be stored: {error}. Expected float and integer tensors."
        ) from error
    with SafetensorsWriter(path, declared, {"format": "pt"}) as writer:
        for name, dtype, shape in declared:
            writer.write(name, _values(state[name], dtype).reshape(shape))


def _values(tensor: torch.Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().view(dtype)


def _without_storage(module: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """A copy of ``module`` in evaluation mode; its parameters and buffers have no storage, and all floats are FP32."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            empty = torch.empty(tensor.shape, dtype=_float(tensor.dtype))
        return torch.nn.Parameter(empty, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else empty

    tensors = [*module.parameters(), *own_tensors(module).values()]
    memo: dict[int, Any] = {id(tensor): fake(tensor) for tensor in tensors}
    return copy.deepcopy(module, memo).eval()


def _float(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _floats(values: Any) -> Any:
    """The same structure with floating-point tensors in FP32 on the CPU."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", _float(tensor.dtype))

    return _map_tensors(torch.Tensor, convert, values)
