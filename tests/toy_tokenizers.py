"""Small tokenizers of every kind whose decoders differ, each with the special token ``<|end|>``."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

END = "<|end|>"
_MERGED = ("th", "he", "in", "é", "你", "👍", "▁a", "▁the", "▁")


def byte_level() -> Tokenizer:
    """As GPT-2's: tokens are bytes, so a character may be split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("ä", "½")]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_end(tokenizer)


def byte_fallback() -> Tokenizer:
    """As Llama 2's: ``▁`` for spaces, bytes for what has no token, and no space at the very beginning."""
    pieces = [*"abcdefghijklmnopqrstuvwxyz", *_MERGED, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("t", "h"), ("h", "e"), ("i", "n"), ("▁", "a")]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _with_end(tokenizer)


def metaspace() -> Tokenizer:
    """As SentencePiece's unigram models."""
    pieces: list[tuple[str, float]] = [("<unk>", 0.0)]
    pieces += [(token, -1.0 - number) for number, token in enumerate([*_MERGED, *"abcdefghijklmnopqrstuvwxyz"])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_end(tokenizer)


def word_piece() -> Tokenizer:
    """As BERT's: ``##`` continues a word, and punctuation joins the word before."""
    pieces = ["[UNK]", "the", "a", "##ing", "##s", "walk", ".", ",", "n't", "do", "not", "'", "##é", "é"]
    tokenizer = Tokenizer(models.WordPiece({token: number for number, token in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_end(tokenizer)


def word_suffix() -> Tokenizer:
    """As CLIP's: ``</w>`` ends a word, which is a space only if another word comes."""
    pieces = ["t", "h", "e", "the</w>", "a</w>", "in", "g</w>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(pieces)}, merges=[]))
    tokenizer.decoder = decoders.BPEDecoder()
    return _with_end(tokenizer)


def words() -> Tokenizer:
    """Whole words and no decoder."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1, "green": 2, "blue": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_end(tokenizer)


KINDS = (byte_level, byte_fallback, metaspace, word_piece, word_suffix, words)


def _with_end(tokenizer: Tokenizer) -> Tokenizer:
    untyped: Any = tokenizer
    untyped.add_special_tokens([AddedToken(END, special=True)])
    untyped.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer
