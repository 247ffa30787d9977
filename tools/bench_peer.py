"""ONNX Runtime's own static quantization, for comparison: MatMul only, per channel, MinMax, outputs left float.

Prints the seconds of ``quantize_static`` alone; the process also prepares the graph, as its documentation asks for.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibrators.data import load_tokenizer, load_windows

WINDOWS, LENGTH = 8, 512


class _Reader:
    """Feeds of the calibration windows, as ONNX Runtime's quantizer asks for them."""

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self._windows: Iterator[NDArray[np.int64]] = iter(ids)

    def get_next(self) -> dict[str, NDArray[np.int64]] | None:
        window = next(self._windows, None)
        if window is None:
            return None
        return {"input_ids": window[None], "attention_mask": np.ones_like(window[None])}


def main() -> None:
    """``python -m bismooth.tools.bench_peer ARTIFACT OUTPUT TEXT…``."""
    artifact, output, *texts = sys.argv[1:]
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    ids = load_windows(texts, load_tokenizer(Path(artifact)), windows=WINDOWS, length=LENGTH).ids
    for name in ("model.onnx", *(path.name for path in Path(artifact).glob("model*.safetensors"))):
        shutil.copyfile(Path(artifact) / name, folder / name)  # onnx refuses external data that is hard-linked
    preparation: Any = import_module("onnxruntime.quantization.shape_inference")
    prepared = folder / "prepared.onnx"  # with the weights' Transposes folded: it quantizes no weight behind one
    preparation.quant_pre_process(
        str(folder / "model.onnx"), str(prepared), skip_symbolic_shape=True, save_as_external_data=True
    )
    quantization: Any = import_module("onnxruntime.quantization")
    start = time.perf_counter()
    quantization.quantize_static(
        str(prepared),
        str(folder / "int8.onnx"),
        _Reader(ids),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"ActivationSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    sys.stdout.write(json.dumps({"quantize_static_seconds": time.perf_counter() - start}) + "\n")


if __name__ == "__main__":
    main()
