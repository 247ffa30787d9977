"""Streamed text is the text of all tokens, and no character comes in halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bismooth.engines.detokenizer import Detokenizer, StopText
from bismooth.export.errors import BismoothError
from tests import toy_tokenizers as toy

Make = Callable[[], Tokenizer]


def stream(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


def ids(tokenizer: Tokenizer, *names: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[name] for name in names]


@pytest.mark.parametrize("make", toy.KINDS, ids=lambda make: make.__name__)
@given(data=st.data())
def test_the_pieces_joined_are_the_text_of_all_tokens(make: Make, data: st.DataObject) -> None:
    tokenizer = make()
    tokens = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 1), max_size=12))
    pieces = stream(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


@pytest.mark.parametrize("make", [toy.byte_level, toy.byte_fallback], ids=lambda make: make.__name__)
@given(text=st.text(st.sampled_from("the in,é你好👍▁ \n") | st.characters(exclude_categories=["Cs"]), max_size=8))
def test_no_piece_has_half_a_character(make: Make, text: str) -> None:
    tokenizer = make()
    pieces = stream(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == (text if make is toy.byte_level else text.replace("▁", " "))
    if "\ufffd" not in text:
        assert not [piece for piece in pieces if "\ufffd" in piece]


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = toy.byte_level()
    pieces = stream(tokenizer, tokenizer.encode("the thé👍!").ids)
    assert pieces == ["the", " ", "th", "", "é", "", "", "", "👍", "!", ""]


def test_spaces_are_right() -> None:
    fallback, pieces = toy.byte_fallback(), toy.word_piece()
    assert stream(fallback, fallback.encode("a in a").ids) == ["a", " ", "in", " a", ""]
    assert stream(pieces, pieces.encode("walking, a walk.").ids) == ["walk", "ing", ",", " a", " walk", ".", ""]


def test_an_unfinished_character_comes_at_the_end() -> None:
    tokenizer = toy.byte_level()
    tokens = tokenizer.encode("a👍").ids[:-1]
    assert stream(tokenizer, tokens) == ["a", "", "", "", "\ufffd"]


def test_special_and_unknown_tokens_have_no_text() -> None:
    tokenizer = toy.byte_level()
    tokens = [*ids(tokenizer, toy.END), 10**6, *tokenizer.encode("the").ids]
    assert stream(tokenizer, tokens) == ["", "", "the", ""]


def test_a_run_of_byte_tokens_goes_on_behind_a_special_token() -> None:
    tokenizer = toy.byte_fallback()
    tokens = ids(tokenizer, "<0xC3>", "<0xA9>", toy.END, "<0xFF>", "a")
    assert "".join(stream(tokenizer, tokens)) == tokenizer.decode(tokens) == 3 * "\ufffd" + "a"


def passed(stops: tuple[str, ...], pieces: Sequence[str]) -> tuple[list[str], bool]:
    text = StopText(stops)
    return [*(text.push(piece) for piece in pieces), text.finish()], text.found


def test_text_ends_before_a_stop_string() -> None:
    assert passed(("\n\n",), ["one\n", "two", "\n", "\nthree", "four"]) == (["one", "\ntwo", "", "", "", ""], True)
    assert passed(("END", "N"), ["aEN", "D"]) == (["aE", "", ""], True)
    assert passed(("END",), ["aEN", "", "E"]) == (["a", "", "EN", "E"], False)
    assert passed((), ["a", "b"]) == (["a", "b", ""], False)


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_passed_is_the_text_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    matches = [(place + len(stop), place) for stop in stops if (place := whole.find(stop)) >= 0]
    given_pieces, found = passed(tuple(stops), pieces)
    assert found == bool(matches)
    assert "".join(given_pieces) == (whole[: min(matches)[1]] if matches else whole)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(BismoothError, match=r"generate: a stop string is empty\. Expected text that ends"):
        StopText(("a", ""))
