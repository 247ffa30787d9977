"""Whether an attention mask hides what comes later."""

import numpy as np
import onnx
import onnx.reference

from ..export.cache_names import is_past
from ._gs import Array, Graph, Tensor, dtype_of, export_model
from .graph import Index

_BATCH, _PAST, _NEW = 2, 3, 4


def is_causal(mask: str, graph: Graph) -> bool:
    """Whether no position attends to a later one in a Boolean mask [.., sequence, past + sequence], computed once.

    The mask is computed for rows of 7 tokens without padding, 3 of them in the caches.
    """
    part = graph.copy()
    part.outputs[:] = [Index.of(part).values[mask]]
    part.cleanup()
    feeds = {tensor.name: _example(tensor) for tensor in part.inputs if tensor.outputs}
    evaluator = onnx.reference.ReferenceEvaluator(export_model(part))
    (values,) = evaluator.run(None, feeds)
    later = np.arange(_PAST + _NEW) > np.arange(_PAST, _PAST + _NEW)[:, None]
    return bool(values.shape[-2:] == later.shape and not (values & later).any())


def _example(tensor: Tensor) -> Array:
    """Values of an input: ones for masks, and counted up for positions."""
    if is_past(tensor.name):
        return np.zeros([dim if isinstance(dim, int) else (_PAST if axis else _BATCH) for axis, dim in _axes(tensor)])
    length = _PAST + _NEW if tensor.name == "attention_mask" else _NEW
    shape = [dim if isinstance(dim, int) else (length if axis else _BATCH) for axis, dim in _axes(tensor)]
    values = np.broadcast_to(np.arange(_PAST, _PAST + length), shape) if "position" in tensor.name else np.ones(shape)
    return values.astype(dtype_of(tensor))
