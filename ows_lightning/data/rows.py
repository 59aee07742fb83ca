"""Tokenised rows and prompts by index, and how they become batches."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ows_lightning.data.encoding import Encoder
from ows_lightning.data.examples import column
from ows_lightning.data.formats import split_prompt
from ows_lightning.models.loss import IGNORE_INDEX

Item = dict[str, list[int]]


class Rows(Dataset[Item]):
    """Rows of token ids and labels, each made of the documents (see `token_features`) of these indices, several when packed.

    Index ``len(rows)`` gives a row without a target, which fills up the ranks' shares (see `RankSampler`).
    """

    def __init__(self, documents: Any, rows: Sequence[Sequence[int]], packed: bool = False) -> None:
        self.documents, self.rows, self.packed = documents, rows, packed
        lengths = column(documents, "length")
        self.lengths = [int(lengths[list(row)].sum()) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        documents = self.documents[list(self.rows[min(index, len(self) - 1)])]
        item = join_documents(list(zip(documents["input_ids"], documents["labels"], strict=True)), self.packed)
        if index == len(self):
            item["labels"] = [IGNORE_INDEX] * len(item["labels"])
        return item


def join_documents(documents: Sequence[tuple[list[int], list[int]]], packed: bool) -> Item:
    """Joins the token ids and labels of documents to a row; when packed, ``position_ids`` restart with every document."""
    item = {"input_ids": [x for ids, _ in documents for x in ids], "labels": [x for _, labels in documents for x in labels]}
    if packed:
        item["position_ids"] = [position for ids, _ in documents for position in range(len(ids))]
    return item


class PromptRows(Dataset[dict[str, Any]]):
    """Examples as prompts: ``input_ids``, the text as ``prompt``, the ``reference`` answer, ``answer``, ``choices``, ``row``.

    ``expected`` is what the model is trained to generate where that is not the reference itself: Qwen3's template puts an
    empty ``<think>`` before it. Index ``len`` gives a row without a reference (None), a filler (see `RankSampler`).
    """

    def __init__(self, table: Any, encoder: Encoder) -> None:
        self.table, self.encoder = table, encoder
        self._answer_encoder = Encoder(encoder.tokenizer, last_turn_only=True)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.table[min(index, len(self) - 1)]
        example = json.loads(entry["example"])
        prompt, input_ids = self.encoder.encode_prompt(example, entry["where"])
        reference = split_prompt(example.get("messages", []))[1] if index < len(self) else None
        trained = self._answer_encoder.encode(example, entry["where"]) if reference else []
        targets = [label for row in trained for label in row.labels if label != IGNORE_INDEX]
        answer = str(self.encoder.tokenizer.decode(targets, skip_special_tokens=True)).strip()
        expected = answer if reference and answer not in ("", reference.strip()) else None
        row = {"input_ids": input_ids, "prompt": prompt, "reference": reference, "expected": expected, "row": index}
        return row | {name: example.get(name) for name in ("answer", "choices")}


def collate(items: Sequence[Item], pad_token_id: int, flatten: bool = False) -> dict[str, Tensor]:
    """Pads rows on the right to the longest, or puts packed ones behind one another, where flash attention finds documents.

    Returns ``input_ids`` and ``labels``, and either ``attention_mask`` or, for packed rows, ``position_ids``; int64 (B, L).
    Each token of a packed row's padding is a document of its own, at position 0: see ``token_mask``.
    """
    packed = "position_ids" in items[0]
    if packed and flatten:
        return {name: torch.tensor([[x for item in items for x in item[name]]]) for name in items[0]}
    rows = [item if packed else {**item, "attention_mask": [1] * len(item["input_ids"])} for item in items]
    padding = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "position_ids" if packed else "attention_mask": 0}
    return {name: pad_sequence([torch.tensor(row[name]) for row in rows], True, value) for name, value in padding.items()}


def collate_prompts(items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Pads prompts on the left: ``input_ids`` and ``attention_mask``, int64 (B, L); ``row``, int64 (B,); lists of the rest."""
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
    ids = [torch.tensor(row) for row in batch["input_ids"]]
    batch["input_ids"] = pad_sequence(ids, True, pad_token_id, padding_side="left")
    batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], True, padding_side="left")
    batch["row"] = torch.tensor(batch["row"])
    return batch
