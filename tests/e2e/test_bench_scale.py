"""The bench by size on models that are tiny: the stages take its commands, and give what it reads."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from bismooth.export.errors import BismoothError
from bismooth.tools import bench_scale, cli
from bismooth.tools.bench_scale import ScaleBench
from bismooth.tools.bench_scale_report import LEAST_MEMORY
from bismooth.tools.bench_scale_rows import BASELINES, LARGE, STEPS, Rows
from bismooth.tools.bench_steps import Runner, Step
from bismooth.tools.large_model import Shape
from tests.tiny import make_tiny, write_text

SHAPE = Shape(blocks=1, hidden=64, intermediate=96, heads=4, kv_heads=2, head=16, vocabulary=128)


class Here(Runner):
    """Runs commands in this process, which has imported what they need."""

    def bismooth(self, *arguments: str | Path, label: str = "") -> Step:
        with redirect_stdout(io.StringIO()) as text:
            status = cli.main([*map(str, arguments), "--json", "--quiet"])
        if status not in (0, 1):
            raise BismoothError(f"{label}: {text.getvalue()}")
        return Step(label, json.loads(text.getvalue()), 1.0, 10**9)


def test_the_stages_do_what_the_bench_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scale, "MODELS", {"larger": replace(SHAPE, blocks=2)})
    tiny = make_tiny(tmp_path, num_hidden_layers=1)
    text, output = [str(write_text(tiny.text, 3000))], tmp_path / "out"
    output.mkdir()
    bench = ScaleBench(
        output, Rows(output / "rows.json", {}), text, text, "3GB", SHAPE, Here()
    )  # of a process that has run other tests
    steps = [step for step in STEPS if step != "verify more"]
    result = bench.run(str(tiny.source), [1], [*steps, "targets"])
    rows = {(row.model, row.step): row for row in result.rows}
    assert set(rows) == {*((LARGE, step) for step in (*steps, *BASELINES)), ("larger", "export")}
    assert rows[LARGE, "quantize"].written_bytes > SHAPE.block_parameters
    assert rows[LARGE, "calibrate"].written_bytes > 4 * 256 * SHAPE.block_channels, "sampled rows in float32"
    assert rows["larger", "export"].figures[LEAST_MEMORY] > 10**8
    assert [path.name for path in output.iterdir()] == ["rows.json"]
