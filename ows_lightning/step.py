"""One optimizer step: its loss, over micro-batches and processes, and the gradients that follow from it."""

import logging
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ows_lightning.models.loss import LossParts
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.sharding import clip_, scale_, total_norm

log = logging.getLogger(__name__)
_PROVISIONAL_TARGETS = 1024.0  # about the targets of a micro-batch; a power of two, so that dividing by it is exact


class StepMetrics(NamedTuple):
    """The result of an optimizer step, over all its micro-batches and processes."""

    loss: Tensor  # mean over all target tokens (nats), float32, a scalar on the host
    grad_norm: Tensor  # of what the optimizer consumes, before clipping, float32, a scalar on the host
    tokens: int  # targets or not
    num_targets: int
    skipped: bool  # it changes nothing, because a gradient held NaN or Inf
    signal_codes: int  # sum of the processes' ``StepAccumulator.signal_code``


class StepAccumulator:
    """The optimizer step that is under way.

    The step's loss is the mean over the target tokens of all its micro-batches and processes. How many there are is known only
    after the last micro-batch: until then sums are divided by a fixed number, which ``rescale`` corrects. Processes, over
    which the strategy averages gradients, communicate once a step.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.signal_code = 0  # of `SaveOnSignal`: sent to all processes with the next step's loss; they see the sum
        self.totals: Tensor | None = None  # summed cross entropy, numbers of target and of all tokens, signal codes
        self._divisor: float | Tensor = _PROVISIONAL_TARGETS
        self._is_rescaled = self._is_reduced = False

    def add(self, parts: LossParts, tokens: Tensor, first: bool, last: bool) -> Tensor:
        """Adds a micro-batch of ``tokens`` (a scalar), and returns its loss; ``first`` drops an unfinished step's sums."""
        counts = [parts.num_targets, tokens, torch.full_like(tokens, self.signal_code if last else 0)]
        here = torch.stack([parts.total.detach(), *(count.to(parts.total.dtype) for count in counts)])
        before = None if first else self.totals
        self._is_rescaled, self._is_reduced = False, last
        self.totals = here if before is None else before + here
        if last and self.processes > 1:
            dist.all_reduce(self.totals)  # strategy.reduce would hold all processes up with a barrier
        if before is None:
            self._divisor = self.totals[1].clamp(min=1) / self.processes if last else _PROVISIONAL_TARGETS
        return parts.total / self._divisor

    def rescale(self, optimizer: Optimizer, micro_batches: int) -> None:
        """Makes the gradient that of the step's mean loss, before hooks look at it.

        Gradients have to be complete, and averaged over processes. Lightning has divided each loss by ``micro_batches``. A
        second call, before `clip_and_report`, does nothing.
        """
        if micro_batches > 1 and self.totals is not None and not self._is_rescaled:
            if not self._is_reduced and self.processes > 1:  # the last micro-batch had no loss
                dist.all_reduce(self.totals)
            factor = self._divisor * micro_batches * self.processes / self.totals[1].clamp(min=1)
            scale_(gradients_of(optimizer), factor)
        self._is_rescaled = True

    def clip_and_report(self, optimizer: Optimizer, limit: float | None = None, algorithm: str | None = None) -> StepMetrics:
        """Clips what the optimizer consumes (at 0 or None: not), and begins the next step; call it after `rescale`."""
        assert self.totals is not None
        gradients = gradients_of(optimizer)
        norm = total_norm(gradients).to(self.totals.device)  # of no gradients it is a zero on the host
        mean = self.totals[0] / self.totals[1].clamp(min=1)
        # Only here does a step wait for the device.
        loss, grad_norm, targets, tokens, codes = torch.stack([mean, norm, *self.totals[1:]]).cpu()
        skipped = not grad_norm.isfinite()
        if isinstance(optimizer, GaLoreAdamW):  # else it skips, and names the weight, by itself
            optimizer.known_finite = not skipped
        elif skipped:
            log.warning("Step skipped: a gradient holds NaN or Inf")
            optimizer.zero_grad()
        if limit and not skipped:
            clip_(gradients, norm, limit, algorithm or "norm")
        self.totals = None
        return StepMetrics(loss, grad_norm, int(tokens), int(targets), skipped, int(codes))


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Returns what an optimizer's next step consumes."""
    if isinstance(optimizer, GaLoreAdamW):
        return optimizer.gradients()
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
