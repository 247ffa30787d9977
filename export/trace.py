"""Torch module → ONNX IR (opset 23), traced on tensors without storage."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .errors import BismoothError
from .stamp import SCOPES

OPSET = 23
_AXES = ("batch", "sequence")


def trace_transformer(cls: Any, config: Any, buffers: Mapping[str, torch.Tensor]) -> ir.Model:
    """Trace a transformers model class on fake tensors.

    Inputs ``input_ids`` and ``attention_mask`` are int64 [batch, sequence]; outputs are the tensors of the model's output. Parameters
    become graph initializers without data; ``buffers`` gives the values of those that no checkpoint stores.

    Raises:
        BismoothError: the model cannot be traced.
    """
    from .attention import register

    config = copy.deepcopy(config)
    config.use_cache = False
    config.dtype = torch.float32
    config._attn_implementation = register()
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        model = cls(config).eval()
        inputs = {
            "input_ids": torch.zeros(2, 8, dtype=torch.int64),
            "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        }
        try:
            with torch.no_grad():
                result = cast(Mapping[str, Any], model(**inputs))
            outputs = [name for name, value in result.items() if isinstance(value, torch.Tensor)]
            program = torch.onnx.export(
                model,
                (),
                kwargs=inputs,
                dynamic_shapes={name: dict(enumerate(_AXES)) for name in inputs},
                input_names=list(inputs),
                output_names=outputs,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # whatever the model's own code or the exporter raises
            reason = str(error).strip().splitlines()
            raise BismoothError(
                f"{cls.__name__}: the model cannot be traced: {reason[0] if reason else type(error).__name__} "
                "Export it to ONNX by its own means and pass the .onnx file."
            ) from error
    assert program is not None
    graph = program.model
    _give_buffers(graph, buffers)
    return graph


def _give_buffers(model: ir.Model, buffers: Mapping[str, torch.Tensor]) -> None:
    """Put real values behind the initializers that are computed in the model's code, and none behind its parameters."""
    for name, value in model.graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, FakeTensor):
            continue
        if name in buffers:
            value.const_value = ir.tensor(buffers[name].detach().cpu().contiguous().numpy(), name=name)
        elif raw.constant is not None:
            value.const_value = ir.tensor(raw.constant.numpy(), name=name)
        else:
            value.const_value = None


def simplify(model: ir.Model) -> None:
    """Fold constants, drop what is unused and fuse norms, in place; initializers without data stay as they are."""
    import onnxscript.optimizer
    import onnxscript.rewriter
    from onnxscript.rewriter.rules.fusion import _layer_norm, _rms_normalization

    parameters = [value for value in model.graph.initializers.values() if value.const_value is None]
    for value in parameters:  # as graph inputs, the optimizer cannot try to read them
        model.graph.initializers.pop(cast(str, value.name))
        model.graph.inputs.append(value)
    onnxscript.optimizer.optimize_ir(model)
    onnxscript.rewriter.rewrite(model, _rms_normalization.rms_normalization_ruleset)
    onnxscript.rewriter.rewrite(model, _layer_norm.layer_normalization_ruleset)
    for value in parameters:
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    _inherit_scopes(model)


def _inherit_scopes(model: ir.Model) -> None:
    """Nodes made by the optimizer belong to the module of the node that feeds them."""
    for node in model.graph:
        if SCOPES in node.metadata_props:
            continue
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and SCOPES in producer.metadata_props:
                node.metadata_props[SCOPES] = producer.metadata_props[SCOPES]
                break


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on optional packages and deprecations inside torch."""
    names = ["torch.onnx", "torch.onnx._internal.exporter._registration", "transformers", "torch.fx"]
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
