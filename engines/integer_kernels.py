"""Whether ONNX Runtime's products of UINT8 and INT8 are exact on this CPU.

Its kernels for x86 without VNNI add pairs of products in 16 bits and saturate there. What a CPU has does not tell which
kernel will run (AMX, VNNI, AVX2, …), so the kernels are tried.
"""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

import numpy as np

DEPTH = 64
"""Terms of each sum."""

#: y [m, 64] = MatMulInteger(x UINT8 [m, 64], w), where w [64, 64] is 127 in the first 32 columns and -127 in others.
MODEL = base64.b85decode(
    "2nags0SYn-1#@U&aAgt!a3T*wZ*FsRVQzF!W>aWkaAhhL3I%pyY;|QS2?zlY11bT3LI9uv1PVI}1#@U&aAgt!ZXypuZ*FsRVQzF!"
    "W>aWkaAhhU3I%pyY;|QS5(ohh11buE|NsC0|NsC00YU(v0R##j3IT8m0d5ijcOnKuZ*F5@bSeu91Yvk-a~J`j0Rjpb3ITWu0e2Ds"
    "c_Ix>VRTJ(Y)Ni(WoKn_5&>r_4+sJf2RZ^kAVLLmXkl<=S`-QacoGi^4G01f2?_%e0c{Eb2tZ;K3ITZ%4+;$k1`-Jh0}=sk3IYf~"
    "LIer`5Df"
)
_ROWS = (1, 64)
"""Kernels for one row and for many differ."""


@cache
def products_saturate(runtime: Any) -> bool:
    """Whether the largest products of UINT8 and INT8 come out wrong in the module ``onnxruntime``; tried once."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
    exact = DEPTH * 255 * np.repeat(np.array([127, -127]), 32)
    products = [session.run(None, {"x": np.full((rows, DEPTH), 255, np.uint8)})[0] for rows in _ROWS]
    return any((product != exact).any() for product in products)
