"""Weights are read some rows at a time: what comes out does not depend on how many."""

from pathlib import Path

import numpy as np
import pytest

from bismooth.passes import weight_reader
from bismooth.passes.linears import find_linears
from bismooth.passes.open_graph import OpenGraph
from bismooth.passes.progress import silent
from bismooth.passes.quantize import WEIGHTS, quantize_graph
from bismooth.passes.recipe import Recipe
from bismooth.passes.spec import ComputeType, SiteKind
from bismooth.passes.weight_file import WeightFile, write_weights
from bismooth.passes.weight_tasks import WeightSources
from tests.graphs import Builder
from tests.quantizing import HEAD_TOO

K = 64


def chain(layout: str) -> Builder:
    """norm → fc1 → relu → fc2, with walls in both: fc1's columns and rows are divided, fc2's columns."""
    b = Builder()
    h = b.rms_norm(b.tokens("x", K), "norm", K)
    h = b.op("Relu", b.linear(h, "fc1", K, K, layout=layout))
    b.outputs.append(b.linear(h, "fc2", K, K, layout=layout))
    for name, channel in (("fc1", 5), ("fc2", 9)):
        weight = b.initializers[f"{name}.weight"]
        if layout == "NK":
            weight[:, channel] *= 100
        else:
            weight[channel] *= 100
    return b


@pytest.mark.parametrize("layout", ["NK", "KN"])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-mixed"])
def test_the_number_of_rows_that_are_read_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, recipe: str
) -> None:
    b = chain(layout)
    walls = [rule for rule in Recipe.load(recipe).to_dict()["layers"] if rule["match"] == "@walls"]
    chosen = Recipe.from_dict({"extends": recipe, "layers": [HEAD_TOO, *walls]}, name="test")
    source = b.save(tmp_path)
    stored: list[bytes] = []
    for elements in (1 << 22, 7 * K):
        monkeypatch.setattr(weight_reader, "BLOCK", elements)
        folder = tmp_path / str(elements)
        folder.mkdir()
        result = quantize_graph(source, folder, chosen, None)
        stored.append((folder / WEIGHTS).read_bytes())
        if recipe == "w8a8":
            assert [(choice.kind, choice.channels) for choice in result.choices] == [
                (SiteKind.NORM, 1),
                (SiteKind.ELEMENTWISE, 1),
            ]
        else:
            assert [linear.walls for linear in result.linears] == [((5,),), ((9,),)]
    assert stored[0] == stored[1]
    assert len(stored[0]) > K * K * 2


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("layout", ["NK", "KN"])
def test_blocks_are_the_rows_of_the_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, external: bool
) -> None:
    monkeypatch.setattr(weight_reader, "WIDE", 25 * K)
    b = chain(layout)
    model = OpenGraph.load(b.save(tmp_path, external=external))
    reader = weight_reader.WeightReader(model)
    for linear in find_linears(model.graph):
        blocks = [block.copy() for block in reader.blocks(linear, 10 * K)]
        assert [len(block) for block in blocks] == [10] * 6 + [4]
        stored = b.initializers[f"{linear.name}.weight"]
        np.testing.assert_array_equal(np.concatenate(blocks), stored if layout == "NK" else stored.T)


def test_a_declared_tensor_that_nothing_writes_is_no_file(tmp_path: Path) -> None:
    file = WeightFile(tmp_path / WEIGHTS)
    file.declare("orphan", np.dtype(np.int8), (2, 2))
    reader = weight_reader.WeightReader(OpenGraph.load(chain("NK").save(tmp_path)))
    sources = WeightSources(reader, [], {}, {}, {}, ComputeType.FLOAT32)
    with pytest.raises(ValueError, match=r"^1 declared tensors are not written: orphan$"):
        write_weights(file, sources, [], silent)
    assert not file.path.exists()
