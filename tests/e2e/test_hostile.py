"""Corrupt and hostile input: one clear message each, no traceback, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bismooth.export.artifact import Artifact
from bismooth.export.safetensors_file import read_header
from bismooth.tools.cli import main
from tests.tiny import SIZES, Tiny, listing, make_tiny, snapshot

Damage = Callable[[Path], None]
ROW = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("hostile"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def artifact(tiny: Tiny) -> Path:
    """A float artifact, to be copied."""
    path = tiny.text.parent / "float"
    assert main(["export", str(tiny.source), "-o", str(path), "-q"]) == 0
    return path


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``error(*words)``: the one message of a command that fails with status 2."""

    def fails(*words: object, status: int = 2) -> str:
        capsys.readouterr()
        assert main([str(word) for word in (*words, "-q")]) == status
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        assert shown.err.startswith("error: ")
        assert shown.err.count("\n") == 1
        return shown.err

    return fails


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def truncated(folder: Path) -> None:
    data = weights(folder).read_bytes()
    weights(folder).write_bytes(data[: len(data) // 2])


def edited_header(folder: Path, edit: Callable[[dict[str, dict[str, object]]], None]) -> None:
    data = weights(folder).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    new = json.dumps(header).encode()
    new += b" " * (length - len(new))
    weights(folder).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def wrong_shape(folder: Path) -> None:
    edited_header(folder, lambda header: header[ROW].update(shape=[7, 7]))


def other_shape(folder: Path) -> None:
    edited_header(folder, lambda header: header[ROW].update(shape=[16, 64]))


def unknown_dtype(folder: Path) -> None:
    edited_header(folder, lambda header: header[ROW].update(dtype="F12"))


def huge_header(folder: Path) -> None:
    weights(folder).write_bytes(b"\xff" * 8 + weights(folder).read_bytes()[8:])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def pickled(folder: Path) -> None:
    weights(folder).rename(folder / "pytorch_model.bin")


def already_quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "not a valid safetensors file"),
        (wrong_shape, "its shape [7, 7] needs 196"),
        (other_shape, "has shape [16, 64]"),
        (unknown_dtype, "has dtype F12"),
        (huge_header, "its header claims"),
        (no_config, "config.json"),
        (broken_config, "config.json"),
        (pickled, "safetensors"),
        (already_quantized, "gptq"),
    ],
)
def test_sources(tiny: Tiny, tmp_path: Path, damage: Damage, message: str, error: Callable[..., str]) -> None:
    source = Path(shutil.copytree(tiny.source, tmp_path / "source"))
    damage(source)
    before = snapshot(source)
    assert message in error("export", source, "-o", tmp_path / "out")
    assert snapshot(source) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def set_weight(folder: Path, value: float, count: int | None) -> None:
    """Overwrite the first ``count`` numbers of a weight in a copy of the source."""
    entry = read_header(weights(folder))[ROW]
    data = bytearray(weights(folder).read_bytes())
    size = entry.length if count is None else 4 * count
    data[entry.offset : entry.offset + size] = np.full(size // 4, value, "<f4").tobytes()
    weights(folder).write_bytes(data)


def test_a_nan_weight_is_named(tiny: Tiny, tmp_path: Path, error: Callable[..., str]) -> None:
    source = Path(shutil.copytree(tiny.source, tmp_path / "source"))
    set_weight(source, np.nan, 1)
    assert main(["export", str(source), "-o", str(tmp_path / "art"), "-q"]) == 0
    message = error("quantize", tmp_path / "art", "--data", "none", "-o", tmp_path / "out")
    assert ROW in message
    assert "NaN" in message
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source", "art", ".out.partial"}, "no artifact; what was done before is kept"


def test_nan_weights_fail_the_first_hop(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(tiny.source, tmp_path / "source"))
    set_weight(source, np.nan, None)
    assert main(["export", str(source), "-o", str(tmp_path / "art"), "-q"]) == 0
    capsys.readouterr()
    words = ["verify", str(tmp_path / "art"), "--data", str(tiny.text), *SIZES, "--json", "-q"]
    assert main(words) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == [
        "float: the outputs of the float32 graph hold NaN or infinity. Expected finite numbers. "
        "Check the weights of the source."
    ]
    assert [(hop["hop"], hop["verdict"], hop["skipped"]) for hop in report["hops"]] == [
        ("float", "failed", None),
        ("decode", "skipped", "the graph gives no numbers to compare with"),
        ("half", "skipped", "the outputs of the float32 graph hold NaN or infinity"),
    ]


def test_a_zero_row_gives_a_right_result(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(tiny.source, tmp_path / "source"))
    set_weight(source, 0.0, 32)
    for words in (
        ["export", source, "-o", tmp_path / "art"],
        ["quantize", tmp_path / "art", "--data", "none", "-o", tmp_path / "out"],
        ["verify", tmp_path / "out", "--data", tiny.text, *SIZES, "--hop", "int8", "folded", "--json"],
    ):
        capsys.readouterr()
        assert main([*map(str, words), "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == []
    assert np.isfinite(report["kl"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n\n", "holds no text"),
        (bytes(range(256)) * 20, "text"),
        (b"\x00" * 5000, ""),
        (b"w3 w4", "too little text"),
    ],
)
def test_texts(artifact: Path, tmp_path: Path, content: bytes, message: str, error: Callable[..., str]) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    before = listing(artifact)
    for command in ("calibrate", "verify"):
        shown = error(command, artifact, "--data", text, *SIZES)
        assert message in shown
        assert "text.txt" in shown
    assert listing(artifact) == before


def test_a_typo_in_a_recipe(artifact: Path, tmp_path: Path, error: Callable[..., str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: w8a8\nsmothing: null\n")
    message = error("quantize", artifact, "--recipe", recipe, "--data", "none", "-o", tmp_path / "out")
    assert "smothing" in message
    assert "smoothing" in message
    assert listing(tmp_path) == {"mine.yaml"}


def test_a_damaged_artifact(artifact: Path, tmp_path: Path, error: Callable[..., str]) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    truncated(copy)
    assert "The file was changed" in error("quantize", copy, "--data", "none", "-o", tmp_path / "out")
    (copy / "bismooth.json").write_text("{")
    assert "the manifest cannot be read" in error("inspect", copy)
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_a_source_edited_after_the_export(tiny: Tiny, tmp_path: Path, error: Callable[..., str]) -> None:
    source = Path(shutil.copytree(tiny.source, tmp_path / "source"))
    assert main(["export", str(source), "-o", str(tmp_path / "art"), "-q"]) == 0
    os.utime(weights(source), ns=(1, 1))
    assert "modified since" in error("quantize", tmp_path / "art", "--data", "none", "-o", tmp_path / "out")


def model(nodes: list[onnx.NodeProto], *tensors: TensorProto) -> onnx.ModelProto:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def cycle() -> onnx.ModelProto:
    first = helper.make_node("Add", ["x", "b"], ["a"], "first")
    second = helper.make_node("Add", ["a", "x"], ["b"], "second")
    return model([first, second, helper.make_node("Identity", ["b"], ["y"], "last")])


def unknown_operator() -> onnx.ModelProto:
    return model([helper.make_node("Frobnicate", ["x"], ["y"], "frob")])


def outside() -> onnx.ModelProto:
    tensor = numpy_helper.from_array(np.zeros((4, 4), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "../../etc/passwd", "offset": "0", "length": "64"}.items():
        tensor.external_data.add(key=key, value=value)
    return model([helper.make_node("MatMul", ["x", "w"], ["y"], "fc")], tensor)


@pytest.mark.parametrize(
    ("make", "message"), [(cycle, "cycle"), (unknown_operator, "Frobnicate"), (outside, "../../etc/passwd")]
)
def test_onnx_files(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], message: str, error: Callable[..., str]
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(make().SerializeToString())
    shown = error("export", file, "-o", tmp_path / "out")
    assert message in shown or "outside" in shown
    assert listing(tmp_path) == {"model.onnx"}


@pytest.mark.parametrize("make", [cycle, unknown_operator, outside])
def test_inspect_lists_what_is_wrong_with_an_onnx_file(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(make().SerializeToString())
    assert main(["inspect", str(file), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failures"]


def test_a_folder_that_cannot_be_written(artifact: Path, tmp_path: Path, error: Callable[..., str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert "file" in error("quantize", artifact, "--data", "none", "-o", file / "out")
    if os.geteuid() == 0:
        return
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "out: cannot be written" in error("quantize", artifact, "--data", "none", "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("export", set[str]()),
        ("quantize", {".out.partial", ".out.partial/journal.jsonl", ".out.partial/state.json"}),
        ("calibrate", set[str]()),
    ],
)
def test_a_full_disk(tiny: Tiny, artifact: Path, tmp_path: Path, command: str, kept: set[str]) -> None:
    """A limit on file sizes stands in for a full disk; what is left is what the next run goes on from."""
    copy = Path(shutil.copytree(artifact, tmp_path / "art"))
    words = {
        "export": ["export", str(tiny.source), "-o", str(tmp_path / "out")],
        "quantize": ["quantize", str(copy), "--data", "none", "-o", str(tmp_path / "out")],
        "calibrate": ["calibrate", str(copy), "--data", str(tiny.text), *SIZES],
    }[command]
    before = listing(tmp_path)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    done = subprocess.run(
        [sys.executable, "-m", "bismooth", *words, "-q"], capture_output=True, text=True, check=False, preexec_fn=limit
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr or "disk is full" in done.stderr
    assert listing(tmp_path) == before | kept


@pytest.mark.parametrize("delay", [0.6, 1.2])
def test_a_killed_stage_leaves_the_previous_artifact(artifact: Path, tmp_path: Path, delay: float) -> None:
    out = tmp_path / "out"
    words = ["quantize", str(artifact), "--data", "none", "-o", str(out), "-q"]
    assert main(words) == 0
    before = snapshot(out)
    process = subprocess.Popen([sys.executable, "-m", "bismooth", *words, "--force"])
    time.sleep(delay)
    process.kill()
    process.wait()
    assert Artifact.load(out, "quantized").path == out
    assert set(snapshot(out)) == set(before)
    assert main([*words, "--force"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
