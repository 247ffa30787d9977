"""Calibration of a tiny model: numbers against float64, the same bytes every time, activations that are not finite."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

from bismooth.calibrators import gram
from bismooth.calibrators.histogram import BINS, EDGES
from bismooth.calibrators.observe import Taps, instrument
from bismooth.calibrators.run import Observe, calibrate, sample_rows
from bismooth.calibrators.statistics import Statistics
from bismooth.engines.onnxruntime import Session
from bismooth.engines.piece_run import Batch
from bismooth.engines.subgraph import parse_graph
from bismooth.export.errors import BismoothError
from bismooth.passes.graph import load
from bismooth.passes.linears import find_linears
from tests.graphs import DecoderShape, decoder

VOCAB, HIDDEN, INNER = 13, 8, 24
#: Channels of [B, S, K], [B, S, 3K], [B·S, 3K], [B, K] (one row per window), float16 [B, S, K]
VALUES = {"x": HIDDEN, "hidden": INNER, "flat": INNER, "pooled": HIDDEN, "half": HIDDEN}
WINDOWS = np.random.default_rng(7).integers(1, VOCAB, (5, 16))


def tensor(name: str, shape: tuple[int, ...], offset: int) -> TensorProto:
    result = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", str(offset)), ("length", str(4 * int(np.prod(shape))))):
        result.external_data.add(key=key, value=value)
    return result


def make_artifact(folder: Path, embedding: NDArray[np.float32] | None = None) -> Path:
    rng = np.random.default_rng(3)
    weights = [
        rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32) * 10 if embedding is None else embedding,
        rng.standard_normal((HIDDEN, INNER)).astype(np.float32),
        np.full((INNER, VOCAB), np.nan, np.float32),  # the head: observing what lies before must not run it
    ]
    folder.mkdir(parents=True)
    (folder / "w.bin").write_bytes(b"".join(w.tobytes() for w in weights))
    (folder / "tokenizer.json").write_text("{}")
    make = helper.make_node
    nodes = [
        make("Gather", ["embed", "input_ids"], ["x"], "embed"),
        make("MatMul", ["x", "up"], ["hidden"], "up/MatMul"),
        make("Flatten", ["hidden"], ["flat"], "flat", axis=2),
        make("Gather", ["x", "position"], ["pooled"], "pool", axis=1),
        make("Cast", ["x"], ["half"], "half", to=TensorProto.FLOAT16),
        make("MatMul", ["hidden", "head"], ["logits"], "head/MatMul"),
    ]
    shape = ["batch", "sequence"]
    graph = helper.make_graph(
        nodes,
        "lm",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, VOCAB])],
        [
            tensor("embed", (VOCAB, HIDDEN), 0),
            tensor("up", (HIDDEN, INNER), 4 * VOCAB * HIDDEN),
            tensor("head", (INNER, VOCAB), 4 * (VOCAB + INNER) * HIDDEN),
            numpy_helper.from_array(np.array(0), "position"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("artifacts") / "artifact")


@pytest.fixture(scope="module")
def activations(artifact: Path) -> dict[str, NDArray[np.float64]]:
    """All rows [T, K] of every value, by a run that keeps them."""
    with Session(artifact / "model.onnx", values=list(VALUES), mode="plain") as session:
        results = session.run(session.token_feeds(WINDOWS), list(VALUES))
    return {name: value.reshape(-1, value.shape[-1]).astype(np.float64) for name, value in results.items()}


def run(artifact: Path, output: Path, **options: Any) -> Statistics:
    settings: dict[str, Any] = {"rows": 9, "threads": 1, "histograms": True}
    return calibrate(artifact, VALUES, WINDOWS, output, **(settings | options))


def test_statistics_against_float64(
    artifact: Path, activations: dict[str, NDArray[np.float64]], tmp_path: Path
) -> None:
    statistics = run(artifact, tmp_path / "s.safetensors")
    assert statistics.names == tuple(VALUES)
    for name, x in activations.items():
        assert (statistics.absmax(name) == np.abs(x).max(axis=0)).all(), name
        histogram = statistics.histogram(name)
        assert histogram.total == x.size
        assert histogram.absmax == np.abs(x).max()
        # Cumulative counts agree but for values within rounding of an edge.
        below = np.searchsorted(np.sort(np.abs(x).ravel()), [EDGES * (1 - 1e-5), EDGES * (1 + 1e-5)])
        cumulative = np.cumsum(histogram.counts)[:-1]
        assert ((below[0] <= cumulative) & (cumulative <= below[1])).all(), name


def test_rows_are_those_of_the_tokens(
    artifact: Path, activations: dict[str, NDArray[np.float64]], tmp_path: Path
) -> None:
    statistics = run(artifact, tmp_path / "s.safetensors", batch_size=2)
    numbers = statistics.row_numbers
    assert (numbers == sample_rows(WINDOWS.size, 9, seed=0)).all()
    assert (np.diff(numbers) > 0).all()
    for name in ("x", "hidden", "flat", "half"):
        np.testing.assert_allclose(statistics.rows(name), activations[name][numbers], rtol=1e-6)
    np.testing.assert_array_equal(statistics.rows("pooled"), activations["pooled"][numbers // WINDOWS.shape[1]])


def test_all_rows_if_there_are_fewer(artifact: Path, tmp_path: Path) -> None:
    statistics = run(artifact, tmp_path / "s.safetensors", rows=1000)
    assert (statistics.row_numbers == np.arange(WINDOWS.size)).all()


def test_same_bytes_every_time(artifact: Path, tmp_path: Path) -> None:
    first, second, other = (tmp_path / f"{i}.safetensors" for i in range(3))
    run(artifact, first, batch_size=2)
    run(artifact, second, batch_size=2)
    run(artifact, other, batch_size=2, seed=1)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(("batch_size", "rows"), [(2, 9), (3, 9), (8, 9), (1, 2), (2, 2)])
def test_batch_size_hardly_matters(artifact: Path, tmp_path: Path, batch_size: int, rows: int) -> None:
    one = run(artifact, tmp_path / "one.safetensors", batch_size=1, rows=rows)
    many = run(artifact, tmp_path / "many.safetensors", batch_size=batch_size, rows=rows)
    assert one.provenance == many.provenance
    for name, a in load_file(one.path).items():
        b = load_file(many.path)[name]
        if name.endswith("/histogram"):
            assert np.abs(np.cumsum(a - b)).max() <= 1
        else:
            np.testing.assert_allclose(b, a, rtol=1e-6, err_msg=name)


def test_histograms_are_optional(artifact: Path, tmp_path: Path) -> None:
    statistics = run(artifact, tmp_path / "s.safetensors", histograms=False)
    assert not statistics.has_histograms
    with pytest.raises(BismoothError, match=r"s\.safetensors: has no histograms"):
        statistics.histogram("x")


def test_progress_counts_windows(artifact: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(step: str, done: int, total: int) -> None:
        seen.append((step, done, total))

    run(artifact, tmp_path / "s.safetensors", batch_size=2, progress=progress)
    total = len(WINDOWS)
    assert seen[:2] == [("calibrate", 0, total), ("calibrate", 2, total)]
    assert seen[-1] == ("calibrate", total, total)


def test_values_keep_their_order(artifact: Path, tmp_path: Path) -> None:
    values = {"hidden": INNER, "x": HIDDEN}
    assert calibrate(artifact, values, WINDOWS, tmp_path / "s.safetensors").names == ("hidden", "x")


def test_artifact_is_not_touched(artifact: Path, tmp_path: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in artifact.iterdir()}
    folder_time = artifact.stat().st_mtime_ns
    run(artifact, tmp_path / "s.safetensors")
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in artifact.iterdir()} == before
    assert artifact.stat().st_mtime_ns == folder_time


def test_the_head_is_cut_off_and_nodes_stand_behind_their_value(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[onnx.ModelProto] = []

    def keep(self: Observe, batch: Batch) -> dict[str, NDArray[Any]]:
        models.append(parse_graph(self.run.model, "piece"))
        return self.run(batch, self.sample.feeds(batch))

    monkeypatch.setattr(Observe, "__call__", keep)
    calibrate(artifact, {"x": HIDDEN}, WINDOWS, tmp_path / "s.safetensors", histograms=True)
    (model,) = models
    assert [node.name for node in model.graph.node][:3] == ["embed", "x::flat", "x::x"]
    assert {tensor.name for tensor in model.graph.initializer if "::" not in tensor.name} == {"embed"}
    assert [output.name for output in model.graph.output] == list(asdict(Taps.of("x")).values())[:-1]


def test_value_without_a_producer(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["pixels"], ["y"])]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("pixels", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:]))
    instrument(model, ["pixels"], histograms=False)
    assert model.graph.node[0].name == "pixels::flat"


# --- Gram matrices --------------------------------------------------------------------------------------------------

SHAPE = DecoderShape(layers=2, vocab=VOCAB)


def decoder_values(path: Path) -> dict[str, int]:
    """Inputs of linears."""
    return {linear.x: linear.k for linear in find_linears(load(path))}


@pytest.mark.parametrize("blocks", [None, (8 * SHAPE.ffn * 5, 8 * SHAPE.ffn * 7)])
def test_gram_matrices_against_float64(
    tmp_path: Path, blocks: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks:
        monkeypatch.setattr(gram, "_BLOCK_BYTES", blocks[0])
        monkeypatch.setattr(gram, "_CHUNK_BYTES", blocks[1])
    path = decoder(SHAPE).save(tmp_path, external=True)
    values = decoder_values(path)
    statistics = calibrate(tmp_path, values, WINDOWS, tmp_path / "s.safetensors", batch_size=2, grams=True)
    assert statistics.has_grams
    with Session(path, values=list(values), mode="plain") as session:
        found = session.run(session.token_feeds(WINDOWS), list(values))
    for name, width in values.items():
        x = found[name].reshape(-1, width).astype(np.float64)
        bound = 1e-5 * (np.abs(x).T @ np.abs(x))  # of the float32 graph
        matrix = statistics.gram(name)
        assert (np.abs(matrix - x.T @ x) <= bound).all(), name
        assert (matrix == matrix.T).all()
        rows = calibrate(tmp_path, {name: width}, WINDOWS, tmp_path / "r.safetensors", batch_size=2, rows=WINDOWS.size)
        exact = rows.rows(name).astype(np.float64)
        np.testing.assert_allclose(matrix, exact.T @ exact, rtol=2**-22, atol=1e-12 * bound.max())


def test_gram_matrices_do_not_change_the_rest(tmp_path: Path) -> None:
    values = decoder_values(decoder(SHAPE).save(tmp_path, external=True))
    with_grams = calibrate(tmp_path, values, WINDOWS, tmp_path / "g.safetensors", grams=True)
    without = load_file(calibrate(tmp_path, values, WINDOWS, tmp_path / "s.safetensors").path)
    for name, array in load_file(with_grams.path).items():
        assert name.endswith("/gram") or (array == without[name]).all()


def test_a_file_without_gram_matrices(artifact: Path, tmp_path: Path) -> None:
    statistics = run(artifact, tmp_path / "s.safetensors")
    assert not statistics.has_grams
    with pytest.raises(BismoothError, match=r"s\.safetensors: has no Gram matrices\. Expected some"):
        statistics.gram("x")


def test_gram_matrices_need_the_number_of_rows_per_window(artifact: Path, tmp_path: Path) -> None:
    message = r"value x: its shape says nothing of its rows per window\. Expected one .* and 8 channels, got None"
    with pytest.raises(BismoothError, match=message):
        run(artifact, tmp_path / "s.safetensors", grams=True)
    assert not list(tmp_path.iterdir())


def test_gram_matrices_need_memory(tmp_path: Path) -> None:
    """More than a tiny model does, since blocks of the matrix are not tiny."""
    values = decoder_values(decoder(SHAPE).save(tmp_path, external=True))
    least: list[int] = []
    for grams in (False, True):
        with pytest.raises(BismoothError, match=r"--memory is too small .* Expected \d+MB or more") as raised:
            calibrate(tmp_path, values, WINDOWS, tmp_path / "s.safetensors", grams=grams, memory=10**7)
        least.append(int(re.findall(r"(\d+)MB", str(raised.value))[0]))
    assert least[1] > least[0] + 10


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.nan, r"value x: holds NaN on this text\. Expected finite activations"),
        (np.inf, r"value x: holds magnitudes up to inf on this text"),
        (1e30, r"value x: holds magnitudes up to 1e\+30 on this text"),
    ],
)
def test_activation_that_is_not_finite(tmp_path: Path, content: float, message: str) -> None:
    embedding = np.ones((VOCAB, HIDDEN), np.float32)
    embedding[WINDOWS[4, 3], 2] = content
    artifact = make_artifact(tmp_path / "artifact", embedding)
    output = tmp_path / "s.safetensors"
    with pytest.raises(BismoothError, match=message):
        run(artifact, output)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_activations_that_are_finite_and_whose_squares_do_not_add_up(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", np.full((VOCAB, HIDDEN), 5e18, np.float32))
    message = (
        r"value x: holds magnitudes up to 5e\+18 on this text\. Expected finite activations whose squares add up to "
        r"less than 3\.4e38 \(the end of float32\) over a batch"
    )
    with pytest.raises(BismoothError, match=message):
        run(artifact, tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": {"x": HIDDEN, "nowhere": 1}}, r"value nowhere: not in the graph"),
        ({"values": {"input_ids": 16}}, r"value input_ids: is INT64\. Expected a float activation"),
        ({"values": {}}, r"calibrate: Expected values, .* got 0 values, windows \[5, 16\], batch size None, 256 rows"),
        ({"windows": WINDOWS[0]}, r"got 1 values, windows \[16\]"),
        ({"windows": WINDOWS[:0]}, r"got 1 values, windows \[0, 16\]"),
        ({"values": {"x": HIDDEN + 1}}, r"value x: has 8 channels\. Expected 9\. Look its shape up in the graph"),
        ({"batch_size": 0}, r"batch size 0"),
        ({"rows": 0}, r" 0 rows"),
        ({"graph": "gone.onnx"}, r"gone\.onnx: cannot be read"),
        ({"windows": WINDOWS + VOCAB}, r"model\.onnx: ONNX Runtime failed: .*out of data bounds"),
    ],
)
def test_bad_request(artifact: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"values": {"x": HIDDEN}, "windows": WINDOWS, "output": tmp_path / "s.safetensors"}
    with pytest.raises(BismoothError, match=message):
        calibrate(artifact, **(arguments | options))
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BismoothError, match=r"cannot be written \(Not a directory\)\. Choose a place"):
        run(artifact, tmp_path / "file" / "s.safetensors")


def test_histogram_grid() -> None:
    assert BINS == 2562
    assert EDGES[0] == 2.0**-24
    assert EDGES[-1] == 2.0**16
