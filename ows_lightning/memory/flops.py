"""What a method computes: FLOPs a token, in expectation over the draws of blocks."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ows_lightning.memory.plan_settings import PlanSettings
from ows_lightning.memory.prediction import blocks_are_alike, simulate
from ows_lightning.memory.simulated_step import TrainingMethod
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.sampling.activation import block_matrices
from ows_lightning.sampling.distributions import OUTLIER_RATIO, sampling_probabilities, score_name
from ows_lightning.sampling.draws import draw_blocks
from ows_lightning.sampling.scores import BlockScores, architecture_of

_DRAWS = 4000  # the mean over this many is within 0.3 % of the expectation


@dataclass(frozen=True)
class FlopCount:
    """What a method computes, as torch's counter has it: matrix products alone, without decompositions."""

    # For each token that is trained on, in expectation over the draws: forward, recomputation, backward, projections, updates,
    # renewals of subspaces and scores.
    flops_per_token: float
    block_forward: float  # FLOPs a token of a block's forward pass
    draws: Sequence[Sequence[int]]  # the blocks that train, in each of the draws that the expectation is taken over
    origin: str  # where the draws' probabilities come from, in words


class _BlockFlops(NamedTuple):
    """FLOPs of one block, or of the head, in a micro-batch; from ``update`` on, in an optimizer step."""

    forward: float
    head: float
    backward_lowest: float  # in the lowest active block
    backward_active: float  # in any other active block
    backward_frozen: float  # in a frozen block above the lowest active one
    resting: float  # in addition, in a frozen block that trains at rest
    update: float
    resting_update: float
    renewal: float  # in addition, in a step that renews subspaces
    full_gradient: float = 0.0  # and in each of its micro-batches, for gradients that other steps do without


def count_flops(settings: PlanSettings, drawn: Sequence[Sequence[int]] | None = None) -> FlopCount:
    """Counts a method's FLOPs a token on a fake model of few blocks, and takes the expectation over draws of the real one's.

    Backward runs down to the lowest active block. Above it, a frozen block passes the gradient on and an active one computes
    that of its weights, too; below it nothing is computed but forward. The blocks that were drawn in each interval of a run
    give its own FLOPs, in place of the expectation.
    """
    method, count, num_checkpointed = settings.method, settings.num_blocks, settings.num_checkpointed
    draws, origin = (drawn, "the run's") if drawn else _simulated_draws(settings)
    flops = _micro_batch_flops(settings, recompute=num_checkpointed == count)
    checkpointed = _micro_batch_flops(settings, recompute=True) if 0 < num_checkpointed < count else flops

    def backward(blocks: Sequence[int]) -> float:
        def backward_of(index: int) -> float:
            each = checkpointed if index < num_checkpointed else flops
            if index == lowest:
                return each.backward_lowest
            if index in trained:
                return each.backward_active
            return each.backward_frozen + (each.resting if index > lowest else 0.0)

        lowest, trained = min(blocks), set(blocks)
        return sum(backward_of(index) for index in range(0 if settings.embeddings_train else lowest, count))

    micro_batch = count * flops.forward + flops.head + sum(map(backward, draws)) / len(draws)
    resting = sum(count - min(blocks) - len(blocks) for blocks in draws) / len(draws) if method.resting_rank else 0.0
    if resting and settings.offloads:
        micro_batch += resting * _merging_flops(settings)
    renewal = flops.renewal + settings.accumulate_grad_batches * flops.full_gradient
    step = len(draws[0]) * (flops.update + renewal * _renewals(settings, draws)) + resting * flops.resting_update
    tokens = settings.batch_size * settings.max_seq_length
    block_forward = flops.forward / tokens
    per_token = micro_batch / tokens + step / (tokens * settings.accumulate_grad_batches)
    return FlopCount(per_token + _scoring_flops(settings, count * block_forward), block_forward, draws, origin)


def _merging_flops(settings: PlanSettings) -> float:
    """FLOPs of W + B Q^T in an offloaded block at rest, in forward and in backward; linear layers do without it."""
    rank, blocks = settings.method.resting_rank, decoder_layers(settings.meta_model)
    apart = {module.weight for module in blocks.modules() if settings.method.factored and type(module) is nn.Linear}
    merged = [p for p in block_matrices(blocks) if p.size(-1) > rank and p not in apart]
    return 2 * 2 * rank * sum(p.numel() for p in merged) / settings.num_blocks


def _scoring_flops(settings: PlanSettings, forward: float) -> float:
    """FLOPs of the calibration rows' forward passes, for each token that is trained; 0 where no outliers are measured."""
    method, sampler, steps = settings.method, settings.sampler, settings.max_steps
    scored = score_name(sampler.distribution) == OUTLIER_RATIO and not sampler.scores
    if not (method.ours and method.activated_layers is not None and scored) or steps is None:
        return 0.0
    intervals, every = ceil(steps / sampler.interval_steps), sampler.rescore_every
    samples = sampler.calibration_samples * (ceil(intervals / every) if every else 1)
    return samples / (settings.batch_size * settings.accumulate_grad_batches * settings.devices * steps) * forward


def _micro_batch_flops(settings: PlanSettings, recompute: bool) -> _BlockFlops:
    """Counts the FLOPs of a micro-batch, where all blocks recompute their activations or none."""
    flops = _simulate_flops(settings, recompute, settings.batch_size)
    if settings.method.rank is None:
        return flops
    # Of a renewal's, those of full gradients grow with the rows; the others are computed once a step.
    full_gradient = _simulate_flops(settings, recompute, 2 * settings.batch_size).renewal - flops.renewal
    return flops._replace(renewal=flops.renewal - full_gradient, full_gradient=full_gradient)


def _simulate_flops(settings: PlanSettings, recompute: bool, rows: int) -> _BlockFlops:
    resting, method = settings.method, replace(settings.method, resting_rank=0)

    def stage_flops(active: int, frozen: int, method: TrainingMethod = method) -> Callable[..., float]:
        """Returns a function that sums the FLOPs of stages by the beginning of their names, in a step that renews or not."""
        num_checkpointed = active + frozen if recompute else 0
        stages = simulate(replace(settings, method=method), active, frozen, num_checkpointed, rows).flops
        only_one = (False, "step") not in stages  # each step is like any other

        def total(beginning: str = "", renews: bool = only_one) -> float:
            return sum(n for span, n in stages.items() if span[:1] == (renews,) and span[1].startswith(beginning))

        return total

    count = settings.num_blocks
    if not blocks_are_alike(settings):  # of several kinds: the mean over all blocks
        blocks = trained = count
        step = stage_flops(count, 0)
        lowest = above = step("backward") / count
        frozen = 0.0
        if method.activated_layers is not None and count > 1:
            frozen = (stage_flops(1, count - 1)("backward") - lowest) / (count - 1)
    else:
        trained = min(count, 3 if method.activated_layers is None else min(method.activated_layers, 2))
        blocks = trained + (method.activated_layers is not None and count > trained)
        step = stage_flops(trained, blocks - trained)
        lowest, frozen = step("backward lowest"), step("backward frozen")
        above = step("backward active") / max(1, trained - 1)
    resting_flops = resting_update = 0.0
    active, others = (1, count - 1) if blocks == count else (trained, blocks - trained)
    if resting.resting_rank and others:
        without, rests = (stage_flops(active, others, one) for one in (method, resting))
        resting_update = (rests("step") - without("step")) / others
        resting_flops = (rests() - without()) / others - resting_update
    return _BlockFlops(
        forward=step("forward") / blocks, head=step("loss_head"), backward_lowest=lowest, backward_active=above,
        backward_frozen=frozen, resting=resting_flops, update=step("step") / trained, resting_update=resting_update,
        renewal=(step(renews=True) - step()) / trained,
    )  # fmt: skip


def _renewals(settings: PlanSettings, draws: Sequence[Sequence[int]]) -> float:
    """Subspace renewals of an active block per optimizer step: one when it becomes active, then every `update_proj_gap`."""
    if settings.method.rank is None:
        return 0.0
    gap, interval = settings.update_proj_gap, settings.sampler.interval_steps
    if settings.method.activated_layers is None or settings.method.keeps_states:
        return 1 / gap
    found, ages = 0, dict[int, int]()
    for blocks in draws:
        ages = {block: ages.get(block, 0) + 1 for block in blocks}  # in intervals, this one included
        found += sum(ceil(age * interval / gap) - ceil((age - 1) * interval / gap) for age in ages.values())
    return found / (interval * sum(map(len, draws)))


def _simulated_draws(settings: PlanSettings) -> tuple[list[list[int]], str]:
    method, count = settings.method, settings.num_blocks
    if method.activated_layers is None:
        return [list(range(count))], "every block trains"
    probabilities, origin = _probabilities(settings)
    number = method.active_blocks(count)
    if method.ours:
        sampler = copy.copy(settings.sampler)
        sampler.activated_layers, sampler.probabilities = number, probabilities
        return [sampler.blocks_of(interval) for interval in range(_DRAWS)], origin
    generator = torch.Generator().manual_seed(0)
    return [draw_blocks(probabilities, number, generator) for _ in range(_DRAWS)], origin


def _probabilities(settings: PlanSettings) -> tuple[Tensor, str]:
    """The blocks' probabilities, and where they come from: uniform ones stand for those that only a run can measure."""
    distribution, count = settings.method.distribution or settings.sampler.distribution, settings.num_blocks
    scores = settings.sampler.scores if distribution != "gradient_norm" else None  # which only a run knows
    if settings.method.distribution is None and scores is not None:
        ratios = BlockScores.load(scores).scores_for(count, architecture_of(settings.model_config), distribution)
        return sampling_probabilities(ratios, distribution), f"{distribution}, from {scores}"
    if score_name(distribution) is not None:  # which only a run or a file of scores knows
        return sampling_probabilities([1.0] * count, "uniform"), f"uniform, for want of sampling.scores ({distribution})"
    origin = distribution if isinstance(distribution, str) else "a list of weights"
    return sampling_probabilities([1.0] * count, distribution), origin
