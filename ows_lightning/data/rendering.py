"""A conversation as a chat template writes it: in the form that the template wants, and with what it leaves out.

Templates want a missing content as None (DeepSeek-R1) or as "", and a call's arguments as an object or as text. Many show only
a part of a conversation. To learn what is shown, a marker is put into each part, and the conversation rendered.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jinja2
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ows_lightning.data.formats import Message
from ows_lightning.errors import UsageError

#: For tokenizers without a chat template, such as those of base models.
PLAIN_TEMPLATE = """\
{% for message in messages %}\
{{ '### ' + {'user': 'Instruction', 'assistant': 'Response'}.get(message['role'], message['role'] | capitalize) + ':\\n' }}\
{{ message['content'] + (eos_token if message['role'] == 'assistant' else '') + '\\n\\n' }}\
{% endfor %}\
{{ '### Response:\\n' if add_generation_prompt else '' }}"""
EXCHANGE: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]  # easy to find in any text
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_THINKING = re.compile(r"(</?think>)")
_PROBE = "qz{}zq"  # letters and digits, which no template escapes
_ROLES = {"system": "a system message", "user": "a question", "assistant": "a part of an answer", "tool": "a tool's result"}


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Checks that a tokenizer can be trained with, and gives it `PLAIN_TEMPLATE` when it has no chat template of its own.

    The template is set on the tokenizer itself, so that generation and the exported model use the one that was trained.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise UsageError(f"the tokenizer of '{name}' has no fast version, which is needed to find the answers' tokens")
    if tokenizer.eos_token is None:
        raise UsageError(f"the tokenizer of '{name}' has no end-of-sequence token; set its eos_token")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise UsageError(f"the tokenizer of '{name}' has chat templates by name, none of them 'default'; save one as that")
    if not tokenizer.chat_template:
        adds_bos = tokenizer.bos_token is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
        note = "rows are written as '### Instruction:' and '### Response:'."
        rank_zero_info(f"The tokenizer of '{name}' has no chat template: {note}")
    return tokenizer


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def end_tokens(self) -> tuple[str, ...]:
        """Tokens that may end an answer: the special ones, and any other added one that the template puts behind an answer."""
        behind = self.render(EXCHANGE, None, "the chat template").rpartition("!")[2]
        added = self.tokenizer.added_tokens_decoder.values()
        ends = (str(token) for token in added if token.special or (str(token).strip() and str(token) in behind))
        return (self.tokenizer.eos_token, *ends)

    def without_eos(self, text: str) -> str:
        """A text without an EOS at its end, and without white space there."""
        return text.rstrip().removesuffix(self.tokenizer.eos_token).rstrip()

    def render(self, messages: list[Message], tools: Any, row_name: str, add_generation_prompt: bool = False) -> str:
        """The conversation as text; a system message that the template refuses joins the first question."""
        try:
            return self._apply(messages, tools, add_generation_prompt)
        except _TEMPLATE_ERRORS as error:
            if merged := merge_system_message(messages):  # Gemma and old Mistral have no system message
                return self.render(merged, tools, row_name, add_generation_prompt)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"{row_name}: the tokenizer's chat template refuses the messages: {reason}") from None

    def normalize_messages(self, messages: list[Message], tools: Any) -> list[Message]:
        """The messages with contents of None or "", and arguments as objects or text, as the template shows most of them."""
        forms = [_in_form(messages, content, arguments) for arguments in (_as_object, _as_text) for content in (None, "")]
        forms = [form for i, form in enumerate(forms) if form not in forms[:i]]
        return min(forms, key=lambda form: self._faults(form, tools)) if len(forms) > 1 else messages

    def without_hidden_answers(self, messages: list[Message], tools: Any) -> list[Message]:
        """The messages without the answers that the template does not show, such as tool calls in a template without them."""
        kept: list[Message] = []
        for message in messages:
            plain = (message["content"] or "").strip() or not (message.get("tool_calls") or message.get("reasoning_content"))
            text = None if plain else self._try_render([*kept, message], tools)
            if text is None or text != self._try_render([*kept, {"role": "assistant", "content": ""}], tools):
                kept.append(message)
        return kept

    def unshown_parts(self, messages: list[Message], tools: Any) -> list[str]:
        """What the template leaves out, in words, each once; reasoning counts as shown if it is while its answer is last."""
        probed = _Probed(messages, tools)
        if not probed.places or (text := self._try_render(probed.messages, probed.tools)) is None:
            return []
        missing = {probe: place for probe, place in probed.places.items() if probe not in text}
        for i in sorted({place[0] for place in missing.values()}):
            questions = (k for k in reversed(range(len(messages))) if messages[k]["role"] == "user")
            last = i if i >= 0 and messages[i]["role"] == "assistant" else next(questions, len(messages) - 1)
            until = self._try_render(probed.messages[: last + 1], probed.tools) or ""
            missing = {probe: place for probe, place in missing.items() if place[0] != i or probe not in until}
        return list(dict.fromkeys(what for _, what in missing.values()))

    def _apply(self, messages: list[Message], tools: Any, add_generation_prompt: bool) -> str:
        if all(message["content"] is not None for message in messages):
            options: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
            return str(self.tokenizer.apply_chat_template(messages, **options))
        # apply_chat_template hides a content of None, which R1's template tests for.
        names: dict[str, Any] = {**self.tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt}
        template = self.tokenizer.get_chat_template(tools=tools)
        rendered: Any = render_jinja_template(conversations=[messages], tools=tools, chat_template=template, **names)
        return str(rendered[0][0])

    def _faults(self, messages: list[Message], tools: Any) -> int:
        """Faults in the rendering of this form: the number of parts of calls that are left out or wrongly written."""
        probed = _Probed(messages, tools)
        if (text := self._try_render(probed.messages, probed.tools)) is None:
            return 10_000
        # Python's repr, or JSON twice
        quoted_wrongly = (f"'{probe}'" in text or f'\\"{probe}' in text for probe in probed.places)
        printed_none = False
        if any(message["content"] is None for message in messages):
            without = self._try_render(_in_form(probed.messages, "", lambda arguments: arguments), probed.tools)
            printed_none = without is not None and text.count("None") > without.count("None")
        return sum(probe not in text for probe in probed.places) + sum(quoted_wrongly) + printed_none

    def _try_render(self, messages: list[Message], tools: Any) -> str | None:
        try:
            return self.render(messages, tools, "")
        except UsageError:
            return None


def merge_system_message(messages: list[Message]) -> list[Message] | None:
    """The messages with the system message at the head of the first user message; None if one of them is missing."""
    if len(messages) < 2 or [message["role"] for message in messages[:2]] != ["system", "user"]:
        return None
    return [{**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]


def _in_form(messages: list[Message], content: str | None, arguments: Callable[[Any], Any]) -> list[Message]:
    """The messages with this content in place of None, and with calls' arguments passed through a function."""
    return [{**m, "content": content if m["content"] is None else m["content"], **_with_calls(m, arguments)} for m in messages]


def _with_calls(message: Message, arguments: Callable[[Any], Any], name: Callable[[Any], Any] | None = None) -> Message:
    """The key ``tool_calls`` of a message with other arguments, and names; empty where it has none."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call.get("function", call))
        if "arguments" in function:
            function["arguments"] = arguments(function["arguments"])
        if name is not None and "name" in function:
            function["name"] = name(function["name"])
        calls.append({**call, "function": function} if "function" in call else function)
    return {"tool_calls": calls} if calls else {}


def _as_object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


class _Probed:
    """A conversation with a probe in each of its parts.

    ``places`` has for each probe the index of its message (-1: the `tools`), and what part it is of, in words.
    """

    def __init__(self, messages: list[Message], tools: Any) -> None:
        self.places: dict[str, tuple[int, str]] = {}
        self.messages = [self._message(i, message) for i, message in enumerate(messages)]
        self.tools = [self._tool(tool) for tool in tools] if tools else tools

    def _message(self, index: int, message: Message) -> Message:
        what = _ROLES.get(message["role"], f"a message of the role {message['role']}")
        name = partial(self._insert_probe, index, "tool calls")
        probed = {**message, **_with_calls(message, partial(self._arguments, index), name)}
        if isinstance(content := message["content"], str):
            probed["content"] = "".join(self._insert_probe(index, what, piece) for piece in _THINKING.split(content))
        for key in message.keys() & {"reasoning_content", "reasoning", "thinking"}:  # what templates and data call it
            probed[key] = self._insert_probe(index, "reasoning", message[key])
        return probed

    def _insert_probe(self, index: int, what: str, text: Any) -> Any:
        """The text with a probe in its middle, since templates may look at its beginning and end."""
        if not isinstance(text, str) or not text.strip() or _THINKING.fullmatch(text):
            return text
        middle = len(text) - len(text.lstrip()) + (len(text.strip()) + 1) // 2
        return text[:middle] + self._new_probe(index, what) + text[middle:]

    def _arguments(self, index: int, arguments: Any) -> Any:
        """The object with a probe added as a key and as its value."""
        if not isinstance(as_object := _as_object(arguments), dict):
            return arguments
        probe = self._new_probe(index, "tool calls")
        as_object = {**as_object, probe: probe}
        return _as_text(as_object) if isinstance(arguments, str) else as_object

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        if isinstance(tool.get("function"), dict):
            return {**tool, "function": self._tool(tool["function"])}
        return {**tool, "name": self._insert_probe(-1, "the functions of 'tools'", tool["name"])} if "name" in tool else tool

    def _new_probe(self, index: int, what: str) -> str:
        probe = _PROBE.format(len(self.places))
        self.places[probe] = (index, what)
        return probe
