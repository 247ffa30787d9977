"""Subnormal numbers as zero, in a thread.

The softmax of a causal mask gives numbers like 1e-45 for every masked position. x86 cores take more than a hundred
cycles for an operation that makes or takes one, so attention needs about twice the time. No sum of probabilities can
tell 1e-45 from 0.

NOTE: the setting belongs to a thread and is inherited by those it starts. Set it in threads of our own only: a caller
whose arithmetic loses its smallest numbers would not know why.
"""

import ctypes
import platform
import sys

_MXCSR = 28
"""Where ``fenv_t`` of glibc and musl on x86-64 keeps the control register of the vector units."""
_FLUSH_RESULTS, _ZERO_INPUTS = 1 << 15, 1 << 6


def flush_subnormals() -> None:
    """Make this thread treat subnormal inputs and results as zero, where that is known to pay: on Linux on x86-64."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return
    environment = ctypes.create_string_buffer(64)
    try:
        libm = ctypes.CDLL(None)  # which Python is linked to
        if libm.fegetenv(environment):
            return
    except (OSError, AttributeError):  # a Python that is linked otherwise works too, only slower
        return
    control = int.from_bytes(environment[_MXCSR : _MXCSR + 4], sys.byteorder) | _FLUSH_RESULTS | _ZERO_INPUTS
    environment[_MXCSR : _MXCSR + 4] = control.to_bytes(4, sys.byteorder)
    libm.fesetenv(environment)
