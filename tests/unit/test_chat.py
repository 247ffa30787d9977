"""Chat templates: the text is that of transformers, and what is wrong with one is said."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bismooth.engines.chat import ChatTemplate, Message, read_json
from bismooth.export.errors import BismoothError
from tests import toy_tokenizers as toy

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA_2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{%- set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/…') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system is defined %}
            {{- '[INST] <<SYS>>' + system + '<</SYS>>' + message['content'] | trim + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

LINES = """{# blocks on lines of their own leave no whitespace #}
{% set seen = namespace(count=0, tags=dict(a=1)) %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% set seen.count = seen.count + 1 %}
    {% if message.role == 'assistant' %}
    {% generation %}
{{ message.content }}{{ eos_token }}
    {% endgeneration %}
    {% else %}
{{ seen.count }}: {{ message.content }}
    {% endif %}
    {% if seen.count > 2 %}
        {% break %}
    {% endif %}
{% endfor %}
{% if tools is not none or documents is not none %}never{% endif %}
{{ unk_token is defined }} {{ pad_token }} {{ seen.tags.a }} {{ range(2) | list }}
"""

JSON = """{{ messages | tojson }}
{{ messages[0] | tojson(indent=2) }}{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}
{{- {'é': '<&>'} | tojson(ensure_ascii=true) }}{{ strftime_now('%Y') }}"""

TURNS: list[Message] = [
    {"role": "user", "content": " What is 1 < 2 & 'é'? "},
    {"role": "assistant", "content": "True.\n"},
    {"role": "user", "content": "{{ why }}"},
]
SYSTEM: Message = {"role": "system", "content": "Be brief"}


def save(folder: Path, template: object, **tokens: object) -> ChatTemplate:
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": toy.END, "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | tokens), "utf-8")
    loaded = ChatTemplate.load(folder)
    assert loaded is not None
    return loaded


@pytest.mark.parametrize("messages", [TURNS, [SYSTEM, *TURNS], TURNS[:2]], ids=["turns", "system", "answered"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [CHATML, LLAMA_2, LINES, JSON], ids=["chatml", "llama-2", "lines", "json"])
def test_the_text_is_that_of_transformers(
    template: str, prompt: bool, messages: Sequence[Message], tmp_path: Path
) -> None:
    transformers: Any = pytest.importorskip("transformers")
    tokens = {"bos_token": "<s>", "eos_token": toy.END, "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=toy.byte_level(), chat_template=template, **tokens
    )
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert save(tmp_path, template, **tokens).render(messages, add_generation_prompt=prompt) == expected
    tokenizer.save_pretrained(tmp_path)  # in the layout of this version
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None
    assert loaded.render(messages, add_generation_prompt=prompt) == expected


def test_the_file_comes_before_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}file", "utf-8")
    assert save(tmp_path, "configuration").render(TURNS) == f"<s>{toy.END}file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}"}]
    assert save(tmp_path, named).render(TURNS) == "<s>"


def test_a_model_may_have_no_template(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}", "utf-8")
    assert ChatTemplate.load(tmp_path) is None


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ([{"name": "tool_use", "template": "t"}], "KeyError('default')"),
        ([{"template": "t"}], "KeyError('name')"),
        (["t"], "TypeError("),
        (7, "TypeError("),
    ],
)
def test_templates_of_which_none_is_the_default(template: object, reason: str, tmp_path: Path) -> None:
    message = f"tokenizer_config.json: has no chat template that is called 'default': {reason}"
    with pytest.raises(BismoothError, match=re.escape(message)):
        save(tmp_path, template)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% for %}", "Expected an expression, got 'end of statement block'"),
        ("{{ messages[0].a.b }}", "'dict object' has no attribute 'a'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_fails_is_named(template: str, reason: str, tmp_path: Path) -> None:
    chat = save(tmp_path, template)
    message = f"{tmp_path / 'tokenizer_config.json'}: the chat template cannot be rendered: {reason}"
    with pytest.raises(BismoothError, match=re.escape(message)):
        chat.render(TURNS)


def test_without_jinja2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = save(tmp_path, CHATML)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    message = r"jinja2: cannot be imported \(.*\), and chat templates need it\. Run: pip install 'jinja2>=3\.1\.6', or"
    with pytest.raises(BismoothError, match=message):
        chat.render(TURNS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json: not a JSON file: Expecting property name"),
        (b"[" * 100_000, "config.json: not a JSON file: maximum recursion depth exceeded"),
        (b"[]", "config.json: expected a JSON object, got list. Put the model's own file there."),
        (b"\xff", "config.json: not UTF-8: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_files_that_are_no_json_objects(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(BismoothError, match=re.escape(message)):
        read_json(path)


def test_a_missing_file_is_an_empty_object(tmp_path: Path) -> None:
    assert read_json(tmp_path / "config.json") == {}
