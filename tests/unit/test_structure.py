"""What inspect says of the blocks of a float graph, and of the memory that calibration takes."""

from __future__ import annotations

from pathlib import Path

from bismooth.engines.footprint import MARGIN
from bismooth.tools.structure import find_structure
from tests.graphs import DecoderShape, decoder
from tests.language_model import language_model
from tests.quantized import make, save
from tests.streaming import save_narrow

SHAPE = DecoderShape(layers=3)


def test_blocks_and_bytes(tmp_path: Path) -> None:
    found = find_structure(save_narrow(decoder(SHAPE, tied=False), tmp_path))
    assert found is not None
    s = SHAPE
    matrices = s.hidden * s.head_size * (2 * s.heads + 2 * s.kv_heads) + 3 * s.hidden * s.ffn
    assert found["count"] == 3
    assert (
        2 * matrices < found["largest_bytes"] < 2 * matrices + 4 * 2 * s.hidden + 500
    )  # two norms and small constants
    assert found["embedding_bytes"] == 2 * s.vocab * s.hidden
    assert found["head_bytes"] == 2 * s.vocab * s.hidden + 4 * s.hidden
    assert MARGIN < found["calibrate_bytes"] < 2 * 10**9


def test_a_graph_without_blocks(tmp_path: Path) -> None:
    assert find_structure(language_model(tmp_path)) is None


def test_a_graph_without_linears(tmp_path: Path) -> None:
    assert find_structure(save(make("(float[2] x) => (float[2] y) { y = Relu(x) }"), tmp_path)) is None
