"""Engines in parts, through the command line: built, inspected, verified, run, and refused where they do not fit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines.chain import CHAIN, Chain
from bismooth.engines.onnxruntime_decoder import OnnxRuntimeDecoder
from bismooth.tools.cli import main
from tests.tiny import SIZES, Tiny, listing, make_tiny, snapshot

IDS = np.array([[5, 6, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


@dataclass(frozen=True)
class Made:
    tiny: Tiny
    float: Path
    quantized: Path


def run(*words: object) -> int:
    return main([str(word) for word in (*words, "--quiet")])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A llama with caches."""
    folder = tmp_path_factory.mktemp("chain")
    tiny = make_tiny(folder)
    result = Made(tiny, folder / "float", folder / "quantized")
    assert run("export", tiny.source, "-o", result.float) == 0
    assert run("quantize", result.float, "-o", result.quantized, "--recipe", "w8a8", "--data", "none") == 0
    return result


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_a_chain_says_what_the_engine_in_one_piece_says(
    made: Made, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = getattr(made, kind)
    before = snapshot(artifact)
    for name, words in {"whole": (), "chain": ("--split-blocks", 2)}.items():
        assert run("build", artifact, "--engine", "onnxruntime", "-o", tmp_path / name, *words, "--json") == 0
    assert snapshot(artifact) == before
    documents = [json.loads(text) for text in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0")]
    whole, chain = documents
    for key in ("int8_linears", "linears", "int8_gemms", "int8_mac_share"):
        assert chain[key] == whole[key]
    assert [part["holds"] for part in chain["parts"]] == ["embedding", "blocks 0-1", "blocks 2-2", "head"]
    assert chain["estimated_memory_bytes"] == max(part["estimated_bytes"] for part in chain["parts"])
    assert chain["peak_rss_bytes"] > 0
    engines = [tmp_path / "whole/model.onnx", tmp_path / "chain" / CHAIN]
    logits: list[Any] = []
    for engine in engines:
        with OnnxRuntimeDecoder(engine) as decoder:
            logits.append([decoder.prefill(IDS, MASK), *(decoder.decode(IDS[:, step]) for step in range(4))])
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-5 * np.abs(logits[0]).max())


def test_a_chain_generates_text(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts: list[Any] = []
    for name, words in {"whole": (), "chain": ("--split-blocks", 3)}.items():
        assert run("build", made.float, "--engine", "onnxruntime", "-o", tmp_path / name, *words) == 0
        capsys.readouterr()
        asked = ("generate", tmp_path / name, "--prompt", "w5 w6 w7", "--no-chat", "--max-new-tokens", 8, "--json")
        assert run(*asked) == 0
        texts.append(printed(capsys)["continuations"][0]["text"])
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    ("name", "caches"), [("gemma3", True), ("gpt2", True), ("opt", True), ("gpt_neox", False), ("bert", False)]
)
def test_chains_of_architectures_compute_what_the_whole_does(
    tmp_path: Path, name: str, caches: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, artifact = make_tiny(tmp_path, name), tmp_path / "float"
    assert run("export", tiny.source, "-o", artifact, "--kv-cache" if caches else "--no-kv-cache") == 0
    for engine in ("null", "onnxruntime"):
        assert run("build", artifact, "--engine", engine, "--split-blocks", 2) == 0
    capsys.readouterr()
    assert run("verify", artifact, "--data", tiny.text, *SIZES, "--hop", "audit", "--json") == 0
    (hop,) = printed(capsys)["hops"]
    assert (hop["verdict"], hop["judged"]) == ("passed", ["chains"])
    chains = hop["metrics"]["chains"]
    assert chains.keys() == {"null-chain2", "onnxruntime-chain2"}
    assert [(figures["equal"], figures["parts"]) for figures in chains.values()] == [(True, 4)] * 2


def test_a_quantized_chain_is_audited_and_compared(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = made.quantized / "engines/null-chain3"
    assert run("build", made.quantized, "--engine", "null", "--split-blocks", 3, "--force") == 0
    capsys.readouterr()
    verify = ("verify", made.quantized, "--data", made.tiny.text, *SIZES, "--hop", "audit", "-o", tmp_path / "v.json")
    assert run(*verify, "--json") == 0
    (hop,) = printed(capsys)["hops"]
    assert hop["metrics"]["engines"] == {"null-chain3": 1.0}
    assert hop["metrics"]["chains"]["null-chain3"]["equal"]
    assert run(*verify) == 0
    assert "the 5 parts of null-chain3 compute the same" in " ".join(capsys.readouterr().out.split())
    part = engine / "part-02.engine"
    part.write_text(part.read_text().replace(":", ";", 1))
    assert run(*verify, "--json") == 1
    assert "part-02.engine: expected" in printed(capsys)["failures"][0]


def test_inspect_shows_the_parts(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = tmp_path / "engine"
    assert run("build", made.quantized, "--engine", "null", "--split-blocks", 2, "-o", engine) == 0
    capsys.readouterr()
    assert run("inspect", engine, "--json") == 0
    document = printed(capsys)
    assert [part["gives"] and part["gives"]["name"] for part in document["chain"]] == [
        "model.embed_tokens/Gather",
        "model.layers.1/Add_1",
        "model.layers.2/Add_1",
        None,
    ]
    assert run("inspect", engine) == 0
    assert "blocks 0-1" in capsys.readouterr().out
    file = engine / Chain.load(engine / CHAIN).parts[1].file
    file.write_text(file.read_text().replace(":", ";", 1))
    assert run("inspect", engine) == 1
    assert "part-01.engine: expected SHA-256" in " ".join(capsys.readouterr().out.split())


def test_too_little_memory(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("build", made.quantized, "--engine", "onnxruntime", "-o", tmp_path / "engine", "--memory", "10MB")
    for more in ((), ("--split-blocks", 2)):
        assert run(*words, *more) == 2
        error = capsys.readouterr().err
        assert "of memory, and there are 10MB by --memory. Expected" in error
    assert listing(tmp_path) == set()


def test_models_without_so_many_blocks(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("build", made.quantized, "--engine", "null", "-o", tmp_path / "engine")
    assert run(*words, "--split-blocks", 4) == 2
    assert "--split-blocks 4:" in (error := capsys.readouterr().err)
    assert "has 3 blocks. Expected 1 to 3." in error
    tiny, artifact = make_tiny(tmp_path / "one", num_hidden_layers=1), tmp_path / "one/float"
    assert run("export", tiny.source, "-o", artifact) == 0
    assert run("build", artifact, "--engine", "null", "--split-blocks", 1) == 2
    assert "has no repeated blocks" in capsys.readouterr().err
    assert not (artifact / "engines").exists()


def test_where_chains_do_not_go(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", made.float, "--engine", "onnxruntime", "--split-blocks", 2, "--force") == 0
    assert run("package", made.float, "-o", tmp_path / "bundle", "--engine", "onnxruntime-chain2") == 2
    assert "is a chain of engines, which bundles do not hold" in capsys.readouterr().err
    manifest = made.float / "engines/onnxruntime-chain2/bismooth.json"
    manifest.write_text(manifest.read_text().replace('"engine": "onnxruntime"', '"engine": "tensorrt-rtx"'))
    assert run("generate", manifest.parent, "--prompt", "w5") == 2
    assert "a chain of engines of tensorrt-rtx cannot generate text yet" in capsys.readouterr().err
