"""The files beside a graph that turn text into its tokens and back, and end texts and frame chats."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..export.external_data import weight_files
from ..export.source import side_files

_PATTERNS = ("tokenizer*", "config.json", "generation_config.json", "special_tokens_map.json", "*.jinja", "vocab.*")


def place_companions(graph: Path, target: Path) -> None:
    """Copy them from the folder of the ONNX file ``graph`` into ``target``; its weights may be called like them."""
    for file in side_files(graph.parent, weight_files(graph).values(), _PATTERNS):
        if file.suffix != ".onnx":
            shutil.copyfile(file, target / file.name)
