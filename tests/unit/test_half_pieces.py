"""The 16-bit simulation piece by piece: the same logits and peaks as in one run, whatever the pieces."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from bismooth.engines.pieces import Piece, PieceMaker
from bismooth.engines.streaming import Streamed
from bismooth.export.state import open_state
from bismooth.passes._gs import make_constant
from bismooth.passes.graph import load, save
from bismooth.passes.precision import SetPrecision
from bismooth.passes.progress import silent
from bismooth.tools.half_peaks import PEAKS, add_peaks, peak_of_stored, peaks_of
from bismooth.tools.halfsim import HalfSimulation
from bismooth.tools.programs import Programs
from tests.models import exported, tokens
from tests.textgraphs import Array, make, run

IDS = tokens(3, 9)["input_ids"]


def segments(self: Streamed, _budget: int | None, first: int = 0, stop: int | None = None) -> list[Piece]:
    """The most pieces that there can be."""
    return [Piece(segment, segment + 1) for segment in range(first, self.stop if stop is None else stop)]


@pytest.fixture(params=["float16", "bfloat16"])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Llama of three blocks in 16 bits, with weights of float32 outside, and empty caches."""
    source = exported("llama").graph
    opened = load(source)
    SetPrecision(request.param).apply(opened)
    save(opened, tmp_path / "half.onnx")
    shutil.copyfile(source.parent / "model.safetensors", tmp_path / "model.safetensors")
    return tmp_path / "half.onnx"


def outputs(path: Path, folder: Path, count: int = len(IDS)) -> tuple[Array, Array]:
    """Logits and ratios."""
    folder.mkdir(exist_ok=True)
    with HalfSimulation(path) as simulation:
        logits = np.stack(list(simulation.outputs(Programs(IDS, folder, silent), count)))
        return logits, simulation.ratios


def test_pieces_give_what_one_run_gives(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ratios = outputs(graph, tmp_path / "whole")
    with HalfSimulation(graph) as simulation:
        whole = simulation.run(IDS)
        assert len(simulation.edges) > 60
    np.testing.assert_array_equal(logits, whole.logits)
    np.testing.assert_array_equal(ratios, whole.ratios)
    monkeypatch.setattr(Streamed, "plan", segments)
    in_pieces = outputs(graph, tmp_path / "pieces")
    assert len(list((tmp_path / "pieces").rglob("*"))) > 0
    np.testing.assert_array_equal(in_pieces[0], logits)
    np.testing.assert_array_equal(in_pieces[1], ratios)


def test_windows_that_were_not_asked_for_do_not_run(graph: Path, tmp_path: Path) -> None:
    some, ratios = outputs(graph, tmp_path / "two", 2)
    logits, all_ratios = outputs(graph, tmp_path / "three")
    np.testing.assert_array_equal(some, logits[:2])
    assert (ratios <= all_ratios).all()
    assert not np.array_equal(ratios, all_ratios)


def test_peaks_are_kept_when_a_run_is_broken_off(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streamed, "plan", segments)
    expected = outputs(graph, tmp_path / "whole")
    steps: list[int] = []

    def stop(_step: str, done: int, _total: int) -> None:
        steps.append(done)
        if len(steps) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_state(tmp_path / "v.json", "verify", {}) as state:
        list(HalfSimulation(graph).outputs(Programs(IDS, state.folder, stop, state=state), len(IDS)))
    with open_state(tmp_path / "v.json", "verify", {}) as state, HalfSimulation(graph) as simulation:
        assert 0 < state.get(f"half.onnx simulated {len(IDS)} windows")["stop"] < 8
        logits = np.stack(list(simulation.outputs(Programs(IDS, state.folder, silent, state=state), len(IDS))))
        np.testing.assert_array_equal(logits, expected[0])
        np.testing.assert_array_equal(simulation.ratios, expected[1])


def test_no_piece_is_cut_where_bfloat16_would_cross(graph: Path) -> None:
    with HalfSimulation(graph) as simulation:
        maker = simulation._maker  # pyright: ignore[reportPrivateUsage]
    kinds = {info.name: info.type.tensor_type.elem_type for info in maker.model.graph.value_info}
    carried = {kinds[segment.exit] for segment in maker.segments if segment.exit}
    assert carried <= {TensorProto.FLOAT, TensorProto.FLOAT16}
    assert len(maker.segments) > 5


def test_values_outside_of_the_stream_belong_to_who_needs_them_first(graph: Path) -> None:
    with HalfSimulation(graph) as simulation:
        maker: PieceMaker = simulation._maker  # pyright: ignore[reportPrivateUsage]
        weights = [edge.value for edge in simulation.edges if "weight" in edge.value]
    places = {value: place for place, values in maker.by_segment(weights).items() for value in values}
    firsts = [min(place for value, place in places.items() if f"layers.{block}." in value) for block in range(3)]
    lasts = [max(place for value, place in places.items() if f"layers.{block}." in value) for block in range(3)]
    assert 0 < firsts[0] < lasts[0] < firsts[1] < lasts[1] < firsts[2] < lasts[2] < len(maker.segments) - 1


def test_weights_that_are_rounded_are_stored_in_16_bits(tmp_path: Path) -> None:
    """A float16 graph on weights in bfloat16: the peak is found in the file, and the table looked up before."""
    table = np.random.default_rng(0).standard_normal((50, 8)).astype(ml_dtypes.bfloat16)
    table[49, 3] = 66000
    text = """(int64[batch, sequence] ids) => (float[batch, sequence, 8] y) {
        h = Cast<to = 10>(table)  x = Gather(h, ids)  m = Mul(x, x)  y = Cast<to = 1>(m)
    }"""
    (tmp_path / "half.onnx").write_bytes(make(text, table=table).SerializeToString())
    with HalfSimulation(tmp_path / "half.onnx") as simulation:
        result = simulation.feed({"ids": np.array([[1, 2]])})
        assert {edge.value: np.isinf(ratio) for edge, ratio in zip(simulation.edges, result.ratios, strict=True)} == {
            "h": True,
            "m": False,
        }
    x = table[[1, 2]].astype(np.float16)
    np.testing.assert_array_equal(result.logits[0], (x * x).astype(np.float32))


def test_peaks_of_a_run(tmp_path: Path) -> None:
    model = make("(float[n] x) => (float[n] y) { a = Neg(x)  y = Relu(a) }")
    add_peaks(model, ["a", "y"])
    values = np.array([3, -1, 2], np.float32)
    results = dict(zip([output.name for output in model.graph.output], run(model, {"x": values}), strict=True))
    assert list(results) == ["y", PEAKS]
    assert peaks_of(results).tolist() == [3, 1]
    results = dict(zip(results, run(model, {"x": np.array([1, np.nan], np.float32)}), strict=True))
    assert np.isnan(peaks_of(results)[0])


def test_a_graph_without_values_to_look_at_stays_as_it_is() -> None:
    model = make("(float[n] x) => (float[n] y) { y = Relu(x) }")
    before = onnx.ModelProto()
    before.CopyFrom(model)
    add_peaks(model, [])
    assert model == before
    assert peaks_of({}).size == 0


@pytest.mark.parametrize(("values", "peak"), [([1.0, -7.0], 7.0), ([1.0, 70000.0], np.inf), ([1.0, np.nan], np.nan)])
def test_peaks_of_stored_weights(values: list[float], peak: float) -> None:
    weight = make_constant("w", np.array(values, np.float32))
    np.testing.assert_equal(peak_of_stored(weight, np.dtype(np.float16)), peak)
