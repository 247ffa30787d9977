"""What makes a float32 graph, with Q/DQ or without, fast in ONNX Runtime on a CPU, pass by pass."""

from .cache_in_place import UpdateCachesInPlace
from .driver import Pass
from .fuse_rotary import FuseRotary
from .fuse_skip_norm import FuseSkipNorm
from .last_logits import LastLogits
from .merge_rescale import MergeRescale


def passes_for_onnxruntime(*, last_logits: bool) -> list[Pass]:
    """The passes in order; each leaves a graph that computes the same. ``last_logits`` drops the others."""
    return [
        *([LastLogits()] if last_logits else []),
        MergeRescale(),
        FuseRotary(),
        UpdateCachesInPlace(),  # moves rotary embeddings to where heads are not yet split
        FuseSkipNorm(),
    ]
