"""Chat templates that want other forms of a message than the data has, and that show only a part of a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from ows_lightning.data import InstructionDataModule
from ows_lightning.data.encoding import Encoder
from ows_lightning.data.formats import to_example
from tests.data.samples import CHATML, tiny_tokenizer

# Each after a published template, cut to what matters here.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}{% for call in m['tool_calls'] %}"
    "{{ '<|Assistant|><|call|>' + call['type'] + '<|sep|>' + call['function']['name'] + '\n```json\n'"
    " + call['function']['arguments'] + '\n```<|end_call|>' }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is not none %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + eos_token }}{% endif %}"
    "{% if m['role'] == 'tool' %}{{ '<|tool|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}{% endfor %}"
)
PHI4 = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + (m['content'] or '') + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_ALONE = CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% for c in m['tool_calls'] %}{{ c['function'] }}{% endfor %}"
)
FIRST_CALL = QWEN.replace("in m.tool_calls %}", "in (m.tool_calls or [])[:1] %}")
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")

QUESTION = {"role": "user", "content": "how warm is it in Rome and in Oslo?"}
ANSWER = {"role": "assistant", "content": "21 and 3 degrees"}


def call(city: str) -> dict[str, Any]:
    return {"id": city, "type": "function", "function": {"name": "warmth", "arguments": json.dumps({"city": city})}}


CALLS = {"role": "assistant", "content": None, "tool_calls": [call("Rome")]}
TWO_CALLS = {**CALLS, "tool_calls": [call("Rome"), call("Oslo")]}
RESULT = {"role": "tool", "content": "21"}
TOOLS = [{"type": "function", "function": {"name": "warmth", "parameters": {}}}]


def encode(template: str, messages: list[dict[str, Any]], **row: Any) -> tuple[str, list[str], list[str]]:
    """The text of the last row, its trained parts, and what the template does not show."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, 2000)
    example = to_example({"messages": messages, **row}, "messages", "row 1")
    rows = encoder.encode(example, "row 1")
    if not rows:
        return "", [], encoder.unshown_parts(example)
    parts = [""]
    for label in rows[0].labels:
        if label == -100:
            parts.append("")
        else:
            parts[-1] += tokenizer.decode(label)
    return tokenizer.decode(rows[0].input_ids), [part for part in parts if part], encoder.unshown_parts(example)


@pytest.mark.parametrize("arguments", [json.dumps({"city": "Rome"}), {"city": "Rome"}])
@pytest.mark.parametrize("template", [R1, QWEN])
def test_a_call_is_written_as_the_template_wants_it(template: str, arguments: Any) -> None:
    calls = {**CALLS, "tool_calls": [{**call("Rome"), "function": {"name": "warmth", "arguments": arguments}}]}
    text, trained, unshown = encode(template, [QUESTION, calls, RESULT, ANSWER])
    assert len(trained) == 2
    assert '{"city": "Rome"}' in trained[0]
    assert "None" not in text
    assert unshown == []


def test_the_old_spelling_of_a_call() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "warmth", "arguments": '{"city": "Rome"}'}}
    _, (first, _), unshown = encode(QWEN, [QUESTION, old, RESULT, ANSWER])
    assert '{"name": "warmth", "arguments": {"city": "Rome"}}' in first
    assert unshown == []


@pytest.mark.parametrize("template", [ZEPHYR, PHI4, CHATML.replace("m['content'] }}", "m['content'] or '' }}")])
@pytest.mark.parametrize("content", [None, ""])
def test_no_empty_turn_stands_where_a_call_is_not_shown(template: str, content: str | None) -> None:
    messages = [QUESTION, {**CALLS, "content": content}, RESULT, ANSWER]
    text, trained, unshown = encode(template, messages)
    assert text.count("assistant") == 1
    assert len(trained) == 1
    assert "21 and 3 degrees" in trained[0]
    assert unshown == ["tool calls"] + ["a tool's result"] * (template in (ZEPHYR, PHI4))
    assert encode(template, messages[:2]) == ("", [], ["tool calls"])


@pytest.mark.parametrize(
    ("template", "messages", "row", "unshown"),
    [
        (FIRST_CALL, [QUESTION, TWO_CALLS, RESULT, RESULT, ANSWER], {}, ["tool calls"]),
        (QWEN, [QUESTION, TWO_CALLS, RESULT, RESULT, ANSWER], {"tools": TOOLS}, []),
        (TEXT_ALONE, [QUESTION, {**TWO_CALLS, "content": ""}, RESULT, ANSWER], {}, []),
        (CHATML, [QUESTION, ANSWER], {"tools": TOOLS}, ["the functions of 'tools'"]),
        (NO_SYSTEM, [{"role": "system", "content": "be brief"}, QUESTION, ANSWER], {}, ["a system message"]),
        (CHATML, [{"role": "system", "content": "be brief"}, QUESTION, ANSWER], {}, []),
        (CHATML, [QUESTION, {**ANSWER, "reasoning_content": "hm"}], {}, ["reasoning"]),
        (CHATML, [QUESTION, {**ANSWER, "reasoning": "hm"}], {}, ["reasoning"]),
        (CHATML, [QUESTION, {**ANSWER, "thinking": "hm"}], {}, ["reasoning"]),
        (
            CHATML.replace("m['content']", "m['thinking'] or '' }}{{ m['content']"),
            [QUESTION, {**ANSWER, "thinking": "hm"}],
            {},
            [],
        ),
        (R1, [QUESTION, {**ANSWER, "content": "<think>hm</think>warm"}], {}, ["a part of an answer"]),
        (CHATML, [QUESTION, {**ANSWER, "content": "<think>hm</think>warm"}], {}, []),
        (CHATML, [QUESTION, ANSWER, QUESTION], {}, []),
    ],
)
def test_what_a_template_leaves_out(template: str, messages: list[Any], row: dict[str, Any], unshown: list[str]) -> None:
    assert encode(template, messages, **row)[2] == unshown


def test_rows_that_lose_something_are_counted_and_named(jsonl: Callable[..., str], recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ZEPHYR
    rows = [[QUESTION, CALLS, RESULT, ANSWER], [QUESTION, ANSWER], [QUESTION, CALLS]]
    file = jsonl([{"messages": messages} for messages in rows])
    for streaming in (False, True):
        recwarn.clear()
        data = InstructionDataModule(file, val_size=0, tokenizer=tokenizer, streaming=streaming)
        data.prepare_data()
        data.setup()
        data.sample_row()
        said = "\n".join(str(warning.message) for warning in recwarn)
        assert "rows lose tool calls, which the chat template does not show: rows.jsonl line 1, rows.jsonl line 3" in said
        assert "1 of 3 rows lose a tool's result" in said or streaming
        assert "left out: rows.jsonl line 3" in said


def test_prompts_that_lose_something_are_counted_and_named(
    jsonl: Callable[..., str], recwarn: pytest.WarningsRecorder
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ZEPHYR
    asked = [[QUESTION, CALLS, RESULT], [QUESTION, ANSWER], [QUESTION, CALLS]]  # the last one's calls are its answer
    file = jsonl([{"messages": messages} for messages in asked])
    list(InstructionDataModule(file, test_dataset=file, tokenizer=tokenizer).predict_dataloader())
    said = [str(warning.message) for warning in recwarn if "does not show" in str(warning.message)]
    lost = "which the chat template does not show: rows.jsonl line 1"
    assert said == [f"data.test_dataset: 1 of 3 rows lose {what}, {lost}" for what in ("tool calls", "a tool's result")]


def test_reasoning_without_an_answer_is_trained() -> None:
    thinks = CHATML.replace("{{ m['content'] }}", "<think>{{ m['reasoning_content'] }}</think>{{ m['content'] or '' }}")
    assert encode(thinks, [QUESTION, {"role": "assistant", "reasoning_content": "hm"}])[1] == ["<think>hm</think><|im_end|>"]


@pytest.mark.parametrize(("weight", "answers"), [("0", 1), (0.0, 1), (False, 1), ("1", 2), (1, 2)])
def test_a_weight_may_be_text(weight: Any, answers: int) -> None:
    assert len(encode(CHATML, [QUESTION, {**ANSWER, "weight": weight}, QUESTION, ANSWER])[1]) == answers
