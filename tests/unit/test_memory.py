"""Memory that is freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

FREED = """
import numpy as np
from bismooth.engines.memory import current_rss, return_large_blocks
{call}
for _ in range(2):
    np.zeros(7 << 20).fill(1)  # 56 MB: more than glibc ever keeps in its heap
np.zeros(3 << 20).fill(1)  # 24 MB, by which its limit has grown
before = current_rss()
blocks = [np.ones(1 << 20) for _ in range(16)]  # of 8 MB each
del blocks[::2]
print((current_rss() - before) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
@pytest.mark.parametrize(("call", "least", "most"), [("", 110, 140), ("return_large_blocks()", 50, 80)])
def test_large_blocks_leave_no_holes(call: str, least: int, most: int) -> None:
    """Every second of 16 blocks is freed: 64 MB of 128."""
    script = FREED.format(call=call)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert least < int(result.stdout) < most
