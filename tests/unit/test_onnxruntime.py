"""Sessions: numbers against numpy, and every way a graph or a provider can be refused."""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGINT, pthread_kill
from threading import Timer, main_thread
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bismooth.engines import onnxruntime as engine
from bismooth.engines.onnxruntime import InMemoryGraph, Session
from bismooth.engines.subgraph import cut, load_graph
from bismooth.engines.subnormals import flush_subnormals
from bismooth.export.errors import BismoothError
from tests.language_model import HIDDEN, IDS, VOCAB, Edit, expected_logits, language_model


def test_weights_can_be_left_as_they_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kept = language_model(tmp_path), dict[bool, set[str]]()
    for lean in (True, False):
        optimized = tmp_path / f"optimized-{lean}.onnx"
        options = engine._session_options  # pyright: ignore[reportPrivateUsage]

        def keep(*args: Any, options: Callable[..., Any] = options, optimized: Path = optimized, **named: Any) -> Any:
            result = options(*args, **named)
            result.optimized_model_filepath = str(optimized)
            return result

        monkeypatch.setattr(engine, "_session_options", keep)
        with Session(path, mode="plain", threads=1, lean=lean) as session:
            np.testing.assert_allclose(session.logits(IDS), expected_logits(tmp_path, IDS), rtol=1e-5, atol=1e-6)
        monkeypatch.undo()
        kept[lean] = {item.name for item in load_graph(optimized).graph.initializer}
    assert kept[True] == {"embed"}
    assert kept[False] > {"embed"}, "a transposed copy"


def test_logits_and_inner_values(tmp_path: Path) -> None:
    path = language_model(tmp_path)
    with Session(path, values=["hidden", "logits"], threads=1) as session:
        assert [port.name for port in session.outputs] == ["logits", "hidden"]
        assert session.inputs[0] == engine.Port("input_ids", np.dtype(np.int64), ("batch", "sequence"))
        logits = session.logits(IDS)
        hidden = session.run(session.token_feeds(IDS), ["hidden"])["hidden"]
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(tmp_path, IDS), rtol=1e-5, atol=1e-6)
    assert hidden.shape == (3, 3, HIDDEN)


def test_subnormal_numbers_are_zero_in_a_session_and_nowhere_else() -> None:
    tiny = np.full(4096, 1e-38, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "x1"], ["y"])],
        "product",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4096]) for name in ("x", "x1")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4096])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    tenth = np.full(4096, 0.1, np.float32)
    for _ in range(2):  # ONNX Runtime itself sets the calling thread for the first session of a process alone
        with Session(InMemoryGraph("product", model.SerializeToString(), Path())) as session:
            (product,) = session.run({"x": tiny, "x1": tenth}).values()
        if (sys.platform, platform.machine()) == ("linux", "x86_64"):
            assert not product.any()
        assert (tiny * tenth > 0).all()


def _resident_with_a_session(sizes: Connection) -> None:
    """Memory of this process before, within and after a session with 128 MB of weights, in bytes."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    weights = [numpy_helper.from_array(np.ones((1024, 1024), np.float32), f"w{i}") for i in range(32)]
    steps = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(32)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1024]) for name in ("x0", "x32")]
    graph = helper.make_graph(steps, "heavy", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10).SerializeToString()
    sizes.send(resident())
    with Session(InMemoryGraph("heavy", model, Path())) as session:
        session.run({"x0": np.zeros((1, 1024), np.float32)})
        sizes.send(resident())
    sizes.send(resident())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return memory as they like")
def test_a_closed_session_gives_its_memory_back() -> None:
    context = multiprocessing.get_context("spawn")  # a heap of its own: pages that are in use twice cannot go back
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_resident_with_a_session, args=(sender,))
    process.start()
    sender.close()
    before, within, after = (receiver.recv() for _ in range(3))
    process.join()
    assert within > before + 100e6
    assert after < within - 100e6


def test_subnormal_numbers_stay_where_they_cannot_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_functions(name: object) -> object:
        return name

    monkeypatch.setattr(ctypes, "CDLL", without_functions)
    flush_subnormals()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    flush_subnormals()


def test_an_interrupt_ends_the_run() -> None:
    """Minutes of products in one run."""
    steps = [helper.make_node("MatMul", [f"x{i}", "x0"], [f"x{i + 1}"]) for i in range(2000)]
    graph = helper.make_graph(
        steps,
        "long",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1024, 1024])],
        [helper.make_tensor_value_info("x2000", TensorProto.FLOAT, [1024, 1024])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    thread = main_thread().ident
    assert thread is not None
    with Session(InMemoryGraph("long", model.SerializeToString(), Path())) as session:
        Timer(0.3, pthread_kill, (thread, SIGINT)).start()
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            session.run({"x0": np.zeros((1024, 1024), np.float32)})
    assert time.perf_counter() - start < 5


def test_an_interrupted_run_has_ended_before_its_caller_goes_on(tmp_path: Path) -> None:
    """It writes into bound buffers, which the caller may free then."""
    thread, ended = main_thread().ident, list[bool]()
    assert thread is not None

    def run(_session: object, options: Any) -> None:
        while not options.terminate:
            time.sleep(0.01)
        time.sleep(0.2)
        ended.append(True)

    with Session(language_model(tmp_path)) as session:
        Timer(0.1, pthread_kill, (thread, SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            session._run(run, {})  # pyright: ignore[reportPrivateUsage]
        assert ended


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_windows_come_in_order_whatever_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    with Session(language_model(tmp_path)) as session:
        batches = list(session.windows(IDS, batch_size))
    assert max(len(batch) for batch in batches) == min(batch_size, 3)
    np.testing.assert_allclose(np.concatenate(batches), expected_logits(tmp_path, IDS), rtol=1e-5, atol=1e-6)


def test_graph_in_memory_reads_weights_from_its_folder(tmp_path: Path) -> None:
    model = load_graph(language_model(tmp_path))
    (tmp_path / "model.onnx").unlink()
    cut(model, ["hidden"])
    assert [node.op_type for node in model.graph.node] == ["Gather", "Tanh"]
    with Session(InMemoryGraph("cut", model.SerializeToString(), tmp_path)) as session:
        (hidden,) = session.run(session.token_feeds(IDS)).values()
    np.testing.assert_allclose(hidden @ np.eye(HIDDEN), hidden)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.bin"]


def test_cut_follows_names_into_bodies(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["hidden"], ["inner"])],
        "body",
        [],
        [helper.make_empty_tensor_value_info("inner")],
    )

    def edit(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        model.graph.node.append(helper.make_node("If", ["yes"], ["chosen"], then_branch=body, else_branch=body))

    model = load_graph(language_model(tmp_path, edit))
    cut(model, ["chosen"])
    assert [node.op_type for node in model.graph.node] == ["Gather", "Tanh", "If"]


# --- Q/DQ -----------------------------------------------------------------------------------------------------------


def per_token_linear(weight: NDArray[np.int8], scale: NDArray[np.float32]) -> bytes:
    """The per-token W8A8 lowering of a linear with weight [K, N]; r = scale / 2^-14."""
    s0 = np.float32(2.0**-14)
    constants = {
        "w": weight,
        "s0": s0,
        "one": np.float32(1),
        "zero": np.int8(0),
        "r": scale / s0,
        "last": np.array([-1], np.int64),
        "tiny": np.float32(1e-12),
        "c127": np.float32(127),
    }
    make = helper.make_node
    nodes = [
        make("Abs", ["x"], ["a"]),
        make("ReduceMax", ["a", "last"], ["m"], keepdims=1),
        make("Max", ["m", "tiny"], ["mt"]),
        make("Div", ["mt", "c127"], ["t"]),
        make("Div", ["x", "t"], ["xs"]),
        make("QuantizeLinear", ["xs", "one", "zero"], ["xq"]),
        make("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
        make("DequantizeLinear", ["w", "s0", "zero"], ["wd"]),
        make("MatMul", ["xd", "wd"], ["acc"]),
        make("Mul", ["acc", "r"], ["scaled"]),
        make("Mul", ["scaled", "t"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", weight.shape[1]])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10).SerializeToString()


@pytest.mark.parametrize("mode", ["int8", "reference"])
def test_quantized_linear_is_exact_in_both_modes(tmp_path: Path, mode: engine.Mode) -> None:
    rng = np.random.default_rng(1)
    # All weights at the limit and all activations of one sign: the case that saturates u8 x s8 kernels.
    weight = np.where(rng.random((256, 32)) < 0.5, 127, 120).astype(np.int8)
    scale = rng.uniform(1e-3, 2e-3, 32).astype(np.float32)
    x = rng.uniform(0.5, 1, (16, 256)).astype(np.float32)
    with Session(InMemoryGraph("linear", per_token_linear(weight, scale), tmp_path), mode=mode) as session:
        y = session.run({"x": x})["y"]
    t = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    exact = np.rint(x / t).astype(np.float64) @ weight.astype(np.float64) * scale * t
    np.testing.assert_allclose(y, exact, rtol=2e-6)


def test_reference_mode_keeps_activations_of_blocked_weights_in_float(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weight = rng.integers(-8, 8, (128, 32), dtype=np.int8)
    scale = rng.uniform(0.01, 0.02, (4, 32)).astype(np.float32)
    packed = helper.make_tensor("w", TensorProto.INT4, weight.shape, weight.reshape(-1).tolist())
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "blocked",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 128])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 32])],
        [packed, numpy_helper.from_array(scale, "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    x = rng.standard_normal((8, 128)).astype(np.float32)
    exact = x.astype(np.float64) @ (weight * np.repeat(scale, 32, axis=0).astype(np.float64))
    for mode in ("reference", "int8"):
        with Session(InMemoryGraph("blocked", model.SerializeToString(), tmp_path), mode=mode) as session:
            error = np.abs(session.run({"x": x})["y"] - exact).max() / np.abs(exact).max()
        assert error < 1e-6, mode


# --- refusals -------------------------------------------------------------------------------------------------------


def unknown_op(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Frobnicate"


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Add"
    model.graph.node[1].input[:] = ["x", "more"]
    model.graph.node.append(helper.make_node("Neg", ["hidden"], ["more"]))


def relocate(location: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].external_data[0].value = location

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (unknown_op, "Frobnicate"),
        (cycle, "not acyclic"),
        (relocate("gone.bin"), "gone.bin"),
        (relocate("../outside.bin"), "outside.bin"),
        (relocate("/etc/hostname"), "[Aa]bsolute path|escapes|outside"),
    ],
)
def test_graph_that_cannot_be_loaded(tmp_path: Path, edit: Edit, reason: str) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(4 * VOCAB * HIDDEN))
    path = language_model(folder, edit)
    with pytest.raises(
        BismoothError, match=rf"model\.onnx: ONNX Runtime cannot load the graph: .*({reason}).*Make the artifact"
    ):
        Session(path)


def test_graph_in_memory_may_not_leave_its_folder_either(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(4 * VOCAB * HIDDEN))
    data = language_model(folder, relocate("../outside.bin")).read_bytes()
    with pytest.raises(BismoothError, match=r"graph x: ONNX Runtime cannot load the graph: .*outside\.bin"):
        Session(InMemoryGraph("graph x", data, folder))


def test_weights_cut_off(tmp_path: Path) -> None:
    path = language_model(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(10))
    with pytest.raises(BismoothError, match=r"cannot load the graph: .*embed.*out of bounds"):
        Session(path)


@pytest.mark.parametrize("content", [b"", b"not a model at all"])
def test_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BismoothError, match=r"model\.onnx: ONNX Runtime cannot load the graph"):
        Session(path)
    with pytest.raises(BismoothError, match=r"model\.onnx: not a valid ONNX file: .+ Make the artifact again\."):
        load_graph(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match=r"none\.onnx: ONNX Runtime cannot load the graph: .*doesn't exist"):
        Session(tmp_path / "none.onnx")
    with pytest.raises(BismoothError, match=r"none\.onnx: cannot be read \(No such file"):
        load_graph(tmp_path / "none.onnx")


def test_value_that_is_not_in_the_graph(tmp_path: Path) -> None:
    path = language_model(tmp_path)
    with pytest.raises(BismoothError, match=r"value nowhere: not in the graph, like 1 of the 2 values"):
        Session(path, values=["hidden", "nowhere"])
    with pytest.raises(BismoothError, match=r"value nowhere: not in the graph"):
        cut(load_graph(path), ["nowhere"])


def test_wrong_feeds(tmp_path: Path) -> None:
    with Session(language_model(tmp_path)) as session:
        with pytest.raises(BismoothError, match=r"attention_mask.*It was fed: input_ids int64 \[3, 3\]\. Expected: "):
            session.run({"input_ids": IDS})
        with pytest.raises(BismoothError, match=r"ONNX Runtime failed: .*out of (data )?bounds"):
            session.logits(IDS + VOCAB)
    with pytest.raises(BismoothError, match=r"model\.onnx: the session was closed"):
        session.logits(IDS)


def test_buffers_of_the_caller(tmp_path: Path) -> None:
    logits = np.empty((1, 3, VOCAB), np.float32)
    feeds = {"input_ids": IDS[:1].copy(), "attention_mask": np.ones((1, 3), np.int64)}
    session = Session(language_model(tmp_path), spinning=True)
    binding = session.bind()
    binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
    session.run_bound(binding, feeds)
    np.testing.assert_allclose(logits, expected_logits(tmp_path, IDS[:1]), rtol=1e-5, atol=1e-6)
    with pytest.raises(BismoothError, match=r"ONNX Runtime failed: .*out of (data )?bounds.* It was fed: input_ids"):
        session.run_bound(binding, feeds | {"input_ids": feeds["input_ids"] + VOCAB})
    session.close()
    with pytest.raises(BismoothError, match=r"model\.onnx: the session was closed"):
        session.bind()


def test_spinning_is_off_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    options = engine._session_options  # pyright: ignore[reportPrivateUsage]

    def keep(*args: Any, **named: Any) -> Any:
        made.append(options(*args, **named))
        return made[-1]

    monkeypatch.setattr(engine, "_session_options", keep)
    for spinning in (False, True):
        Session(language_model(tmp_path), spinning=spinning).close()
    key = "session.intra_op.allow_spinning"
    assert [item.get_session_config_entry(key) for item in made] == ["0", "1"]


def test_input_that_text_does_not_determine(tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("past.0.key", TensorProto.FLOAT, [1]))

    with (
        Session(language_model(tmp_path, edit)) as session,
        pytest.raises(BismoothError, match=r"it has the input 'past\.0\.key'"),
    ):
        session.logits(IDS)


# --- installations and providers ------------------------------------------------------------------------------------
