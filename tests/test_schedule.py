"""The learning rate's schedule against that of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ows_lightning.errors import UsageError
from ows_lightning.module import warmup_and_decay


def rates(schedule: LRScheduler) -> list[float]:
    seen = []
    for _ in range(24):  # four more than the run has
        seen.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return seen


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)


@pytest.mark.parametrize(("kind", "theirs"), [("cosine",) * 2, ("linear",) * 2, ("constant", "constant_with_warmup")])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (4, 4), (0.25, 5), (0.03, 1)])
def test_rates_are_those_of_transformers(kind: str, theirs: str, warmup: float, steps: int) -> None:
    expected = rates(get_scheduler(theirs, sgd(), num_warmup_steps=steps, num_training_steps=20))
    assert rates(warmup_and_decay(sgd(), kind, warmup, 20)) == expected


@pytest.mark.parametrize(("warmup", "said"), [(19, False), (20, True), (30, True), (0.5, False)])
def test_a_warmup_that_does_not_end_is_said(warmup: float, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    warmup_and_decay(sgd(), "cosine", warmup, 20)
    line = f"model.warmup_steps: {warmup} are no less than the run's 20 steps: the rate never reaches its value"
    assert caplog.messages == [line] * said


def test_a_schedule_without_an_end_needs_a_number_of_warmup_steps() -> None:
    assert rates(warmup_and_decay(sgd(), "constant", 2, float("inf")))[:3] == [0.0, 0.15, 0.3]
    for kind, warmup in (("constant", 0.1), ("linear", 2), ("cosine", 0)):
        with pytest.raises(UsageError, match=r"trainer\.max_steps"):
            warmup_and_decay(sgd(), kind, warmup, float("inf"))
