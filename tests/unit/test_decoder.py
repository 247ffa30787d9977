"""Positions of a decoder's rows, and the decoder that other tests run."""

from __future__ import annotations

import re
from random import Random
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bismooth.engines.decoder import Decoder, Positions
from bismooth.export.errors import BismoothError
from tests.numpy_decoder import NumpyDecoder


def test_masks_grow_and_positions_count_what_is_not_padding() -> None:
    positions = Positions("engine", 6)
    assert positions.append(np.array([[0, 0, 1], [1, 1, 1]])).tolist() == [[0, 0, 0], [0, 1, 2]]
    assert positions.append(np.array([[1], [1]])).tolist() == [[1], [3]]
    assert positions.append(np.array([[0, 1], [1, 1]])).tolist() == [[1, 2], [4, 5]]
    assert positions.mask.tolist() == [[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]
    assert (positions.rows, positions.length) == (2, 6)
    positions.reset()
    assert (positions.rows, positions.length, positions.mask.shape) == (0, 0, (0, 0))
    assert positions.append(np.ones((3, 1), np.int64)).tolist() == [[0], [0], [0]]


@given(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_positions_are_those_of_the_whole_mask(rows: int, sizes: list[int], random: Random) -> None:
    positions = Positions("engine", 12)
    parts = [np.array([[random.randint(0, 1) for _ in range(size)] for _ in range(rows)]) for size in sizes]
    found = np.concatenate([positions.append(part) for part in parts], axis=1)
    whole = np.concatenate(parts, axis=1)
    np.testing.assert_array_equal(found, np.maximum(np.cumsum(whole, axis=1) - 1, 0))
    np.testing.assert_array_equal(positions.mask, whole)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    positions = Positions("art/model.onnx", 4)
    positions.append(np.ones((2, 3), np.int64))
    message = (
        "art/model.onnx: has room for 4 positions per row, and 5 were asked for: 3 that are there and 2 more. "
        "Expected 4 at most. Shorten the text. Engines for a GPU can be built with a larger --capacity."
    )
    with pytest.raises(BismoothError, match=re.escape(message)):
        positions.append(np.ones((2, 2), np.int64))
    assert positions.length == 3
    assert positions.append(np.ones((2, 1), np.int64)).tolist() == [[3], [3]]


@pytest.mark.parametrize(("shape", "got"), [((3, 1), "got 1 for 3"), ((2, 0), "got 0 for 2"), ((0, 2), "got 2 for 0")])
def test_other_rows_and_no_tokens_are_refused(shape: tuple[int, int], got: str) -> None:
    positions = Positions("engine", 4)
    positions.append(np.ones((2, 1), np.int64))
    message = f"engine: expected 1 or more tokens for each of 2 rows of the batch, {got}. Reset the decoder before"
    with pytest.raises(BismoothError, match=re.escape(message)):
        positions.append(np.ones(shape, np.int64))


def test_an_empty_first_batch_is_refused() -> None:
    with pytest.raises(BismoothError, match="expected 1 or more tokens for each of the rows of the batch, got 0 for 1"):
        Positions("engine", 4).append(np.ones((1, 0), np.int64))


def test_the_numpy_decoder_computes_the_same_in_one_go_in_parts_and_padded() -> None:
    decoder: Decoder = NumpyDecoder(11)
    ids = np.array([[3, 1, 4, 1, 5]])
    whole = decoder.prefill(ids)
    decoder.reset()
    decoder.prefill(ids[:, :2])
    decoder.prefill(ids[:, 2:4])
    np.testing.assert_allclose(decoder.decode(ids[:, 4]), whole, rtol=1e-5)
    decoder.reset()
    padded = np.array([[0, 0, 3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8]])
    logits = decoder.prefill(padded, np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7]))
    np.testing.assert_allclose(logits[:1], whole, rtol=1e-5)
    assert not np.allclose(logits[1], whole)


def test_a_mask_has_the_shape_of_its_ids() -> None:
    positions = Positions("engine", 8)
    ids = np.array([[5, 6, 7]])
    assert positions.mask_of(ids, None).tolist() == [[1, 1, 1]]
    assert positions.mask_of(ids, np.array([[0, 1, 1]])).tolist() == [[0, 1, 1]]
    message = r"^engine: expected token ids \[batch, sequence\] of integers and a mask of their shape, got {} and {}\.$"
    for wrong, mask, got, seen in (
        (ids[0], None, r"int64 \[3\]", r"\[3\]"),
        (ids.astype(np.float64), None, r"float64 \[1, 3\]", r"\[1, 3\]"),
        (ids, np.ones((1, 2), np.int64), r"int64 \[1, 3\]", r"\[1, 2\]"),
    ):
        with pytest.raises(BismoothError, match=message.format(got, seen)):
            positions.mask_of(cast(Any, wrong), mask)
