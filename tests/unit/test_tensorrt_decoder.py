"""Decoding on a GPU: what comes out, against a model without caches; what is sent, kept and freed."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.engines.tensorrt_decoder import TensorRTDecoder
from bismooth.engines.tensorrt_session import EngineSession
from bismooth.export.errors import BismoothError
from tests import fake_decoding
from tests.cached_model import KV_HEADS, LAYERS, SIZE, VOCAB, expected_logits
from tests.fake_cuda import FakeCuda, Status
from tests.fake_decoding import CAPACITY, LONGEST, ROWS, write_decoding_engine
from tests.fake_engine import write_engine

IDS = np.random.default_rng(0).integers(0, VOCAB, (ROWS, CAPACITY))
PADDED = np.array([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
Install = Callable[..., FakeCuda]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """See :func:`.fake_decoding.install`."""
    return partial(fake_decoding.install, monkeypatch)


def assert_close(logits: NDArray[np.float32], expected: NDArray[np.float64], atol: float = 1e-4) -> None:
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=atol)


def assert_freed(cuda: FakeCuda) -> None:
    assert (cuda.memory, cuda.streams) == ({}, {})


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_prompt_and_tokens_one_by_one(tmp_path: Path, install: Install, rows: int, window: int | None) -> None:
    cuda = install()
    ids = IDS[:rows]
    expected = expected_logits(ids, window=window)
    with TensorRTDecoder(write_decoding_engine(tmp_path, window=window)) as decoder:
        assert (decoder.vocab_size, decoder.capacity, decoder.length) == (VOCAB, CAPACITY, 0)
        assert_close(decoder.prefill(ids[:, :4]), expected[:, 3])
        for position in range(4, CAPACITY):
            assert decoder.length == position
            assert_close(decoder.decode(ids[:, position]), expected[:, position])
    assert_freed(cuda)


def test_rows_that_are_padded_on_the_left(tmp_path: Path, install: Install) -> None:
    install()
    real = np.concatenate([PADDED, np.ones((ROWS, CAPACITY - 5), np.int64)], 1)
    expected = expected_logits(IDS, real)
    alone = expected_logits(IDS[:1, 3:])
    np.testing.assert_allclose(expected[0, 3:], alone[0])
    with TensorRTDecoder(write_decoding_engine(tmp_path)) as decoder:
        assert_close(decoder.prefill(IDS[:, :5], PADDED), expected[:, 4])
        for position in range(5, CAPACITY):
            assert_close(decoder.decode(IDS[:, position]), expected[:, position])


def test_a_second_prompt_with_padding_of_its_own(tmp_path: Path, install: Install) -> None:
    install()
    real = np.concatenate([PADDED, np.ones((ROWS, 1), np.int64), PADDED], 1)
    expected = expected_logits(IDS[:, :11], real)
    with TensorRTDecoder(write_decoding_engine(tmp_path)) as decoder:
        decoder.prefill(IDS[:, :5], PADDED)
        decoder.decode(IDS[:, 5])
        assert_close(decoder.prefill(IDS[:, 6:11], PADDED), expected[:, 10])


def test_a_prompt_longer_than_the_longest_sequence_runs_in_pieces(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with TensorRTDecoder(write_decoding_engine(tmp_path)) as decoder:
        assert_close(decoder.prefill(IDS[:2, :13]), expected_logits(IDS[:2, :13])[:, -1])
        assert cuda.called("execute") == [(0, 2, LONGEST), (0, 2, LONGEST), (1, 2, 1)]


def test_padding_that_reaches_into_a_second_piece(tmp_path: Path, install: Install) -> None:
    install()
    mask = np.ones((ROWS, 13), np.int64)
    mask[0, :9] = 0
    mask[2, :2] = 0
    with TensorRTDecoder(write_decoding_engine(tmp_path)) as decoder:
        assert_close(decoder.prefill(IDS[:, :13], mask), expected_logits(IDS[:, :13], mask)[:, -1])


def test_pieces_that_are_too_short_run_token_by_token(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with TensorRTDecoder(write_decoding_engine(tmp_path, shortest=4)) as decoder:
        assert_close(decoder.prefill(IDS[:1, :9]), expected_logits(IDS[:1, :9])[:, -1])
        assert cuda.called("execute") == [(0, 1, LONGEST), (1, 1, 1), (1, 1, 1), (1, 1, 1)]


def test_batches_one_after_another(tmp_path: Path, install: Install) -> None:
    """What an earlier batch left in the caches, padding included, is not seen by later ones."""
    install()
    with TensorRTDecoder(write_decoding_engine(tmp_path)) as decoder:
        for rows in (ROWS, 1, 2):
            decoder.reset()
            assert decoder.length == 0
            mask = PADDED[:rows] if rows == ROWS else None
            real = None if mask is None else np.concatenate([mask, np.ones((rows, 1), np.int64)], 1)
            expected = expected_logits(IDS[:rows, :6], real)
            assert_close(decoder.prefill(IDS[:rows, :5], mask), expected[:, 4])
            assert_close(decoder.decode(IDS[:rows, 5]), expected[:, 5])


def test_caches_in_float16(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with TensorRTDecoder(write_decoding_engine(tmp_path, half=True)) as decoder:
        expected = expected_logits(IDS[:1])
        assert_close(decoder.prefill(IDS[:1, :4]), expected[:, 3], atol=0.5)
        assert_close(decoder.decode(IDS[:1, 4]), expected[:, 4], atol=0.5)
        assert cuda.called("cudaMemsetAsync") == [(0, 2 * ROWS * KV_HEADS * CAPACITY * SIZE, 1000)] * 2 * LAYERS


def test_only_tokens_and_the_logits_of_one_position_cross_the_bus(tmp_path: Path, install: Install) -> None:
    cuda = install()
    rows = 2
    with TensorRTDecoder(write_decoding_engine(tmp_path)) as decoder:
        decoder.prefill(IDS[:rows, :5])
        copies = cuda.called("cudaMemcpyAsync")
        assert [size for kind, size, _ in copies if kind.endswith("DeviceToHost")] == [4 * rows * VOCAB]
        decoder.decode(IDS[:rows, 5])
        cuda.calls.clear()
        decoder.decode(IDS[:rows, 6])
        sent = [("cudaMemcpyAsync", "cudaMemcpyHostToDevice", size, 1000) for size in (8 * rows, 8 * rows, 8 * rows, 8)]
        assert cuda.calls == [
            *sent,
            ("execute", 1, rows, 1),
            ("cudaMemcpyAsync", "cudaMemcpyDeviceToHost", 4 * rows * VOCAB, 1000),
            ("cudaStreamSynchronize", 1000),
        ]


def test_everything_is_allocated_once_for_the_largest_batch(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with TensorRTDecoder(write_decoding_engine(tmp_path)) as decoder:
        sizes = sorted(size for (size,) in cuda.called("cudaMalloc"))
        cache = 4 * ROWS * KV_HEADS * CAPACITY * SIZE
        tokens = 8 * ROWS * LONGEST
        others = [8, 8 * ROWS, tokens, tokens, 8 * ROWS * CAPACITY, 4 * ROWS * VOCAB]
        assert sizes == sorted([*others, *[cache] * 2 * LAYERS])
        decoder.prefill(IDS[:, :9])
        decoder.decode(IDS[:, 9])
        assert len(cuda.called("cudaMalloc")) == len(sizes)


def test_contexts_of_tensorrt_rtx(tmp_path: Path, install: Install) -> None:
    """Prompts of any length run at once; the one shape of tokens is worth compiling and capturing."""
    cuda = install()
    with TensorRTDecoder(write_decoding_engine(tmp_path)):
        strategy = "dynamic_shapes_kernel_specialization_strategy"
        tokens = {strategy: "EAGER", "cuda_graph_strategy": "WHOLE_GRAPH_CAPTURE"}
        assert cuda.called("create context") == [({strategy: "LAZY"},), (tokens,)]


def test_kernels_are_kept_for_the_next_start(tmp_path: Path, install: Install) -> None:
    engine, kernels = write_decoding_engine(tmp_path), tmp_path / "model.sm89.kernels"
    for loaded in ([], [(b"kernels",)]):
        cuda = install()
        with TensorRTDecoder(engine):
            assert cuda.called("deserialize kernels") == loaded
        assert kernels.exists()
        assert cuda.called("end of kernels") == [(0,)]  # no context is left then
    before = kernels.stat()
    with TensorRTDecoder(engine):
        pass
    assert kernels.stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.audit.json",
        "model.engine",
        "model.sm89.kernels",
    ]


@pytest.mark.parametrize("damaged", [slice(0, -1), slice(0, 0), slice(1, None)])
def test_damaged_kernels_are_ignored_and_replaced(tmp_path: Path, install: Install, damaged: slice) -> None:
    engine, kernels = write_decoding_engine(tmp_path), tmp_path / "model.sm89.kernels"
    install()
    with TensorRTDecoder(engine):
        pass
    whole = kernels.read_bytes()
    kernels.write_bytes(whole[damaged])
    cuda = install()
    with TensorRTDecoder(engine) as decoder:
        assert not cuda.called("deserialize kernels")
        assert_close(decoder.prefill(IDS[:1, :3]), expected_logits(IDS[:1, :3])[:, -1])
    assert kernels.read_bytes() == whole


def test_kernels_that_cannot_be_kept(tmp_path: Path, install: Install) -> None:
    engine = write_decoding_engine(tmp_path)
    install(kernels=None)
    with TensorRTDecoder(engine):
        pass
    assert not (tmp_path / "model.sm89.kernels").exists()
    (tmp_path / "model.sm89.kernels").mkdir()
    cuda = install()
    with TensorRTDecoder(engine):
        pass
    assert_freed(cuda)


def test_kernels_are_not_kept_after_an_error(tmp_path: Path, install: Install) -> None:
    install()
    with pytest.raises(ZeroDivisionError), TensorRTDecoder(write_decoding_engine(tmp_path)):
        raise ZeroDivisionError
    assert not (tmp_path / "model.sm89.kernels").exists()


def test_tensorrt_compiles_nothing_when_it_runs(tmp_path: Path, install: Install) -> None:
    cuda = install(version="11.4.0")
    engine = write_decoding_engine(tmp_path, runtime="tensorrt", version="11.4.0", capabilities=())
    with TensorRTDecoder(engine) as decoder:
        assert_close(decoder.prefill(IDS[:1, :3]), expected_logits(IDS[:1, :3])[:, -1])
    assert cuda.called("create context") == [(None,), (None,)]
    assert not cuda.called("end of kernels")
    assert not (tmp_path / "model.sm89.kernels").exists()


def fails(message: str, run: Callable[[], Any]) -> None:
    with pytest.raises(BismoothError, match=re.escape(message)):
        run()


def test_more_positions_than_the_caches_hold(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with TensorRTDecoder(write_decoding_engine(tmp_path)) as decoder:
        fails(
            "has room for 16 positions per row, and 17", lambda: decoder.prefill(np.zeros((1, CAPACITY + 1), np.int64))
        )
        logits = decoder.prefill(IDS[:1])
        fails("has room for 16 positions per row, and 17", lambda: decoder.decode(IDS[0, :1]))
        assert decoder.length == CAPACITY
        executed = len(cuda.called("execute"))
        decoder.reset()
        np.testing.assert_array_equal(decoder.prefill(IDS[:1]), logits)
        assert len(cuda.called("execute")) == 2 * executed


def test_what_is_no_batch_for_the_engine(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with TensorRTDecoder(write_decoding_engine(tmp_path, fewest=2)) as decoder:
        outside = "is outside of the engine's profile. Expected 2 to 3 rows. Build it for more with --batch."
        fails(f"a batch of 1 {outside}", lambda: decoder.prefill(IDS[:1]))
        fails(f"a batch of 4 {outside}", lambda: decoder.prefill(np.zeros((4, 2), np.int64)))
        expected = "expected token ids [batch, sequence] of integers and a mask of their shape, got"
        fails(f"{expected} float64 [2, 3] and [2, 3].", lambda: decoder.prefill(cast(Any, np.zeros((2, 3)))))
        fails(f"{expected} int64 [2, 3] and [2, 2].", lambda: decoder.prefill(IDS[:2, :3], PADDED[:2, :2]))
        fails(f"{expected} int64 [2] and [2].", lambda: decoder.prefill(IDS[0, :2]))
        decoder.prefill(IDS[:2, :3])
        fails("for each of 2 rows", lambda: decoder.decode(IDS[:, 3]))
        assert len(cuda.called("execute")) == 1


def test_a_closed_decoder(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with TensorRTDecoder(write_decoding_engine(tmp_path)) as decoder:
        decoder.close()
        assert_freed(cuda)
        fails("the decoder was closed. Use it inside its 'with' block.", lambda: decoder.prefill(IDS[:1]))


def test_engines_that_generate_no_text(tmp_path: Path, install: Install) -> None:
    cuda = install()
    fails(
        "the engine keeps no keys and values, so it generates no text. Build one of an artifact that was exported with",
        lambda: TensorRTDecoder(write_engine(tmp_path / "plain")),
    )
    engine = write_decoding_engine(tmp_path)
    record = tmp_path / "model.audit.json"
    record.write_text(record.read_text().replace('"past_key_values.1.value": "present.1.value"', '"x": "y"'))
    fails("cannot generate text, since it has the input 'past_key_values.1.value'", lambda: TensorRTDecoder(engine))
    assert_freed(cuda)


@pytest.mark.parametrize(
    ("step", "task"),
    [
        ("context", "prepare to run the engine"),
        ("profile", "choose profile 1"),
        ("shape", f"take the input 'input_ids' with shape [{ROWS}, {LONGEST}]"),
        ("bind", "take an address for 'input_ids'"),
    ],
)
def test_all_is_freed_when_tensorrt_cannot_open_the_engine(
    tmp_path: Path, install: Install, step: str, task: str
) -> None:
    cuda = install(failing=step)
    fails(
        f"TensorRT-RTX 1.7.1 cannot {task}: {step} is broken. Build",
        lambda: TensorRTDecoder(write_decoding_engine(tmp_path)),
    )
    assert_freed(cuda)


@pytest.mark.parametrize("function", ["cudaSetDevice", "cudaStreamCreate", "cudaMalloc", "cudaMemsetAsync"])
def test_all_is_freed_when_cuda_fails_on_opening(tmp_path: Path, install: Install, function: str) -> None:
    cuda = install(FakeCuda(failing={function: Status.cudaErrorMemoryAllocation}))
    fails(
        f"CUDA: {function} failed: cudaErrorMemoryAllocation", lambda: TensorRTDecoder(write_decoding_engine(tmp_path))
    )
    cuda.failing.clear()
    assert_freed(cuda)


def test_a_run_that_fails_is_over_with_a_reset(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with TensorRTDecoder(write_decoding_engine(tmp_path)) as decoder:
        cuda.failing["cudaMemcpyAsync"] = Status.cudaErrorUnknown
        fails("CUDA: cudaMemcpyAsync failed", lambda: decoder.prefill(IDS[:1, :3]))
        cuda.failing.clear()
        decoder.reset()
        assert_close(decoder.prefill(IDS[:1, :3]), expected_logits(IDS[:1, :3])[:, -1])


def test_a_session_scores_all_positions(tmp_path: Path, install: Install) -> None:
    """Of an engine with caches too, window after window."""
    cuda = install()
    with EngineSession(write_decoding_engine(tmp_path)) as session:
        for rows, length in ((ROWS, LONGEST), (1, 2), (2, LONGEST)):
            ids = IDS[:rows, :length]
            assert_close(session.logits(ids), expected_logits(ids))
        fails("outside of the engine's profile", lambda: session.logits(np.zeros((1, LONGEST + 1), np.int64)))
    assert_freed(cuda)
