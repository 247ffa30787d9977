"""Chats in turns: caches are kept, and never change an answer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bismooth.engines.generation import Ended
from bismooth.engines.sampling import GREEDY, Sampling
from bismooth.export.errors import BismoothError
from bismooth.tools.chat import Conversation, converse
from bismooth.tools.cli import main
from bismooth.tools.text_model import TextModel, open_text_model
from tests.chat_engine import TEMPLATE, run_on, words_engine
from tests.numpy_decoder import NumpyDecoder, ScriptedDecoder

STOP = {"config.json": {"eos_token_id": 4}}
FIRST_ONLY = TEMPLATE.replace("{{ message.content }}", "{{ message.content.split(' ')[0] }}")
"""Renders only the first word of each message, so that longer answers are not found again."""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TextModel]]:
    """Opens a model of words on a decoder."""
    opened: list[Any] = []

    def open_model(decoder: NumpyDecoder, template: str = TEMPLATE) -> TextModel:
        run_on(decoder, monkeypatch)
        path = words_engine(tmp_path / f"engine{len(opened)}", files=STOP, template=template)
        opened.append(open_text_model(path))
        return opened[-1].__enter__()

    yield open_model
    for context in opened:
        context.__exit__(None, None, None)


def chat(model: TextModel, sampling: Sampling = GREEDY, limit: int = 4, **options: Any) -> Conversation:
    return Conversation(model, sampling, system=options.get("system"), limit=limit, stop=options.get("stop", ()))


def ignore(_: str) -> None: ...


def test_a_turn_appends_what_is_new(model: Callable[..., TextModel]) -> None:
    decoder = ScriptedDecoder(6, [1, 2, 4, 3, 4])
    conversation = chat(model(decoder))
    pieces: list[str] = []
    conversation.answer("red", pieces.append)
    assert decoder.calls == [4, 1, 1]  # the prompt and two words; the stop token was not fed
    conversation.answer("blue", pieces.append)
    assert decoder.calls[3:] == [5, 1]  # the end of the answer, the message, the beginning of an answer
    assert "".join(pieces) == "red greenblue"
    assert [(message["role"], message["content"]) for message in conversation.messages] == [
        *(("user", "red"), ("assistant", "red green")),
        *(("user", "blue"), ("assistant", "blue")),
    ]


def test_an_answer_that_is_rendered_differently_is_computed_anew(model: Callable[..., TextModel]) -> None:
    decoder = ScriptedDecoder(6, [1, 2, 4, 3, 4])
    conversation = chat(model(decoder, FIRST_ONLY))
    conversation.answer("red", ignore)
    conversation.answer("blue", ignore)
    assert decoder.calls == [4, 1, 1, 10, 1]
    assert decoder.length == 11


@given(
    messages=st.lists(st.sampled_from(["red", "green blue", "blue blue red"]), min_size=1, max_size=4),
    template=st.sampled_from([TEMPLATE, FIRST_ONLY]),
    temperature=st.sampled_from([0.0, 3.0]),
    limit=st.integers(1, 4),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_caches_never_change_an_answer(
    model: Callable[..., TextModel], messages: Sequence[str], template: str, temperature: float, limit: int
) -> None:
    def begin() -> Conversation:
        return chat(model(NumpyDecoder(6), template), Sampling(temperature), limit)

    kept = begin()
    for message in messages:
        fresh = begin()
        fresh.messages = list(kept.messages)
        fresh.answer(message, ignore)
        kept.answer(message, ignore)
        assert kept.messages == fresh.messages


def test_turns_draw_different_tokens(model: Callable[..., TextModel]) -> None:
    class Uniform(NumpyDecoder):
        def prefill(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
            return np.zeros_like(super().prefill(ids, mask))

    conversation = chat(model(Uniform(6, capacity=200)), Sampling(1.0), limit=20)
    answers = [conversation.answer("red", ignore).rows[0].tokens for _ in range(2)]
    assert answers[0] != answers[1]


def test_reset_forgets_all_but_the_system_message(model: Callable[..., TextModel]) -> None:
    decoder = NumpyDecoder(6)
    conversation = chat(model(decoder), system="blue")
    conversation.answer("red", ignore)
    first = list(conversation.messages)
    conversation.answer("green", ignore)
    conversation.reset()
    assert decoder.length == 0
    conversation.answer("red", ignore)
    assert conversation.messages == first
    assert first[0] == {"role": "system", "content": "blue"}


def test_an_interrupt_ends_the_answer_only(model: Callable[..., TextModel]) -> None:
    decoder = ScriptedDecoder(6, [1, 2, 3, 4])
    conversation = chat(model(decoder))

    def interrupt(text: str) -> None:
        if "green" in text:
            raise KeyboardInterrupt

    generation = conversation.answer("red", interrupt)
    assert generation.rows[0].ended is Ended.INTERRUPTED
    assert conversation.messages[-1]["content"] == "red green"
    conversation.answer("blue", ignore)
    assert decoder.calls == [4, 1, 11, 1]  # all anew, since the caches were in an unknown state
    assert conversation.messages[-1]["content"] == "blue"


def test_a_message_that_does_not_fit_leaves_the_chat_as_it_was(model: Callable[..., TextModel]) -> None:
    decoder = NumpyDecoder(6, capacity=12)
    conversation = chat(model(decoder), limit=2)
    conversation.answer("red", ignore)
    before = list(conversation.messages)
    with pytest.raises(BismoothError, match="numpy: has room for 12 positions per row"):
        conversation.answer("red " * 20, ignore)
    assert conversation.messages == before
    conversation.answer("red", ignore)
    assert len(conversation.messages) == 4


def lines(*texts: str) -> Callable[[], str]:
    """What ``input`` would return, and then its end."""
    left = iter(texts)

    def read() -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


def test_the_loop_answers_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = ScriptedDecoder(6, [1, 4, 2, 4, 3, 4])
    run_on(decoder, monkeypatch)
    path = words_engine(tmp_path / "engine", files=STOP)
    pieces: list[str] = []
    converse(path, lines("red", "  ", "green", " /reset ", "blue"), pieces.append)
    assert "".join(pieces) == "red\ngreen\nblue\n"
    assert decoder.calls == [4, 1, 5, 1, 4, 1]
    assert decoder.is_closed


def test_the_loop_goes_on_behind_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_on(ScriptedDecoder(6, [1, 4, 2, 4], capacity=8), monkeypatch)
    path = words_engine(tmp_path / "engine", files=STOP)
    pieces: list[str] = []
    converse(path, lines("red", "red " * 20, "/reset", "red"), pieces.append)
    assert "".join(pieces) == "red\ngreen\n"
    assert re.search(r"error: numpy: has room for 8 positions .* /reset begins a new chat\.\n", capsys.readouterr().err)


def test_the_loop_needs_a_template_that_takes_the_system_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on(NumpyDecoder(6), monkeypatch)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    path = words_engine(tmp_path / "engine", template=refusing)
    with pytest.raises(BismoothError, match="the chat template cannot be rendered: no system"):
        converse(path, lines(), ignore, system="blue")
    with pytest.raises(BismoothError, match="has no chat template"):
        converse(words_engine(tmp_path / "other", template=None), lines(), ignore)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command with some bytes as stdin: exit status, stdout, stderr."""
    path = words_engine(tmp_path / "engine", files=STOP)

    def command(decoder: NumpyDecoder, stdin: bytes, *arguments: str) -> tuple[int, str, str]:
        run_on(decoder, monkeypatch)
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(stdin), "utf-8"))
        status = main(["generate", str(path), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def test_messages_come_from_stdin_line_by_line(run: Run) -> None:
    status, out, err = run(ScriptedDecoder(6, [1, 4, 2, 4]), b"red\ngreen\n", "--interactive")
    assert (status, out) == (0, "red\ngreen\n")
    assert err.count("prefill ") == 2


def test_a_prompt_comes_from_stdin(run: Run) -> None:
    status, out, _ = run(ScriptedDecoder(6, [1, 4]), b"red\ngreen\n", "--prompt", "-", "blue", "--json")
    assert status == 0
    assert '"prompt": "red\\ngreen",' in out
    assert '"prompt": "blue",' in out


@pytest.mark.parametrize("arguments", [["--prompt", "-"], ["--interactive"]])
def test_stdin_that_is_not_utf8(arguments: list[str], run: Run) -> None:
    status, out, err = run(NumpyDecoder(6), b"red \xff\n", *arguments)
    assert (status, out) == (2, "")
    assert re.search(r"error: stdin: is not UTF-8: 'utf-8' codec .* Convert it to UTF-8\.\n$", err)


def test_an_interrupt_between_answers_ends_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert run(NumpyDecoder(6), b"", "--interactive", "--quiet") == (130, "\n", "")


SLOW = """
import sys, time
from pathlib import Path
import pytest
from bismooth.tools.entry import main
from tests.chat_engine import run_on
from tests.numpy_decoder import ScriptedDecoder

class Slow(ScriptedDecoder):
    def decode(self, tokens):
        time.sleep(0.02)
        return super().decode(tokens)

with pytest.MonkeyPatch.context() as patch:
    run_on(Slow(6, [1], capacity=100_000), patch)
    sys.argv[1:] = ["generate", sys.argv[1], "--max-new-tokens", "100000", *sys.argv[2:]]
    sys.exit(main())
"""


def start(path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", SLOW, str(path), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_control_c_ends_a_text(tmp_path: Path, number: int) -> None:
    process = start(words_engine(tmp_path / "engine", files=STOP), "--prompt", "red")
    assert process.stdout is not None
    first = process.stdout.read(7)
    process.send_signal(number)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert re.fullmatch(rb"red( red)*\n", first + rest)
    assert re.search(rb"prefill .* decode .*; ended: interrupted\n$", err)


def test_control_c_ends_an_answer_and_then_the_chat(tmp_path: Path) -> None:
    process = start(words_engine(tmp_path / "engine", files=STOP), "--interactive")
    assert process.stdin is not None
    assert process.stdout is not None
    for _ in range(2):
        process.stdin.write(b"red\n")
        process.stdin.flush()
        assert process.stdout.read(3) == b"red"
        process.send_signal(signal.SIGINT)
        assert re.fullmatch(rb"( red)*\n", process.stdout.readline())
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read().count(b"; ended: interrupted\n") == 2
    process.stderr.close()


@pytest.mark.parametrize("answering", [True, False])
def test_sigterm_ends_the_chat(tmp_path: Path, answering: bool) -> None:
    """In an answer, and while it waits for a message."""
    process = start(words_engine(tmp_path / "engine", files=STOP), "--interactive")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"red\n")
    process.stdin.flush()
    assert process.stdout.read(3) == b"red"
    if not answering:
        process.send_signal(signal.SIGINT)
        assert re.fullmatch(rb"( red)*\n", process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert re.fullmatch(rb"( red)*\n\n" if answering else rb"\n", rest)
