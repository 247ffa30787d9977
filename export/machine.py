"""What of this machine decides the last bits of results: its kind of CPU. (And the number of its :mod:`.cores`.)

NOTE: threadpoolctl looks for the loaded libraries by ``dl_iterate_phdr``, whose callback looks up symbols. glibc takes
two locks for that, in the other order than a thread that ends elsewhere: a deadlock, seen once beside the threads of
ONNX Runtime. So it looks once, on import.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import numpy as np

BLAS: Any = import_module("threadpoolctl").ThreadpoolController()
"""The libraries that multiply matrices, those that NumPy has loaded among them."""


def kind_of_cpu() -> dict[str, str]:
    """The instructions that NumPy uses here, and for which kind of CPU its BLAS has chosen kernels."""
    build = cast(Any, np.show_config(mode="dicts"))
    libraries = [library for library in BLAS.info() if "numpy" in library["filepath"]]
    kernels = [f"{each['internal_api']} {each['version']} {each.get('architecture')}" for each in libraries]
    return {"kind of CPU": " ".join(build["SIMD Extensions"]["found"]), "BLAS": ", ".join(kernels)}
