from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler

from ows_lightning.data.loaders import RankSampler, ResumableLoader

LENGTHS = torch.randint(1, 100, (23,), generator=torch.Generator().manual_seed(0)).tolist()


def batches(sampler: RankSampler, size: int) -> list[list[int]]:
    return list(BatchSampler(sampler, size, drop_last=False))


@pytest.mark.parametrize("group_size", [None, 8])
def test_ranks_share_the_batches_of_one_process(group_size: int | None) -> None:
    whole = batches(RankSampler(LENGTHS, seed=3, group_size=group_size), 8)
    ranks = [batches(RankSampler(LENGTHS, rank, 2, seed=3, group_size=group_size), 4) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(whole)
    for batch, *parts in zip(whole, *ranks, strict=True):
        without_filling = [i for part in parts for i in part if i < len(LENGTHS)]
        assert sorted(without_filling) == sorted(batch)


def test_ranks_are_filled_up_with_the_row_without_targets() -> None:
    assert [i for rank in range(2) for i in RankSampler(LENGTHS, rank, 2, shuffle=False)].count(len(LENGTHS)) == 1


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = RankSampler(LENGTHS, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


def test_batches_grouped_by_length_have_less_padding() -> None:
    def padding(group_size: int | None) -> int:
        lengths = torch.randint(1, 500, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
        rows = batches(RankSampler(lengths, group_size=group_size), 8)
        assert sorted(i for row in rows for i in row) == list(range(1000))
        return sum(max(lengths[i] for i in row) - lengths[j] for row in rows for j in row)

    assert padding(8) < 0.1 * padding(None)


def test_rows_that_are_seen_again_by_another_number_of_processes_are_said() -> None:
    one = ResumableLoader(LENGTHS, batch_size=2, sampler=RankSampler(LENGTHS))
    one.load_state_dict({"epoch": 0, "rows": 8, "order": {}})
    left = list(RankSampler(LENGTHS))[8:]
    assert [int(row) for batch in one for row in batch] == [LENGTHS[i] for i in left]
    third = ResumableLoader(LENGTHS, batch_size=2, sampler=RankSampler(LENGTHS, 0, 3))
    with pytest.warns(UserWarning, match="2 rows of this epoch are seen again: 8 are no multiple of 3 processes"):
        third.load_state_dict({"epoch": 0, "rows": 8, "order": {}})
    assert third.state_dict()["rows"] == 6


def test_a_loader_whose_sampler_was_replaced_goes_on_behind_the_rows_that_were_seen() -> None:
    """As ``overfit_batches`` replaces it."""
    loader = ResumableLoader(LENGTHS, batch_size=2)
    loader.load_state_dict({"epoch": 0, "rows": 4, "order": {}})
    assert [int(row) for batch in loader for row in batch] == LENGTHS[4:]
