"""Decoding on the CPU: token for token what transformers generates, whatever the batch, the padding and the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from bismooth.engines import onnxruntime_decoder as decoding
from bismooth.engines import onnxruntime_runs as runs
from bismooth.engines.base import BuildRequest, Logits
from bismooth.engines.decoder import Decoder
from bismooth.engines.onnxruntime_build import OnnxRuntimeBuilder
from bismooth.engines.onnxruntime_decoder import OnnxRuntimeDecoder
from bismooth.engines.subgraph import load_graph
from bismooth.export.artifact import finish_folder
from bismooth.export.errors import BismoothError
from tests.artifacts import FLOAT
from tests.models import ARCHITECTURES, VOCAB, exported

Ids = NDArray[np.int64]
GENERATING = [name for name in ARCHITECTURES if name != "bert"]
IDS = np.array([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7], [0, 0, 0, 0, 9], [0, 11, 12, 13, 14]])
MASK = (np.arange(5) >= np.array([[2], [0], [4], [1]])).astype(np.int64)
MORE = np.array([[0, 21, 22], [23, 24, 25], [0, 0, 26], [27, 28, 29]])
MORE_MASK = (np.arange(3) >= np.array([[1], [0], [2], [0]])).astype(np.int64)
NEW = 20


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as path:
        yield Path(path)
    build.cache_clear()


@cache
def build(name: str, folder: Path, logits: Logits | None = None) -> Path:
    """The engine of a tiny model."""
    engine = folder / f"{name}-{logits}" / "model.onnx"
    OnnxRuntimeBuilder().build(BuildRequest(exported(name).graph, engine, logits=logits))
    return engine


def generate(name: str, ids: Ids, mask: Ids, count: int = NEW) -> Ids:
    """What transformers continues rows with, [B, count]."""
    tokens = exported(name).module.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens.numpy()[:, ids.shape[1] :]


def greedy(decoder: Decoder, ids: Ids, mask: Ids | None, count: int = NEW) -> Ids:
    """Append ids and the ``count`` likeliest tokens; the latter, [B, count], the last of which was not fed."""
    tokens = [decoder.prefill(ids, mask).argmax(-1)]
    while len(tokens) < count:
        tokens.append(decoder.decode(tokens[-1]).argmax(-1))
    return np.stack(tokens, 1)


@pytest.mark.parametrize("name", GENERATING)
def test_tokens_are_those_of_transformers(folder: Path, name: str) -> None:
    with OnnxRuntimeDecoder(build(name, folder)) as decoder:
        assert decoder.vocab_size == VOCAB
        np.testing.assert_array_equal(greedy(decoder, IDS, MASK), generate(name, IDS, MASK))
        assert decoder.length == IDS.shape[1] + NEW - 1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_graph_that_was_not_lowered(name: str) -> None:
    """Its caches are made anew in each run."""
    with OnnxRuntimeDecoder(exported(name).graph) as decoder:
        for _ in range(2):
            np.testing.assert_array_equal(greedy(decoder, IDS, MASK), generate(name, IDS, MASK))
            decoder.reset()


@pytest.mark.parametrize("logits", ["last", "all"])
def test_a_second_prompt_behind_the_first(folder: Path, logits: Logits) -> None:
    """As transformers continues all that was said, with padding between the turns."""
    with OnnxRuntimeDecoder(build("llama", folder, logits)) as decoder:
        said = greedy(decoder, IDS, MASK, 4)
        decoder.decode(said[:, -1])
        continued = greedy(decoder, MORE, MORE_MASK, 8)
    ids = np.concatenate([IDS, said, MORE], 1)
    mask = np.concatenate([MASK, np.ones_like(said), MORE_MASK], 1)
    np.testing.assert_array_equal(continued, generate("llama", ids, mask, 8))


@pytest.mark.parametrize("rows", [1, 4])
def test_long_prompts_run_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    ids, mask = np.concatenate([IDS, MORE], 1)[:rows], np.concatenate([MASK, np.ones_like(MORE)], 1)[:rows]
    monkeypatch.setattr(decoding, "PIECE", 3)
    with OnnxRuntimeDecoder(build("gemma2", folder)) as decoder:
        np.testing.assert_array_equal(greedy(decoder, ids, mask, 6), generate("gemma2", ids, mask, 6))


def test_caches_grow_and_keep_what_is_in_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ROOM", 2)
    with OnnxRuntimeDecoder(build("qwen3", folder)) as decoder:
        np.testing.assert_array_equal(greedy(decoder, IDS, MASK), generate("qwen3", IDS, MASK))


def test_caches_grow_for_longer_texts_alone(folder: Path) -> None:
    """Not each time that a batch has other rows."""
    with OnnxRuntimeDecoder(build("llama", folder)) as decoder:
        for rows in (1, 4, 1, 4):
            decoder.reset()
            decoder.prefill(IDS[:rows], MASK[:rows])
        runner: Any = decoder._run  # pyright: ignore[reportPrivateUsage]
        assert {cache.shape[2] for cache in runner._caches.values()} == {runs.ROOM}


def test_an_interrupt_while_caches_grow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers that were bound before are gone then."""
    monkeypatch.setattr(runs, "ROOM", 6)

    def interrupt(_session: object) -> None:
        raise KeyboardInterrupt

    with OnnxRuntimeDecoder(build("llama", folder)) as decoder:
        token = decoder.prefill(IDS, MASK).argmax(-1)
        decoder.decode(token)
        runner: Any = decoder._run  # pyright: ignore[reportPrivateUsage]
        before = runner._binding
        with monkeypatch.context() as patched:
            patched.setattr(decoding.Session, "bind", interrupt)
            with pytest.raises(KeyboardInterrupt):
                decoder.decode(token)
        decoder.reset()
        np.testing.assert_array_equal(greedy(decoder, IDS, MASK, 1), generate("llama", IDS, MASK, 1))
        assert runner._binding is not before


def test_batches_of_any_size_after_a_reset(folder: Path) -> None:
    with OnnxRuntimeDecoder(build("llama", folder)) as decoder:
        for rows in (4, 4, 1, 2):
            tokens = greedy(decoder, IDS[:rows], MASK[:rows], 6)
            np.testing.assert_array_equal(tokens, generate("llama", IDS[:rows], MASK[:rows], 6))
            decoder.reset()
            assert decoder.length == 0


def test_logits_are_not_overwritten_by_later_steps(folder: Path) -> None:
    with OnnxRuntimeDecoder(build("llama", folder)) as decoder:
        first = decoder.prefill(IDS, MASK)
        kept = first.copy()
        second = decoder.decode(first.argmax(-1))
        np.testing.assert_array_equal(first, kept)
        assert (first.shape, second.shape, first.dtype) == ((4, VOCAB), (4, VOCAB), np.float32)


def test_capacity_is_what_the_manifest_says(folder: Path) -> None:
    engine = build("opt", folder)
    with OnnxRuntimeDecoder(engine) as decoder:
        assert decoder.capacity == decoding.CAPACITY
    finish_folder(engine.parent, replace(FLOAT, kind="engine", graphs={}, dims={"max_position_embeddings": 64}))
    with OnnxRuntimeDecoder(engine, threads=1) as decoder:
        assert decoder.capacity == 64


def test_no_room(folder: Path) -> None:
    with OnnxRuntimeDecoder(build("llama", folder), capacity=6) as decoder:
        token = decoder.prefill(IDS, MASK).argmax(-1)
        decoder.decode(token)
        with pytest.raises(BismoothError, match=r"model\.onnx: has room for 6 positions per row, and 7 were asked for"):
            decoder.decode(token)
        with pytest.raises(BismoothError, match=r"expected 1 or more tokens for each of 4 rows .* got 1 for 2"):
            decoder.decode(token[:2])


def test_a_closed_decoder(folder: Path) -> None:
    decoder = OnnxRuntimeDecoder(build("llama", folder))
    decoder.close()
    with pytest.raises(BismoothError, match=r"model\.onnx: the session was closed"):
        decoder.prefill(IDS)


def test_graphs_without_caches_and_with_other_inputs(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match=r"cannot generate text\. .* and caches as inputs, got none\. Export"):
        OnnxRuntimeDecoder(exported("bert").graph)
    model = load_graph(exported("llama").graph)
    model.graph.input.append(helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1]))
    for file in exported("llama").folder.glob("*.safetensors"):
        (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BismoothError, match=r"cannot generate text\. .*, got the input 'pixels'\."):
        OnnxRuntimeDecoder(tmp_path / "model.onnx")
