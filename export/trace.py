"""Torch module → ONNX IR (opset 23), traced on tensors without storage."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import _trace as _export_trace

from .cache import KvCache, example_cache
from .errors import BismoothError
from .graph_names import (
    ATTENTION_MASK,
    BATCH,
    INPUT_IDS,
    PAST,
    PAST_LENGTH,
    POSITION_IDS,
    PRESENT,
    SEQUENCE,
    TOTAL,
    is_present,
)
from .scopes import SCOPES

OPSET = 23
_LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter._registration", "transformers", "torch.fx")


@dataclass(frozen=True)
class FakeTransformer:
    """A transformers model whose tensors have no storage, and what to call it with.

    Attributes:
        inputs: ``input_ids`` [batch, sequence] and ``attention_mask`` [batch, total] int64; with a cache also
            ``position_ids`` [batch, sequence], if the model takes any.
        cache: keys and values [batch, kv_heads, past, head_dim], or None.
    """

    model: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    cache: KvCache | None

    @property
    def arguments(self) -> dict[str, Any]:
        """All that the model is called with; the call changes a cache, so each gets its own."""
        cache = self.cache
        return self.inputs if cache is None else self.inputs | {PAST: KvCache(cache.tensors, cache.numbers)}


@contextmanager
def fake_transformer(cls: Any, config: Any, *, kv_cache: bool = False) -> Generator[FakeTransformer]:
    """A transformers model in float32 and its inputs, all without storage, as is every new tensor in the block.

    Raises:
        BismoothError: the model's code, run inside the block, fails, or it has no cache of keys and values.
    """
    from transformers.initialization import no_init_weights

    from .attention import register

    config = copy.deepcopy(config)
    config.use_cache = kv_cache
    config.dtype = torch.float32
    config._attn_implementation = register()
    batch, sequence, past = 2, 8, 5 if kv_cache else 0
    with cannot_trace(cls.__name__), quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with no_init_weights():
            model = cls(config).eval()
        inputs = {
            INPUT_IDS: torch.zeros(batch, sequence, dtype=torch.int64),
            ATTENTION_MASK: torch.ones(batch, sequence, dtype=torch.int64),
        }
        cache = None
        if kv_cache:
            cache = example_cache(model, past, inputs)
            inputs[ATTENTION_MASK] = torch.ones(batch, past + sequence, dtype=torch.int64)
            if POSITION_IDS in inspect.signature(cls.forward).parameters:
                inputs[POSITION_IDS] = torch.zeros(batch, sequence, dtype=torch.int64)
        yield FakeTransformer(model, inputs, cache)


def trace_transformer(
    cls: Any, config: Any, buffers: Mapping[str, torch.Tensor], *, kv_cache: bool = False
) -> ir.Model:
    """Trace a transformers model class on fake tensors.

    Inputs are ``input_ids`` int64 [batch, sequence] and ``attention_mask`` int64 [batch, sequence]; outputs are the
    tensors of the model's output. Parameters become graph initializers without data; ``buffers`` gives the values of
    those that no checkpoint stores (:func:`own_tensors`).

    With ``kv_cache`` the mask is [batch, total] and there are further inputs ``position_ids`` [batch, sequence], if
    the model takes any, and ``past_key_values.{i}.key`` and ``.value`` [batch, kv_heads, past, head_dim]; further
    outputs are ``present.{i}.key`` and ``.value`` [batch, kv_heads, total, head_dim], where total = past + sequence.

    Raises:
        BismoothError: the model cannot be traced.
    """
    with fake_transformer(cls, config, kv_cache=kv_cache) as fake:
        result = cast(Mapping[str, Any], fake.model(**fake.arguments))
        outputs = [name for name, value in result.items() if isinstance(value, torch.Tensor)]
        shapes: dict[str, Any] = {name: {0: BATCH, 1: SEQUENCE} for name in fake.inputs}
        names = list(fake.inputs)
        if fake.cache is not None:
            shapes[ATTENTION_MASK] = {0: BATCH, 1: TOTAL}
            shapes[PAST] = [{0: BATCH, 2: PAST_LENGTH} for _ in fake.cache.tensors]
            names += fake.cache.names(PAST)
            outputs += fake.cache.names(PRESENT)
        _name_parameters(fake.model, list(fake.arguments))
        graph = trace(
            fake.model,
            kwargs=fake.arguments,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=outputs,
        )
    for value in graph.graph.outputs:
        if is_present(cast(str, value.name)):  # the exporter calls it "past + sequence"
            batch, heads, _, size = cast(ir.Shape, value.shape)
            value.shape = ir.Shape([batch, heads, TOTAL, size])
    give_values(graph, buffers)
    return graph


def _name_parameters(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Let the model's ``forward`` show these parameters: torch gives no shapes to those that ``**kwargs`` takes."""
    forward = cast(Any, model.forward)

    def named(**arguments: Any) -> Any:
        return forward(**arguments)

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    cast(Any, named).__signature__ = inspect.Signature(parameters)
    model.forward = named


def trace(
    module: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ir.Model:
    """Trace a module whose parameters are fake; options as those of ``torch.onnx.export``."""
    program = cast(Any, torch.onnx).export(
        module,
        args,
        kwargs=dict(kwargs or {}),
        dynamic_shapes=dynamic_shapes,
        input_names=input_names,
        output_names=output_names,
        dynamo=True,
        opset_version=OPSET,
        optimize=False,
        verbose=False,
    )
    return cast(ir.Model, program.model)


def own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that a module's code makes, by path: its buffers, and attributes that are registered as nothing."""
    result = dict(module.named_buffers())
    modules: Iterable[tuple[str, torch.nn.Module]] = cast(Any, module).named_modules()
    for path, part in modules:
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor) and not value.is_meta:
                result[f"{path}.{name}" if path else name] = value
    return result


def give_values(model: ir.Model, buffers: Mapping[str, torch.Tensor]) -> None:
    """Put ``buffers`` behind the initializers of these names, and nothing behind the others that have no storage."""
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
def cannot_trace(name: str) -> Generator[None]:
    """Whatever fails inside the block is the model's fault: its own code and the exporter raise errors of all kinds.

    Raises:
        BismoothError: something failed.
    """
    try:
        yield
    except BismoothError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps what happened in advice on itself
            cause = cause.__cause__
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise BismoothError(
            f"{name}: the model cannot be traced: {reason[0]} "
            "Export it to ONNX by its own means and pass the .onnx file."
        ) from error


@contextmanager
def quiet() -> Generator[None]:
    """Silence the exporter: notes on optional packages and axes, its own deprecations, dumps of graphs that fail."""
    exporter = cast(Any, _export_trace)
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):  # torch uses what it deprecates itself
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", message="# The axis name: .* will not be used")  # the name is used, once
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        exporter.print = _say_nothing  # shadows the builtin in that one module
        try:
            yield
        finally:
            del exporter.print
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _say_nothing(*_: Any, **__: Any) -> None:
    return
