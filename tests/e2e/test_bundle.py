"""A bundle from a tiny language model, by the commands: made, run where little is installed, tampered with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines.bundle import Bundle
from bismooth.engines.onnxruntime import Session
from bismooth.tools.cli import main
from tests.interrupted import snapshot
from tests.tiny import SIZES, make_tiny

IDS = np.arange(3, 15)[None]
INTERRUPTED = Path(__file__).parents[1] / "interrupted.py"
FORBIDDEN = [
    *("torch", "transformers", "onnx", "onnx_graphsurgeon", "onnx_ir", "onnxscript", "safetensors", "gguf"),
    *("ml_dtypes", "threadpoolctl", "plotly"),
]
REFUSE = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN}:
            raise ModuleNotFoundError(f"{{name}} was imported", name=name)

sys.meta_path.insert(0, Refuse())
"""
RUN = f"""{REFUSE}
import numpy as np
from bismooth import Bundle
from bismooth.engines.bundle_choice import choose_engine
from bismooth.engines.onnxruntime import Session
from tokenizers import Tokenizer

bundle = Bundle.load(sys.argv[1], check="size")
choice = choose_engine(bundle)
with bundle.hashing(choice.engine) as check, Session(bundle.path / choice.engine.file, threads=1) as session:
    check()
    np.save(sys.argv[2], session.logits(np.arange(3, 15)[None]))
print(choice.reason, Tokenizer.from_file(str(bundle.tokenizer)).get_vocab_size())
"""


def bismooth(*words: object) -> int:
    return main([str(word) for word in (*words, "--quiet")])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``art``: a quantized llama with an engine and a verdict; ``bundle``: what package makes of it."""
    root = tmp_path_factory.mktemp("bundle")
    tiny = make_tiny(root, num_hidden_layers=1)
    (tiny.source / "LICENSE").write_text("Permission is hereby granted")
    (tiny.source / "README.md").write_text("---\nlicense: mit\n---\n")
    loose = ["--gate", "kl=none", "top1=none", "perplexity_ratio=none"]
    for words in (
        ("export", tiny.source, "-o", root / "float"),
        ("quantize", root / "float", "-o", root / "art", "--data", "none"),
        ("build", root / "art", "--engine", "onnxruntime"),
        ("verify", root / "art", "--data", tiny.text, *SIZES, *loose),
        ("package", root / "art", "-o", root / "bundle"),
    ):
        assert bismooth(*words) == 0, words[0]
    shutil.rmtree(tiny.source)
    return root


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, as a download is one."""
    return shutil.copytree(made / "bundle", tmp_path / "copy")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_lies_in_it(made: Path) -> None:
    assert files(made / "bundle") == [
        "LICENSE",
        "README.md",
        "bundle.json",
        "config.json",
        "engines/onnxruntime/model.audit.json",
        "engines/onnxruntime/model.onnx",
        "engines/onnxruntime/weights.bin",
        "generation_config.json",
        "tokenizer.json",
        "verify.json",
    ]
    loaded = Bundle.load(made / "bundle")
    assert loaded.manifest["licence"] == {"id": "mit", "stated_by": "README.md", "files": ["LICENSE"]}
    assert loaded.manifest["decodes"]
    assert loaded.engine("onnxruntime").capacity == loaded.manifest["dims"]["max_position_embeddings"]
    card = (made / "bundle/README.md").read_text("utf-8")
    assert 'bismooth generate . --prompt "Once upon a time"' in card
    assert "The hop `device` (FP16→INT8) was not judged: " in card


def test_it_runs_without_what_made_it(bundle: Path, made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", RUN, str(bundle), str(tmp_path / "logits.npy")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "onnxruntime on the CPU 96\n"
    with Session(made / "art/engines/onnxruntime/model.onnx", threads=1) as session:
        np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), session.logits(IDS))


@pytest.mark.parametrize(
    "words",
    [["inspect"], ["generate", "--prompt", "w3 w4", "--no-chat", "--max-new-tokens", "3"]],
    ids=["inspect", "generate"],
)
def test_commands_that_run_without_what_made_it(bundle: Path, words: list[str]) -> None:
    command, *options = words
    script = (
        f"{REFUSE}\nfrom bismooth.tools.cli import main; sys.exit(main({[command, str(bundle), *options, '--json']}))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    if command == "inspect":
        assert document["failures"] == []
    else:
        assert document["continuations"][0]["tokens"] == 3


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_inspect_names_what_was_tampered_with(
    bundle: Path, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bismooth("inspect", bundle) == 0
    for name in files(bundle):
        whole = (bundle / name).read_bytes()
        damage(bundle / name)
        capsys.readouterr()
        status = bismooth("inspect", bundle, "--json")
        if name == "bundle.json" and damage is Path.unlink:
            assert status == 2
        else:
            assert status == 1
            (failure,) = json.loads(capsys.readouterr().out)["failures"]
            assert failure.startswith(f"{bundle / name}: ")
        (bundle / name).write_bytes(whole)
    (bundle / "extra.py").touch()
    assert bismooth("inspect", bundle) == 1
    assert "extra.py: is not on record" in " ".join(capsys.readouterr().out.split())


def test_a_warning_goes_to_stderr(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    art = shutil.copytree(made / "art", tmp_path / "art")
    (art / "verify.json").unlink()
    assert bismooth("package", art, "-o", tmp_path / "bundle", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: nothing was verified. ")
    assert json.loads(captured.out)["warnings"] == [captured.err.removeprefix("warning: ").strip()]


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("mode", ["kill", "full"])
def test_a_run_that_is_cut_off_leaves_no_half(made: Path, tmp_path: Path, mode: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(made / "art", root / "art")
    before = json.loads(json.dumps(snapshot(root)))
    command = [str(INTERRUPTED), mode, str(root), "package", str(root / "art"), "-o", str(root / "bundle"), "--force"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    *cut_off, last = [json.loads(line) for line in done.stdout.splitlines()]
    whole = {f"bundle/{name}" for name in files(made / "bundle")}
    assert len(cut_off) > 10
    for run in cut_off:
        assert run["status"] == (-signal.SIGKILL if mode == "kill" else 2)
        seen = {name: value for name, value in run["files"].items() if not name.startswith(".bundle.")}
        assert seen == before or (mode == "kill" and seen.keys() == before.keys() | whole)
        if mode == "full":
            assert run["files"] == before
            assert "the disk is full" in run["errors"]
    assert last["files"].keys() == before.keys() | whole
    assert Bundle.load(root / "bundle").engines
