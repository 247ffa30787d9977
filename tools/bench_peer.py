"""ONNX Runtime's own static quantization, for comparison: MatMul only, per channel, MinMax, outputs left float."""

from __future__ import annotations

import sys
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
    source = Path(artifact) / "model.onnx"
    copy = folder / "float.onnx"
    onnx: Any = import_module("onnx")
    model = onnx.load(source, load_external_data=False)
    onnx.load_external_data_for_model(model, artifact)
    onnx.save(model, copy, save_as_external_data=True, location="float.data")
    del model
    quantization: Any = import_module("onnxruntime.quantization")
    quantization.quantize_static(
        str(copy),
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


if __name__ == "__main__":
    main()
