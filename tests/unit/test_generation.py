"""The loop: what each step gives, and why rows end."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bismooth.engines.generation import Ended, Generation, pad_left
from bismooth.engines.sampling import GREEDY, Sampling
from bismooth.export.errors import BismoothError
from tests.numpy_decoder import NumpyDecoder, ScriptedDecoder


def reference(prompt: list[int], count: int, vocab_size: int = 11) -> list[int]:
    """Greedy tokens, each from a prefill of all before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(NumpyDecoder(vocab_size).prefill(np.array([tokens])).argmax()))
    return tokens[len(prompt) :]


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@given(st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_row_of_a_batch_is_what_it_is_alone(prompts: list[list[int]]) -> None:
    generation = Generation(NumpyDecoder(11), prompts, GREEDY, limit=5)
    steps = list(generation)
    assert [row.tokens for row in generation.rows] == [reference(prompt, 5) for prompt in prompts]
    assert [[step[row] for step in steps] for row in range(len(prompts))] == [row.tokens for row in generation.rows]
    assert {row.ended for row in generation.rows} == {Ended.LENGTH}


def test_prompts_are_appended_to_the_caches() -> None:
    decoder = NumpyDecoder(11)
    decoder.prefill(np.array([[3, 1, 4]]))
    generation = Generation(decoder, [[1, 5]], GREEDY, limit=3)
    list(generation)
    assert generation.rows[0].tokens == reference([3, 1, 4, 1, 5], 3)
    assert decoder.calls == [3, 2, 1, 1]
    assert decoder.length == 7  # the last token was never fed


def test_a_stop_token_ends_its_row_alone() -> None:
    alone = [reference([1, 2, 3], 8), reference([7], 8)]
    stop = next(token for token in alone[0] if token not in alone[1])
    generation = Generation(NumpyDecoder(11), [[1, 2, 3], [7]], GREEDY, stop=frozenset({stop}), limit=8)
    steps = list(generation)
    size = alone[0].index(stop)
    assert [row.tokens for row in generation.rows] == [alone[0][:size], alone[1]]
    assert [row.ended for row in generation.rows] == [Ended.STOP, Ended.LENGTH]
    assert [0 in step for step in steps] == [True] * size + [False] * (8 - size)


def test_it_ends_when_all_rows_have() -> None:
    generation = Generation(ScriptedDecoder(9, [4, 5]), [[1], [2, 3]], GREEDY, stop=frozenset({5, 6}))
    assert list(generation) == [{0: 4, 1: 4}, {}]
    assert generation.decode_tokens == 2  # the stop tokens are work too


def test_a_stop_token_may_be_the_first() -> None:
    generation = Generation(ScriptedDecoder(9, [5]), [[1]], GREEDY, stop=frozenset({5}))
    assert list(generation) == [{}]
    assert (generation.rows[0].tokens, generation.rows[0].ended) == ([], Ended.STOP)


def test_rows_end_where_the_decoder_is_full() -> None:
    decoder = NumpyDecoder(11, capacity=5)
    generation = Generation(decoder, [[1, 2, 3], [4]], GREEDY, limit=10)
    list(generation)
    assert [row.tokens for row in generation.rows] == [reference([1, 2, 3], 3), reference([4], 3)]
    assert {row.ended for row in generation.rows} == {Ended.CAPACITY}
    assert decoder.length == 5


def test_a_prompt_that_fills_the_decoder_still_has_a_next_token() -> None:
    generation = Generation(NumpyDecoder(11, capacity=3), [[1, 2, 3]], GREEDY, limit=10)
    list(generation)
    assert generation.rows[0].tokens == reference([1, 2, 3], 1)
    assert generation.rows[0].ended is Ended.CAPACITY


def test_the_limit_is_named_where_both_end_a_row() -> None:
    generation = Generation(NumpyDecoder(11, capacity=3), [[1, 2]], GREEDY, limit=2)
    list(generation)
    assert generation.rows[0].ended is Ended.LENGTH


def test_the_caller_ends_rows() -> None:
    generation = Generation(NumpyDecoder(11), [[1], [2]], GREEDY, limit=4)
    for number, _ in enumerate(generation):
        if number == 1:
            generation.stop(0)
    generation.stop(1)  # ended already, for another reason
    assert [len(row.tokens) for row in generation.rows] == [2, 4]
    assert [row.ended for row in generation.rows] == [Ended.STOP, Ended.LENGTH]


def test_an_interrupt_ends_the_rows_and_drops_the_caches() -> None:
    decoder = NumpyDecoder(11)
    generation = Generation(decoder, [[1], [2]], GREEDY, limit=4)
    for number, _ in enumerate(generation):
        if number == 0:
            generation.stop(1)
        if number == 2:
            generation.interrupt()
    assert [row.ended for row in generation.rows] == [Ended.INTERRUPTED, Ended.STOP]
    assert len(generation.rows[0].tokens) == 3
    assert decoder.length == 0


def test_work_is_counted_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    generation = Generation(NumpyDecoder(11), [[1, 2, 3], [4]], GREEDY, limit=4)
    for _ in generation:
        next(clock)  # the caller's own time
    assert (generation.prefill_tokens, generation.decode_tokens) == (4, 6)
    assert (generation.prefill_seconds, generation.decode_seconds) == (1, 3)


def test_samples_are_those_of_the_seed() -> None:
    def tokens(prompts: list[list[int]], seed: int) -> list[list[int]]:
        generation = Generation(NumpyDecoder(50), prompts, Sampling(2.0, seed=seed), limit=8)
        list(generation)
        return [row.tokens for row in generation.rows]

    assert tokens([[1, 2]], 0) == tokens([[1, 2]], 0) != tokens([[1, 2]], 1)
    assert tokens([[1, 2], [3]], 0)[0] == tokens([[1, 2]], 0)[0]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "generate: Expected one or more prompts, got none."),
        ([[1], []], "generate: prompt 2 has no tokens. Expected some text"),
        (
            [[1, 11]],
            "generate: prompt 1 has the token 11, but the model knows 11. Expected the tokenizer of the model.",
        ),
    ],
)
def test_prompts_that_cannot_be_continued(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(BismoothError, match=re.escape(message)):
        Generation(NumpyDecoder(11), prompts, GREEDY)


def test_no_new_tokens() -> None:
    with pytest.raises(BismoothError, match=r"generate: 0 new tokens were asked for\. Expected 1 or more\."):
        Generation(NumpyDecoder(11), [[1]], GREEDY, limit=0)


def test_a_prompt_that_does_not_fit() -> None:
    generation = Generation(NumpyDecoder(11, capacity=2), [[1, 2, 3]], GREEDY)
    with pytest.raises(BismoothError, match="numpy: has room for 2 positions per row, and 3 were asked for"):
        list(generation)
