from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler

from ows_lightning.data.loaders import ShardedSampler, collate, collate_prompts

LENGTHS = torch.randint(1, 100, (23,), generator=torch.Generator().manual_seed(0)).tolist()


def batches(sampler: ShardedSampler, size: int) -> list[list[int]]:
    return list(BatchSampler(sampler, size, drop_last=False))


@pytest.mark.parametrize("group_size", [None, 8])
def test_ranks_share_the_batches_of_one_process(group_size: int | None) -> None:
    whole = batches(ShardedSampler(LENGTHS, seed=3, group_size=group_size), 8)
    ranks = [batches(ShardedSampler(LENGTHS, rank, 2, seed=3, group_size=group_size), 4) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(whole)
    for batch, *parts in zip(whole, *ranks, strict=True):
        without_filling = [i for part in parts for i in part if i < len(LENGTHS)]
        assert sorted(without_filling) == sorted(batch)


def test_ranks_are_filled_up_with_the_row_without_targets() -> None:
    assert [i for rank in range(2) for i in ShardedSampler(LENGTHS, rank, 2, shuffle=False)].count(len(LENGTHS)) == 1


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ShardedSampler(LENGTHS, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


def test_batches_grouped_by_length_have_less_padding() -> None:
    def padding(group_size: int | None) -> int:
        lengths = torch.randint(1, 500, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
        rows = batches(ShardedSampler(lengths, group_size=group_size), 8)
        assert sorted(i for row in rows for i in row) == list(range(1000))
        return sum(max(lengths[i] for i in row) - lengths[j] for row in rows for j in row)

    assert padding(8) < 0.1 * padding(None)


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
