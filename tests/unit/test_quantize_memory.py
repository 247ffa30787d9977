"""The memory that quantization says it takes, and what happens where there is less."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.graph import load
from bismooth.passes.linears import find_linears
from bismooth.passes.quantize_memory import quantize_memory
from bismooth.tools import stages
from tests.models import exported, make_model

MEASURE = """
import sys
from pathlib import Path
from bismooth.engines.memory import peak_rss
from bismooth.tools import stages
stages.quantize(sys.argv[1], "w8a8", sys.argv[2], data_free=True, memory=int(sys.argv[3]))
print(peak_rss())
"""


def test_more_workers_and_more_tokens_take_more() -> None:
    linears = find_linears(load(exported("llama").graph))
    assert quantize_memory(linears, 0, 1) < quantize_memory(linears, 256, 1) < quantize_memory(linears, 256, 2)


def test_the_least_memory_is_named_and_is_enough(tmp_path: Path) -> None:
    folder = tmp_path / "float"
    make_model("llama", tmp_path / "source")
    stages.export(tmp_path / "source", folder)
    message = r"--memory 1MB: is too little to quantize .*Expected \d+MB or more"
    with pytest.raises(BismoothError, match=message) as error:
        stages.quantize(folder, "w8a8", tmp_path / "q", data_free=True, memory=10**6)
    found = re.search(r"Expected (\d+)MB", str(error.value))
    assert found is not None
    budget = int(found[1]) * 10**6
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "q"), str(budget)]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak <= budget
