"""``bismooth generate``: what is written, what is returned, and what an interrupt leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.engines.generation import Ended
from bismooth.engines.sampling import Sampling
from bismooth.export.errors import BismoothError
from bismooth.tools import console
from bismooth.tools.cli import main
from bismooth.tools.generate import generate
from tests import toy_tokenizers as toy
from tests.chat_engine import make_engine, run_on, words_engine
from tests.numpy_decoder import NumpyDecoder, ScriptedDecoder

STOP: Mapping[str, Any] = {"config.json": {"eos_token_id": 4}}


class InterruptedDecoder(ScriptedDecoder):
    """One whose ``last`` call is interrupted."""

    def __init__(self, vocab_size: int, script: list[int], last: int) -> None:
        super().__init__(vocab_size, script)
        self.last = last

    def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        if len(self.calls) == self.last:
            self.calls.append(0)
            raise KeyboardInterrupt
        return super().prefill(ids, mask)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return words_engine(tmp_path / "engine", files=STOP)


def test_text_is_written_as_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = toy.byte_level()
    tokens = tokenizer.encode("thé\n👍").ids
    run_on(ScriptedDecoder(tokenizer.get_vocab_size(), tokens), monkeypatch)
    pieces: list[str] = []
    path = make_engine(tmp_path / "engine", tokenizer)
    result = generate(path, ["a"], max_new_tokens=len(tokens), chat=False, write=pieces.append)
    assert [piece for piece in pieces if piece] == ["th", "é", "\n", "👍", "\n"]
    (one,) = result.continuations
    assert (one.prompt, one.text, one.prompt_tokens, one.tokens) == ("a", "thé\n👍", 1, len(tokens))


def test_prompts_are_messages_where_there_is_a_template(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = ScriptedDecoder(6, [1, 4])
    run_on(decoder, monkeypatch)
    asked = generate(words, ["red"])
    assert (asked.continuations[0].prompt_tokens, asked.continuations[0].text) == (4, "red")
    decoder.reset()
    assert generate(words, ["red"], system="blue").continuations[0].prompt_tokens == 7
    decoder.reset()
    assert generate(words, ["red"], chat=False).continuations[0].prompt_tokens == 1


def test_texts_are_continued_where_there_is_no_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(NumpyDecoder(6), monkeypatch)
    path = words_engine(tmp_path / "engine", template=None)
    assert generate(path, ["red blue"]).continuations[0].prompt_tokens == 2
    with pytest.raises(BismoothError, match="has no chat template"):
        generate(path, ["red"], chat=True)
    message = f"--system: has no effect: {path} has no chat template. Leave it out."
    with pytest.raises(BismoothError, match=re.escape(message)):
        generate(path, ["red"], system="blue")


def test_several_prompts_come_one_after_the_other(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(NumpyDecoder(6), monkeypatch)
    pieces: list[str] = []
    prompts = ["red", "green blue", "blue"]
    result = generate(words, prompts, max_new_tokens=5, chat=False, write=pieces.append)
    texts = [one.text for one in result.continuations]
    assert pieces == ["".join(f"[{number}] {text}\n" for number, text in enumerate(texts, 1))]
    for prompt, one in zip(prompts, result.continuations, strict=True):
        run_on(NumpyDecoder(6), monkeypatch)
        assert generate(words, [prompt], max_new_tokens=5, chat=False).continuations == (one,)


def test_a_stop_string_ends_its_row(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(ScriptedDecoder(6, [1, 2, 3, 1]), monkeypatch)
    result = generate(words, ["red"], stop=["green b"], chat=False)
    (one,) = result.continuations
    assert (one.text, one.tokens, one.ended) == ("red ", 3, "stop")


def test_sampling_is_passed_on(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(seed: int) -> str:
        run_on(NumpyDecoder(6), monkeypatch)
        sampling = Sampling(temperature=20.0, seed=seed)
        return generate(words, ["red"], sampling=sampling, max_new_tokens=20).continuations[0].text

    assert text(1) == text(1) != text(2)


def test_the_result_as_json(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(ScriptedDecoder(6, [1, 2, 4]), monkeypatch)
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert json.loads(console.json_text(generate(words, ["blue"]).to_json())) == {
        "engine": str(words),
        "continuations": [
            {"prompt": "blue", "text": "red green", "prompt_tokens": 4, "tokens": 2, "ended": "stop"},
        ],
        "prefill_tokens": 4,
        "prefill_seconds": 1,
        "prefill_tokens_per_second": 4,
        "decode_tokens": 2,
        "decode_seconds": 2,
        "decode_tokens_per_second": 1,
    }


Capture = pytest.CaptureFixture[str]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(words: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Run:
    """Run the command on a decoder: exit status, stdout, stderr."""

    def command(decoder: NumpyDecoder, *arguments: str) -> tuple[int, str, str]:
        run_on(decoder, monkeypatch)
        status = main(["generate", str(words), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


RATES = r"prefill [\d.e+]+ tokens/s \(\d+ in \d+\.\d\d s\)(, decode [\d.e+]+ tokens/s \(\d+ in \d+\.\d\d s\))?"


def test_text_goes_to_stdout_and_rates_to_stderr(run: Run) -> None:
    status, out, err = run(ScriptedDecoder(6, [1, 2, 4]), "--prompt", "red")
    assert (status, out) == (0, "red green\n")
    assert re.fullmatch(rf"load the engine\n{RATES}\n", err)


def test_the_reason_is_named_if_it_was_not_the_model(run: Run) -> None:
    _, out, err = run(ScriptedDecoder(6, [1]), "--prompt", "red", "--max-new-tokens", "2")
    assert out == "red red\n"
    assert re.search(rf"{RATES}; ended: length\n$", err)
    assert run(ScriptedDecoder(6, [1], capacity=6), "--prompt", "red")[2].endswith("; ended: capacity\n")


def test_quiet_leaves_the_text_alone(run: Run) -> None:
    assert run(ScriptedDecoder(6, [1, 4]), "--prompt", "red", "--quiet") == (0, "red\n", "")


def test_several_prompts_are_numbered(run: Run) -> None:
    status, out, err = run(ScriptedDecoder(6, [1, 4]), "--prompt", "red", "green", "--no-chat")
    assert (status, out) == (0, "[1] red\n[2] red\n")
    assert err.startswith("load the engine\ngenerate\nprefill ")


def test_json_stands_alone_on_stdout(run: Run) -> None:
    status, out, err = run(ScriptedDecoder(6, [1, 4]), "--prompt", "red", "--json")
    assert (status, err) == (0, "load the engine\ngenerate\n")
    assert json.loads(out)["continuations"][0]["text"] == "red"


def test_an_interrupt_keeps_what_was_written(run: Run) -> None:
    status, out, err = run(InterruptedDecoder(6, [1, 2, 3], last=2), "--prompt", "red")
    assert (status, out) == (130, "red green\n")
    assert re.fullmatch(rf"load the engine\n{RATES}; ended: interrupted\n", err)


def test_a_reader_who_goes_away_ends_the_text(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(ScriptedDecoder(6, [1, 2, 3]), monkeypatch)
    written: list[str] = []

    def write(text: str) -> bool:
        written.append(text)
        return len(written) < 2

    result = generate(words, ["red"], write=write)
    assert written[:2] == ["red", " green"]
    assert result.continuations[0].ended is Ended.INTERRUPTED
    assert result.continuations[0].tokens == 2


def test_an_interrupted_batch_is_written_as_far_as_it_is(run: Run) -> None:
    status, out, err = run(InterruptedDecoder(6, [1, 2, 3], last=2), "--prompt", "red", "blue")
    assert (status, out) == (130, "[1] red green\n[2] red green\n")
    assert err.endswith("; ended: interrupted\n")


def test_an_interrupt_while_the_prompt_is_read(run: Run) -> None:
    status, out, err = run(InterruptedDecoder(6, [1], last=0), "--prompt", "red")
    assert (status, out, err) == (130, "\n", "load the engine\nended: interrupted\n")


def test_an_interrupted_run_as_json(run: Run) -> None:
    status, out, _ = run(InterruptedDecoder(6, [1, 2, 3], last=2), "--prompt", "red", "--json")
    (one,) = json.loads(out)["continuations"]
    assert (status, one["text"], one["ended"]) == (130, "red green", "interrupted")


def test_a_prompt_that_does_not_fit_is_bad_input(run: Run) -> None:
    status, out, err = run(NumpyDecoder(6, capacity=3), "--prompt", "red")
    assert (status, out) == (2, "")
    assert "error: numpy: has room for 3 positions per row, and 4 were asked for" in err


def test_an_empty_prompt_is_bad_input(run: Run) -> None:
    status, _, err = run(NumpyDecoder(6), "--prompt", "", "--no-chat")
    assert status == 2
    assert "error: generate: prompt 1 has no tokens." in err
