"""What of this machine decides the last bits of results: its kind of CPU, and how many threads share an operator.

NOTE: threadpoolctl looks for the loaded libraries by ``dl_iterate_phdr``, whose callback looks up symbols. glibc takes
two locks for that, in the other order than a thread that ends elsewhere: a deadlock, seen once beside the threads of
ONNX Runtime. So it looks once, on import.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

BLAS: Any = import_module("threadpoolctl").ThreadpoolController()
"""The libraries that multiply matrices, those that NumPy has loaded among them."""

_CPUS = Path("/sys/devices/system/cpu")


def kind_of_cpu() -> dict[str, str]:
    """The instructions that NumPy uses here, and for which kind of CPU its BLAS has chosen kernels."""
    build = cast(Any, np.show_config(mode="dicts"))
    libraries = [library for library in BLAS.info() if "numpy" in library["filepath"]]
    kernels = [f"{each['internal_api']} {each['version']} {each.get('architecture')}" for each in libraries]
    return {"kind of CPU": " ".join(build["SIMD Extensions"]["found"]), "BLAS": ", ".join(kernels)}


def default_threads() -> int:
    """Threads that share an operator of ONNX Runtime: one per core that this process may run on.

    A product of float32 is cut among them, and where it is cut decides how its sums are rounded. So this number is part
    of what a run depends on, and is given to every machine that takes part in it.
    """
    try:
        return len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _core_of(cpu: int) -> str:
    """Tells the core of a logical CPU from others: all that belong to it, where the system says so."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text("ascii").strip()
    except OSError:
        return str(cpu)
