from __future__ import annotations

import torch

from ows_lightning.data.rows import collate, collate_prompts


def test_collate_pads_on_the_right_without_targets() -> None:
    items = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    batch = collate(items, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_prompts_are_padded_on_the_left() -> None:
    items = [{"input_ids": [5, 6, 7], "row": 0, "reference": "a"}, {"input_ids": [8], "row": 1, "reference": "b"}]
    batch = collate_prompts(items, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["reference"] == ["a", "b"]
    assert batch["row"].tolist() == [0, 1]
