"""Linting files, models and graphs; what this package writes has no findings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.graph import load, save
from bismooth.passes.lint import Severity, Target, lint
from bismooth.passes.precision import SetPrecision
from tests.linting import CONSTANTS, IN, OUT, N, graph, linear, renamed
from tests.quantized import per_token
from tests.textgraphs import externalize, make, open_graph, tiny_llama

TARGETS: list[tuple[Target, tuple[int, ...]]] = [
    ("tensorrt-rtx", (75,)),
    ("tensorrt-rtx", (80, 86, 89, 120)),
    ("tensorrt", ()),
]


@pytest.mark.parametrize(("target", "capabilities"), TARGETS)
def test_what_this_package_writes_has_no_findings(
    tmp_path: Path, target: Target, capabilities: tuple[int, ...]
) -> None:
    llama = open_graph(tiny_llama(), tmp_path)
    SetPrecision("float16").apply(llama)
    for model in (llama, per_token("q", "k")):
        assert [str(found) for found in lint(model, target=target, capabilities=capabilities)] == []


def test_the_float32_graph_is_fine_for_onnxruntime() -> None:
    assert lint(tiny_llama(), target="onnxruntime") == []


def test_errors_come_first() -> None:
    model = renamed("", "")
    model.graph.node[1].op_type = "MatMull"
    severities = [found.severity for found in lint(model, target="tensorrt")]
    assert severities == [Severity.ERROR, Severity.WARNING, Severity.WARNING]


def test_a_finding_reads_as_one_line() -> None:
    found = lint(graph("z = MatMul(x, w)"), target="onnxruntime")
    assert str(found[0]) == (
        "error: graph outputs: reads y, which nothing computes. No runtime loads this. Export the model again. "
        "[undefined-value]"
    )


def test_scales_in_a_file_are_read_and_weights_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear("wd = DequantizeLinear<axis = 1>(wq, s_zero, zn)")
    externalize(model, tmp_path, "wq", "s_zero")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    reads: list[int] = []
    fromfile = np.fromfile

    def counted(*args: Any, **kwargs: Any) -> Any:
        reads.append(kwargs["count"])
        return fromfile(*args, **kwargs)

    monkeypatch.setattr(np, "fromfile", counted)
    for given in (path, load(path)):
        assert [found.rule for found in lint(given, target="tensorrt") if found.severity is Severity.ERROR] == [
            "scale-value"
        ]
    assert set(reads) == {N}
    assert "scale-value" not in [found.rule for found in lint(model, target="tensorrt")]  # the folder is unknown


def test_a_truncated_weight_file_is_found(tmp_path: Path) -> None:
    model = make(f"{IN} => {OUT} {{ y = MatMul(x, w) }}", w=CONSTANTS["w"])
    externalize(model, tmp_path, "w")
    (tmp_path / "weights.bin").write_bytes(b"1234")
    (found,) = lint(model, target="onnxruntime", folder=tmp_path)
    assert (found.rule, found.node) == ("external-data", "w")
    assert found.message.startswith("its data does not fit")


def test_a_saved_graph_is_linted_from_its_file(tmp_path: Path) -> None:
    graph = open_graph(tiny_llama(), tmp_path)
    save(graph, tmp_path / "copy.onnx")
    assert lint(tmp_path / "copy.onnx", target="onnxruntime") == []


@pytest.mark.parametrize("content", [b"\xff\xff\xff", None])
def test_a_file_that_is_no_model_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BismoothError, match=r"model\.onnx: cannot be read as an ONNX model\. Expected a serialized"):
        lint(path, target="tensorrt")
