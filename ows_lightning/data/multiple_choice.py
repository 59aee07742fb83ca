"""Multiple choice: each row once with each of its choices as the answer, in the form in which answers are trained."""

import json
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, tensor
from torch.utils.data import Dataset

from ows_lightning.data.encoding import Encoder
from ows_lightning.data.formats import Example, index_of_choice, split_prompt
from ows_lightning.data.rows import collate
from ows_lightning.errors import UsageError

_ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)\s*$")  # the commonsense tasks of LLM-Adapters


class ChoiceRows(Dataset[list[dict[str, Any]]]):
    """One item for each example that has choices, with all of its choices, so that they are always in one batch.

    For each choice it has ``input_ids``, ``labels`` of the choice alone, ``row``, ``right`` and ``characters``. The item at
    index ``len`` is a filler row (see `RankSampler`): it repeats the last one, which changes no score.
    """

    def __init__(self, table: Any, encoder: Encoder) -> None:
        # Only the last turn: earlier answers of a conversation are not part of the choice.
        self.encoder = Encoder(encoder.tokenizer, encoder.max_seq_length, last_turn_only=True)
        self.rows: list[tuple[int, str, Example, list[str], int]] = []  # row, where, example, choices, the right one
        for row, entry in enumerate(table):
            example = json.loads(entry["example"])
            options, right = choices_of(example, entry["where"])
            if options:
                self.rows.append((row, entry["where"], example, options, right))
        self.max_choices = max((len(options) for _, _, _, options, _ in self.rows), default=1)  # choices of a row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        row, row_name, example, options, right = self.rows[min(index, len(self) - 1)]
        question = split_prompt(example["messages"])[0]
        items = []
        for i, text in enumerate(options):
            answered = {**example, "messages": [*question, {"role": "assistant", "content": text}]}
            encoded = self.encoder.encode(answered, row_name)
            if not encoded:
                raise UsageError(f"{row_name}: the choice {text!r} has no token; give choices that are not empty")
            facts = {"row": row, "right": i == right, "characters": len(text)}
            items.append({"input_ids": encoded[-1].input_ids, "labels": encoded[-1].labels, **facts})
        return items


def choices_of(example: Example, row_name: str) -> tuple[list[str], int]:
    """Returns an example's choices and the index of the right one; no choices for an example that is not multiple choice.

    Columns ``choices`` (texts) and ``answer`` (one of them, its index from 0, or its letter; by default the row's
    answer) say so, or a question that ends with ``Answer format: a/b/...`` and an ``answer`` of these. Others are refused.
    """
    question, reference = split_prompt(example.get("messages", []))
    options, answer = example.get("choices"), example.get("answer")
    answer = reference if answer is None and isinstance(options, list) and reference in options else answer
    if "messages" not in example or answer is None:
        return [], -1
    if options is not None:
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) for option in options):
            raise UsageError(f"{row_name}: 'choices' must be a list of two texts or more")
        return options, _index(answer, options, row_name)
    found = _ANSWER_FORMAT.search(question[-1]["content"] or "") if question else None
    if found is None:
        return [], -1
    options = found[1].split("/")
    right = _index(str(answer) if str(answer) in options else answer, options, row_name)
    places = [*re.finditer(rf"(?<!\w){re.escape(options[right])}(?!\w)", reference, re.IGNORECASE)]
    if not places:
        return options, right
    start, end = places[-1].span()
    return [f"{reference[:start]}{option}{reference[end:]}" for option in options], right


def _index(answer: Any, options: Sequence[str], row_name: str) -> int:
    if (index := index_of_choice(answer, options)) is None:
        raise UsageError(f"{row_name}: the answer {answer!r} is none of the choices {', '.join(options)}")
    return index


def collate_choices(rows: Sequence[list[dict[str, Any]]], pad_token_id: int) -> dict[str, Tensor]:
    """Pads the choices of all rows as `collate` does; adds ``row``, ``right`` and ``characters``, int64 (B,)."""
    items = [item for row in rows for item in row]
    facts = {name: tensor([int(item[name]) for item in items]) for name in ("row", "right", "characters")}
    return collate(items, pad_token_id) | facts
