"""From a conversation to token ids, and which of them are targets.

The targets are found by rendering: what the chat template adds when an answer is appended to the messages before it, is
the answer with its end-of-turn token. Unlike `return_assistant_tokens_mask` this needs no ``{% generation %}``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from ows_lightning.data.formats import Example, Message, split_prompt, untrained
from ows_lightning.data.rendering import ChatTemplate, merge_system_message
from ows_lightning.errors import UsageError
from ows_lightning.models.loss import IGNORE_INDEX

#: For tokenizers without a chat template, such as those of base models.
PLAIN_TEMPLATE = """\
{% for message in messages %}\
{{ '### ' + {'user': 'Instruction', 'assistant': 'Response'}.get(message['role'], message['role'] | capitalize) + ':\\n' }}\
{{ message['content'] + (eos_token if message['role'] == 'assistant' else '') + '\\n\\n' }}\
{% endfor %}\
{{ '### Response:\\n' if add_generation_prompt else '' }}"""

Span = tuple[int, int]
_ANSWERED: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]


@dataclass
class Encoded:
    """A training row: token ids; labels, -100 where there is no target, and always first; whether tokens were cut off."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def num_targets(self) -> int:
        """How many tokens are trained."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


@dataclass(frozen=True)
class Encoder:
    """Turns examples into training rows and into prompts for generation; `InstructionDataModule` says how they are cut."""

    tokenizer: PreTrainedTokenizerBase  # a fast one with a chat template, see `with_chat_template`
    max_seq_length: int = 1 << 20  # longest row in tokens
    train_on_prompt: bool = False  # every token is a target, not the answers alone
    last_turn_only: bool = False  # only the last answer of a conversation is a target

    def encode(self, example: Example, row_name: str) -> list[Encoded]:
        """Encodes an example: as no row when it has no target, one row, or several.

        Several when the template renders earlier answers differently from the last (Qwen3 drops their thinking) or does not
        end them: each such answer ends a row of its own, trained in the form in which the model has to give it.
        """
        if "text" in example:
            ids = [*self._text_ids(example["text"]), self.tokenizer.eos_token_id] if example["text"] else []
            kept = ids[: self.max_seq_length]
            rows = [Encoded(kept, [IGNORE_INDEX, *kept[1:]], truncated=len(kept) < len(ids))]
        else:
            messages, tools = self._relevant_messages(example), example.get("tools")
            shown = self._template.without_hidden_answers(messages, tools)
            try:
                rows = self._conversation(shown, tools, row_name)
            except UsageError:
                if shown == messages:
                    raise
                rows = []  # the template refuses the conversation without its calls
        return [row for row in rows if row.num_targets]

    def unshown_parts(self, example: Example) -> list[str]:
        """What the chat template leaves out of an example, in words."""
        template, tools = self._template, example.get("tools")
        return [] if "text" in example else template.unshown_parts(self._relevant_messages(example), tools)

    def encode_prompt(self, example: Example, row_name: str) -> tuple[str, list[int]]:
        """The rendered prompt of an example and its token ids; the start is cut when it is longer than `max_seq_length`."""
        if "text" in example:
            text, ids = example["text"], self._text_ids(example["text"])
        else:
            tools = example.get("tools")
            messages = self._template.normalize_messages(split_prompt(example["messages"])[0], tools)
            messages = self._template.without_hidden_answers(messages, tools)
            text = self._template.render(messages, tools, row_name, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise UsageError(f"{row_name}: the prompt is empty; leave the row out, or give it a text")
        return text, _cut_start(ids, len(ids), self.max_seq_length, self.tokenizer.bos_token_id)

    def _text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, with one BOS if the tokenizer adds any, and without an EOS at the end."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self.tokenizer(text.rstrip() if text.rstrip().endswith(self.tokenizer.eos_token) else text).input_ids
        ids = ids[1:] if ids[:2] == [bos, bos] else ids  # the text had it
        return ids[:-1] if ids[-1:] == [eos] else ids

    def _relevant_messages(self, example: Example) -> list[Message]:
        """The messages up to the last answer, with `train_on_prompt` all, in the form that the chat template wants."""
        messages = example["messages"]
        if not self.train_on_prompt:
            messages = messages[: 1 + max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)]
        return self._template.normalize_messages(messages, example.get("tools"))

    def _conversation(self, messages: list[Message], tools: Any, row_name: str) -> list[Encoded]:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns and not self.train_on_prompt:
            return []
        text = self._template.render(messages, tools, row_name)
        ends = "|".join(map(re.escape, sorted(self.end_tokens, key=len, reverse=True)))
        spans: list[Span] = []
        alone: list[int] = []
        for i in turns[-1:] if self.last_turn_only else turns:
            if i and _is_target(messages[i]):  # an assistant message at the start is no answer
                span = self._answer_span(text, messages, i, tools, row_name)
                if span is None:
                    alone.append(i)
                elif re.sub(ends, "", text[slice(*span)]).strip():  # not where the template leaves out tool calls
                    spans.append(span)
        if turns and turns[-1] == len(messages) - 1:
            if turns[-1] in alone and (merged := merge_system_message(messages)):
                # Mistral's templates show a system message only if a question comes last.
                return self._conversation(merged, tools, row_name)
            text, spans = self._with_end_tokens(text, spans)
        rows = [self._encode_text(text, spans)]
        if not self.train_on_prompt:
            if turns[-1] in alone:
                raise UsageError(f"{row_name}: the chat template renders the answer in a way that hides where it begins")
            for i in alone:
                rows += self._conversation([*untrained(messages[:i]), messages[i]], tools, row_name)
        return rows

    def _answer_span(self, text: str, messages: list[Message], i: int, tools: Any, row_name: str) -> Span | None:
        """Where message `i` and its end-of-turn token stand in `text`.

        None if the template renders it, or the text before it, differently here than at a conversation's end, or gives only
        the last answer an end token.
        """
        head = self._template.render(messages[:i], tools, row_name, add_generation_prompt=True)
        start = _common_prefix(head, text)
        if start < len(head):
            # The generation prompt may open something that the answer lacks (<think>), but the context must not change.
            # So the answer begins where the text changes with its content, or behind that.
            content = "." if (messages[i]["content"] or "").lstrip().startswith("!") else "!"
            other = [*messages[:i], {"role": "assistant", "content": content}]
            start = min(start, _common_prefix(self._template.render(other, tools, row_name), text))
            before = self._template.render(messages[:i], tools, row_name) if i else ""
            if start < len(self._without_eos(before)):
                return None
        if i == len(messages) - 1:
            return start, len(text)
        answer = self._template.render(messages[: i + 1], tools, row_name)
        if not text.startswith(answer):
            answer = self._without_eos(answer)  # some templates (Phi-3) end every conversation with one
        if not text.startswith(answer) or not answer.rstrip().endswith(self.end_tokens):
            return None
        return (start, len(answer)) if start < len(answer) else None

    def _with_end_tokens(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Leaves white space after the end-of-turn token out of the targets, and adds a token where the template has none."""
        trimmed = []
        for start, end in spans:
            stop = len(text[:end].rstrip())
            trimmed.append((start, stop if text[:stop].endswith(self.end_tokens) else end))
        if not text.rstrip().endswith(self.end_tokens):
            text += self.tokenizer.eos_token
            if trimmed and trimmed[-1][1] == len(text) - len(self.tokenizer.eos_token):
                trimmed[-1] = (trimmed[-1][0], len(text))
        return text, trimmed

    def _encode_text(self, text: str, spans: list[Span]) -> Encoded:
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.asarray(encoding.offset_mapping).reshape(-1, 2)
        is_answer = np.zeros(len(offsets), dtype=bool)
        for start, end in spans:  # a token that holds the last character of the prompt and the first of the answer is a target
            is_answer |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        ids = encoding.input_ids
        keep = self._kept_positions(ids, is_answer)
        target = np.ones_like(is_answer) if self.train_on_prompt else is_answer
        labels = [ids[k] if target[k] else IGNORE_INDEX for k in keep]
        return Encoded([ids[k] for k in keep], [IGNORE_INDEX, *labels[1:]], truncated=len(keep) < len(ids))

    def _kept_positions(self, ids: list[int], is_answer: np.ndarray) -> list[int]:
        """The positions to keep: the last answer and as much of the prompt before it as fits, at least a token."""
        positions = list(range(len(ids)))
        if len(ids) <= self.max_seq_length or not is_answer.any():
            return positions[: self.max_seq_length]
        end = int(is_answer.nonzero()[0][-1]) + 1
        begin = int((~is_answer[:end]).nonzero()[0].max(initial=-1)) + 1
        context = 1 + (ids[0] == self.tokenizer.bos_token_id and self.max_seq_length > 2)
        end = max(min(end, begin + self.max_seq_length - context), self.max_seq_length)
        return _cut_start(positions, end, self.max_seq_length, 0 if context == 2 else None)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @cached_property
    def end_tokens(self) -> tuple[str, ...]:
        """Tokens that may end an answer: the special ones, and any other added one that the template puts behind an answer."""
        behind = self._template.render(_ANSWERED, None, "the chat template").rpartition("!")[2]
        added = self.tokenizer.added_tokens_decoder.values()
        ends = (str(token) for token in added if token.special or (str(token).strip() and str(token) in behind))
        return (self.tokenizer.eos_token, *ends)

    def _without_eos(self, text: str) -> str:
        return text.rstrip().removesuffix(self.tokenizer.eos_token).rstrip()


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Checks that a tokenizer can be trained with, and gives it `PLAIN_TEMPLATE` when it has no chat template of its own.

    The template is set on the tokenizer itself, so that generation and the exported model use the one that was trained.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise UsageError(f"the tokenizer of '{name}' has no fast version, which is needed to find the answers' tokens")
    if tokenizer.eos_token is None:
        raise UsageError(f"the tokenizer of '{name}' has no end-of-sequence token; set its eos_token")
    if not tokenizer.chat_template:
        adds_bos = tokenizer.bos_token is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
        note = "rows are written as '### Instruction:' and '### Response:'."
        rank_zero_info(f"The tokenizer of '{name}' has no chat template: {note}")
    return tokenizer


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the tokenizer's chat template ends an answer: where generation has to stop."""
    encoder = Encoder(tokenizer)
    (row,) = encoder.encode({"messages": _ANSWERED}, row_name="the chat template")
    answer = [label for label in row.labels if label != IGNORE_INDEX]
    last_content = max((i for i, label in enumerate(answer) if "!" in tokenizer.decode([label])), default=-1)
    ends = {tokenizer.convert_tokens_to_ids(end) for end in encoder.end_tokens}
    # Phi-3's ends the turn, and then, after a line break, the conversation.
    return next((label for label in answer[last_content + 1 :] if label in ends), answer[-1])


def _is_target(message: Message) -> bool:
    """Whether an answer is to be trained: it is not empty, and its `weight` (a key of OpenAI's format) is not 0."""
    says_something = (message["content"] or "").strip() or message.get("tool_calls") or message.get("reasoning_content")
    return bool(says_something) and message.get("weight", 1) != 0


def _common_prefix(a: str, b: str) -> int:
    return len(a) if b.startswith(a) else next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))


def _cut_start(items: Sequence[int], end: int, length: int, first: int | None) -> list[int]:
    """The last `length` of ``items[:end]``; if the first item is `first`, it stays in front."""
    begin = max(end - length, 0)
    if begin and length > 2 and first is not None and items[0] == first:
        return [items[0], *items[begin + 1 : end]]
    return list(items[begin:end])
