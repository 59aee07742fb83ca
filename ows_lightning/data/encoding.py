"""From an example to token ids: training rows, in which the answers' tokens are the targets, and prompts for generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ows_lightning.data.formats import Example, Message, split_prompt, untrained
from ows_lightning.data.masking import Span, end_answers, find_answers
from ows_lightning.data.rendering import EXCHANGE, ChatTemplate, merge_system_message
from ows_lightning.errors import UsageError
from ows_lightning.models.loss import IGNORE_INDEX


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
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if not ids:
            raise UsageError(f"{row_name}: the prompt is empty; leave the row out, or give it a text")
        return text, _cut_start(ids, len(ids), self.max_seq_length, self.tokenizer.bos_token_id)

    def _text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, with one BOS if the tokenizer adds any, and without an EOS at the end."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        text = text.rstrip() if text.rstrip().endswith(self.tokenizer.eos_token) else text
        ids = self.tokenizer(text, verbose=False).input_ids
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
        wanted = turns[-1:] if self.last_turn_only else turns
        spans, rewritten = find_answers(self._template, text, messages, wanted, tools, row_name)
        if turns and turns[-1] == len(messages) - 1:
            if turns[-1] in rewritten and (merged := merge_system_message(messages)):
                # Mistral's templates show a system message only if a question comes last.
                return self._conversation(merged, tools, row_name)
            text, spans = end_answers(self._template, text, spans)
        rows = [self._encode_text(text, spans)]
        if not self.train_on_prompt:
            if turns[-1] in rewritten:
                raise UsageError(f"{row_name}: the chat template renders the answer in a way that hides where it begins")
            for i in rewritten:
                rows += self._conversation([*untrained(messages[:i]), messages[i]], tools, row_name)
        return rows

    def _encode_text(self, text: str, spans: list[Span]) -> Encoded:
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)  # it is cut next
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


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the tokenizer's chat template ends an answer: where generation has to stop."""
    (row,) = Encoder(tokenizer).encode({"messages": EXCHANGE}, row_name="the chat template")
    answer = [label for label in row.labels if label != IGNORE_INDEX]
    last_content = max((i for i, label in enumerate(answer) if "!" in tokenizer.decode([label])), default=-1)
    ends = {tokenizer.convert_tokens_to_ids(end) for end in ChatTemplate(tokenizer).end_tokens}
    # Phi-3's ends the turn, and then, after a line break, the conversation.
    return next((label for label in answer[last_content + 1 :] if label in ends), answer[-1])


def _cut_start(items: Sequence[int], end: int, length: int, first: int | None) -> list[int]:
    """The last `length` of ``items[:end]``; if the first item is `first`, it stays in front."""
    begin = max(end - length, 0)
    if begin and length > 2 and first is not None and items[0] == first:
        return [items[0], *items[begin + 1 : end]]
    return list(items[begin:end])
