"""Which rows the scores are measured on, and that reading them leaves the run's own alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, IterableDataset

from ows_lightning.errors import UsageError
from ows_lightning.sampling.calibration import calibration_batches


def test_calibration_rows_follow_the_seed() -> None:
    rows = DataLoader([{"input_ids": torch.tensor([i])} for i in range(100)], batch_size=4)

    def chosen(seed: int) -> list[int]:
        return [int(i) for batch in calibration_batches(rows, 8, seed) for i in batch["input_ids"]]

    assert chosen(0) == chosen(0)
    assert len({*chosen(0)}) == 8
    assert {*chosen(0)} not in ({*chosen(1)}, {*range(8)})


@pytest.mark.parametrize(("samples", "sizes", "of_stream"), [(6, [4, 2], [4, 4]), (2, [2], [2]), (200, [4] * 25, [4, 4])])
def test_calibration_has_as_many_rows_as_there_are(samples: int, sizes: list[int], of_stream: list[int]) -> None:
    rows, before = [{"input_ids": torch.tensor([i])} for i in range(100)], torch.get_rng_state()
    for dataset, expected in ((rows, sizes), (Numbers(), of_stream)):
        loader: DataLoader = DataLoader(dataset, batch_size=4)  # type: ignore[arg-type]
        assert [len(batch["input_ids"]) for batch in calibration_batches(loader, samples, 0)] == expected
    assert torch.equal(torch.get_rng_state(), before)  # which orders the rows of the run
    batches = DataLoader([{"input_ids": torch.ones(4, 3)}] * 99, batch_size=None)  # type: ignore[var-annotated,arg-type]
    assert len([*calibration_batches(batches, samples, 0)]) == -(-samples // 4)


class Numbers(IterableDataset):
    """A stream."""

    def __init__(self, file: object = None) -> None:
        self.file = file

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from ({"input_ids": torch.tensor([i])} for i in range(8))


def test_a_stream_that_can_not_be_copied_asks_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("")
    with (tmp_path / "rows.txt").open() as file, pytest.raises(UsageError, match=r"^sampling\.scores: give .*can't be copied"):
        calibration_batches(DataLoader(Numbers(file)), 8, 0)


def test_accelerate_does_not_take_calibration_for_the_rows_that_train() -> None:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Numbers(), batch_size=2))
    for _ in loader:
        active = accelerator.gradient_state.active_dataloader
        assert len(next(iter(calibration_batches(loader, 2, 0)))["input_ids"]) == 2
        assert accelerator.gradient_state.active_dataloader is active


@pytest.mark.parametrize("streams", [False, True])
def test_fabrics_loader_gives_the_rows_of_the_one_within(streams: bool) -> None:
    rows = Numbers() if streams else [{"input_ids": torch.tensor([i])} for i in range(8)]
    loader: DataLoader = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    wrapped = Fabric(accelerator="cpu", devices=1).setup_dataloaders(loader)
    own, same = ([batch["input_ids"].tolist() for batch in calibration_batches(one, 5, 0)] for one in (loader, wrapped))
    assert own == same
    with pytest.raises(UsageError, match="calibration needs one DataLoader"):
        calibration_batches([loader], 5, 0)
