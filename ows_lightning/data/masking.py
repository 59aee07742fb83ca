"""Which characters of a rendered conversation are trained: those of its answers, each with the token that ends it.

An answer is found by rendering: it is what the chat template adds when the answer is appended to the messages before it.
Unlike `return_assistant_tokens_mask` this needs no ``{% generation %}`` in the template.
"""

import re
from collections.abc import Iterable
from typing import Any

from ows_lightning.data.formats import Message
from ows_lightning.data.rendering import ChatTemplate

Span = tuple[int, int]  # the first character, and the one behind the last


def find_answers(
    template: ChatTemplate, text: str, messages: list[Message], turns: Iterable[int], tools: Any, row_name: str
) -> tuple[list[Span], list[int]]:
    """Returns where the answers among the messages ``turns`` stand in the text, and which of them are rewritten there.

    A rewritten answer has another form at a conversation's end, in which the model has to give it.
    """
    ends = "|".join(map(re.escape, sorted(template.end_tokens, key=len, reverse=True)))
    spans, rewritten = [], []
    for i in turns:
        if i and _is_target(messages[i]):  # an assistant message at the start is no answer
            span = _answer_span(template, text, messages, i, tools, row_name)
            if span is None:
                rewritten.append(i)
            elif re.sub(ends, "", text[slice(*span)]).strip():  # not where the template leaves out tool calls
                spans.append(span)
    return spans, rewritten


def _answer_span(template: ChatTemplate, text: str, messages: list[Message], i: int, tools: Any, row_name: str) -> Span | None:
    """Where message `i` and its end-of-turn token stand in `text`.

    None if the template renders it, or the text before it, differently here than at a conversation's end, or gives only
    the last answer an end token.
    """
    head = template.render(messages[:i], tools, row_name, add_generation_prompt=True)
    start = _common_prefix_length(head, text)
    if start < len(head):
        # The generation prompt may open something that the answer lacks (<think>), but the context must not change.
        # So the answer begins where the text changes with its content, or behind that.
        content = "." if (messages[i]["content"] or "").lstrip().startswith("!") else "!"
        other = [*messages[:i], {"role": "assistant", "content": content}]
        start = min(start, _common_prefix_length(template.render(other, tools, row_name), text))
        before = template.render(messages[:i], tools, row_name) if i else ""
        if start < len(template.without_eos(before)):
            return None
    if i == len(messages) - 1:
        return start, len(text)
    answer = template.render(messages[: i + 1], tools, row_name)
    if not text.startswith(answer):
        answer = template.without_eos(answer)  # some templates (Phi-3) end every conversation with one
    if not text.startswith(answer) or not answer.rstrip().endswith(template.end_tokens):
        return None
    return (start, len(answer)) if start < len(answer) else None


def end_answers(template: ChatTemplate, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
    """Leaves white space after the end-of-turn tokens out of the spans, and adds a token where the text ends without one."""
    trimmed = []
    for start, end in spans:
        stop = len(text[:end].rstrip())
        trimmed.append((start, stop if text[:stop].endswith(template.end_tokens) else end))
    if text.rstrip().endswith(template.end_tokens):
        return text, trimmed
    ended = text + template.tokenizer.eos_token
    if trimmed and trimmed[-1][1] == len(text):
        trimmed[-1] = (trimmed[-1][0], len(ended))
    return ended, trimmed


def _is_target(message: Message) -> bool:
    """Whether an answer is to be trained: it is not empty, and its `weight` (a key of OpenAI's format) is not 0."""
    says_something = (message["content"] or "").strip() or message.get("tool_calls") or message.get("reasoning_content")
    return bool(says_something) and message.get("weight", 1) != 0


def _common_prefix_length(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
