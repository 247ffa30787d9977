"""The files beside a graph that turn text into its tokens and back, and end texts and frame chats."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..export.external_data import weight_files

_PATTERNS = ("tokenizer*", "config.json", "generation_config.json", "special_tokens_map.json", "*.jinja", "vocab.*")


def place_companions(graph: Path, target: Path) -> None:
    """Copy them from the folder of the ONNX file ``graph`` into ``target``; its weights may be called like them."""
    weights = weight_files(graph)
    for pattern in _PATTERNS:
        for file in graph.parent.glob(pattern):
            if file.is_file() and file.suffix != ".onnx" and file.name not in weights:
                shutil.copyfile(file, target / file.name)
