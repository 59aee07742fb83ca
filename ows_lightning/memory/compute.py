"""What a method computes: FLOPs a token, in expectation over the draws of blocks; how fast that is on a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ows_lightning.memory.cards import LINK_SHARE, Card
from ows_lightning.memory.plan_settings import PlanSettings
from ows_lightning.memory.prediction import ModelSizes, alike, fetched_blocks, simulate
from ows_lightning.memory.simulated_step import StepMemory, TrainingMethod
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.sampling.distributions import sampling_probabilities
from ows_lightning.sampling.draws import draw_blocks
from ows_lightning.sampling.sampler import BlockSampler
from ows_lightning.sampling.scores import OutlierScores, architecture_of

_DRAWS = 4000  # the mean over so many is within 0.3 % of the expectation
_MEASURED = ("outlier", "outlier_reverse", "weight_norm", "gradient_norm")  # made of what only a run or a file of scores knows


@dataclass(frozen=True)
class Compute:
    """What a method computes.

    Attributes:
        flops_per_token: FLOPs for each token that is trained on, in expectation over the draws: forward, recomputation,
            backward, projections, updates, renewals of subspaces and scores, as torch's counter has them (matrix products
            alone; decompositions are not in it).
        block_forward: FLOPs a token of a block's forward pass.
        draws: The blocks that train, in each of the draws that the expectation is taken over.
        probabilities: Where the draws' probabilities come from, in words.
    """

    flops_per_token: float
    block_forward: float
    draws: Sequence[Sequence[int]]
    probabilities: str


@dataclass(frozen=True)
class _Flops:
    """FLOPs of a micro-batch (the first five) and of an optimizer step, a block each but for the head.

    A frozen block that trains at rest takes ``rest`` more in each micro-batch, and ``rest_update`` in a step.

    A step that renews subspaces takes more: ``whole`` in each micro-batch, for gradients that other steps do without, and
    ``renewal`` once.
    """

    forward: float
    head: float
    lowest: float
    active: float
    frozen: float
    update: float
    renewal: float
    whole: float = 0.0
    rest: float = 0.0
    rest_update: float = 0.0

    def scaled(self, rows: int) -> _Flops:
        """What so many rows take where nothing is done once a micro-batch; updates are done once a step."""
        once = ("update", "renewal", "rest_update")
        return replace(self, **{name: rows * value for name, value in vars(self).items() if name not in once})

    @classmethod
    def from_one_and_two_rows(cls, one: _Flops, two: _Flops, rows: int) -> _Flops:
        """What so many rows take, from what one and two rows take: a share is for each row, and a share for each batch."""
        flops = cls(*(a + (rows - 1) * (b - a) for a, b in zip(vars(one).values(), vars(two).values(), strict=True)))
        row = two.renewal - one.renewal
        return replace(flops, renewal=one.renewal - row, whole=rows * row)


def compute(
    settings: PlanSettings, method: TrainingMethod | None = None, drawn: Sequence[Sequence[int]] | None = None
) -> Compute:
    """Counts a method's FLOPs on a fake model of few blocks, and takes the expectation over draws of the real one's.

    Backward runs down to the lowest active block. Above it, a frozen block passes the gradient on and an active one computes
    that of its weights, too; below it nothing is computed but forward.

    Args:
        settings: The model and what it is trained on.
        method: Another method than the settings' own.
        drawn: The blocks that trained in each interval of a run: its own FLOPs then, in place of the expectation.

    Raises:
        UsageError: The model can't be followed, or the file of scores is another model's.
    """
    method = method or settings.method
    count, recomputed = settings.blocks, settings.recomputed
    draws, origin = (drawn, "the run's") if drawn else _simulated_draws(settings, method, count)
    flops = _micro_batch_flops(settings, method, recompute=recomputed == count)
    recomputing = _micro_batch_flops(settings, method, recompute=True) if 0 < recomputed < count else flops
    embeddings_train = "embeddings" in method.always_train and method.lora is None

    def backward(blocks: Sequence[int]) -> float:
        def of(index: int) -> float:
            does = recomputing if index < recomputed else flops
            return (
                does.lowest
                if index == lowest
                else does.active
                if index in trained
                else does.frozen + does.rest * (index > lowest)
            )

        lowest, trained = min(blocks), set(blocks)
        return sum(of(index) for index in range(0 if embeddings_train else lowest, count))

    micro_batch = count * flops.forward + flops.head + sum(map(backward, draws)) / len(draws)
    resting = sum(count - min(blocks) - len(blocks) for blocks in draws) / len(draws) if method.resting_rank else 0.0
    if resting and method.resting_updates_kept:  # W + B Q^T, in forward and in backward
        micro_batch += resting * 2 * 2 * method.resting_rank * _joined_weights(settings, method)
    renewal = flops.renewal + settings.accumulate_grad_batches * flops.whole
    step = len(draws[0]) * (flops.update + renewal * _renewals(settings, method, draws)) + resting * flops.rest_update
    tokens = settings.batch_size * settings.max_seq_length
    block_forward = flops.forward / tokens
    per_token = micro_batch / tokens + step / (tokens * settings.accumulate_grad_batches)
    if method is settings.method and settings.scored_rows:
        share = settings.scored_rows * settings.max_seq_length / (settings.step_tokens * (settings.max_steps or 1))
        per_token += share * count * block_forward
    return Compute(per_token, block_forward, draws, origin)


def _joined_weights(settings: PlanSettings, method: TrainingMethod) -> float:
    """Weights of a block, in the mean over the blocks, that are joined with B Q^T: linear layers add it to their outputs."""
    blocks = decoder_layers(settings.meta_model)
    apart = {module.weight for module in blocks.modules() if method.factored and type(module) is nn.Linear}
    matrices = (p for p in blocks.parameters() if p.dim() in (2, 3) and p.size(-1) > method.resting_rank)
    return sum(p.numel() for p in matrices if p not in apart) / settings.blocks


def _micro_batch_flops(settings: PlanSettings, method: TrainingMethod, recompute: bool) -> _Flops:
    """Counts those of a micro-batch, where all blocks recompute their activations or none."""
    one = _count_flops(settings, method, recompute, rows=1)
    # Gradients are projected once a micro-batch, however many rows it has; all else is proportional to the rows.
    two = one.scaled(2) if method.rank is None else _count_flops(settings, method, recompute, rows=2)
    return _Flops.from_one_and_two_rows(one, two, settings.batch_size)


def _count_flops(settings: PlanSettings, method: TrainingMethod, recompute: bool, rows: int) -> _Flops:
    method = replace(method, renews_with_state=False)  # which stands for the worst step, as memory asks for
    resting, method = method, replace(method, resting_rank=0, resting_updates_kept=False)

    def simulated(active: int, frozen: int, method: TrainingMethod = method) -> StepMemory:
        return simulate(settings, method, active, frozen, (active + frozen) * recompute, rows)

    count = settings.blocks
    if not alike(decoder_layers(settings.meta_model)):  # of several kinds: the mean over all blocks
        active = _StageSums(simulated(count, 0).flops)
        lowest = above = active("backward") / count
        frozen = 0.0
        if method.activated_layers is not None and count > 1:
            frozen = (_StageSums(simulated(1, count - 1).flops)("backward") - lowest) / (count - 1)
        blocks = trained = count
    else:
        trained = min(count, 3 if method.activated_layers is None else min(method.activated_layers, 2))
        blocks = trained + (method.activated_layers is not None and count > trained)
        active = _StageSums(simulated(trained, blocks - trained).flops)
        lowest, frozen = active("backward lowest"), active("backward frozen")
        above = active("backward active") / max(1, trained - 1)
    rest = rest_update = 0.0
    simulated_blocks = (1, count - 1) if blocks == count else (trained, blocks - trained)
    if resting.resting_rank and simulated_blocks[1]:
        without, rests = (_StageSums(simulated(*simulated_blocks, method=one).flops) for one in (method, resting))
        rest_update = (rests("step") - without("step")) / simulated_blocks[1]
        rest = (rests("") - without("")) / simulated_blocks[1] - rest_update
    return _Flops(
        forward=active("forward") / blocks,
        head=active("loss_head"),
        lowest=lowest,
        active=above,
        frozen=frozen,
        update=active("step") / trained,
        renewal=(active("", renews=True) - active("", renews=False)) / trained if len(active.steps) > 1 else 0.0,
        rest=rest,
        rest_update=rest_update,
    )


class _StageSums:
    """Sums of what was counted, over the stages of a step whose names begin alike."""

    def __init__(self, flops: dict[tuple[Any, ...], int]) -> None:
        self.flops = {span: value for span, value in flops.items() if len(span) == 2}
        self.steps = {span[0] for span in self.flops}  # whether it renews subspaces; there may be steps of one kind alone

    def __call__(self, beginning: str, renews: bool | None = None) -> float:
        """Of an ordinary step, or of one that renews subspaces or does not."""
        renews = False not in self.steps if renews is None else renews
        return sum(value for (step, stage), value in self.flops.items() if step is renews and stage.startswith(beginning))


def _renewals(settings: PlanSettings, method: TrainingMethod, draws: Sequence[Sequence[int]]) -> float:
    """How often, in an optimizer step, an active block's subspaces are found anew: when it enters, and then once an age."""
    if method.rank is None:
        return 0.0
    gap, interval = settings.update_proj_gap, settings.interval_steps
    if method.activated_layers is None or method.keeps_states:
        return 1 / gap
    found, ages = 0, dict[int, int]()
    for blocks in draws:
        ages = {block: ages.get(block, 0) + 1 for block in blocks}  # in intervals, this one included
        found += sum(ceil(age * interval / gap) - ceil((age - 1) * interval / gap) for age in ages.values())
    return found / (interval * sum(map(len, draws)))


def _simulated_draws(settings: PlanSettings, method: TrainingMethod, count: int) -> tuple[list[list[int]], str]:
    if method.activated_layers is None:
        return [list(range(count))], "every block trains"
    if method.distribution == "uniform":
        probabilities, origin = sampling_probabilities([1.0] * count, "uniform"), "uniform"
    else:
        probabilities, origin = _probabilities(settings, count)
    number = method.active_blocks(count)
    if method is settings.method:
        sampler = BlockSampler(**{**settings.sampling, "activated_layers": number, "scores": None})
        sampler.probabilities = probabilities
        return [sampler.blocks_of(interval) for interval in range(_DRAWS)], origin
    generator = torch.Generator().manual_seed(0)
    return [draw_blocks(probabilities, number, generator) for _ in range(_DRAWS)], origin


def _probabilities(settings: PlanSettings, count: int) -> tuple[Tensor, str]:
    """The blocks' probabilities, and where they come from: uniform ones stand for those that only a run can measure."""
    distribution, scores = settings.sampling.get("distribution", "outlier"), settings.sampling.get("scores")
    if scores is not None:
        known = OutlierScores.load(Path(scores))
        ratios = known.ratios_for(count, architecture_of(settings.model), distribution)
        return sampling_probabilities(ratios, distribution), f"{distribution}, from {scores}"
    if distribution in _MEASURED:
        return sampling_probabilities([1.0] * count, "uniform"), f"uniform, for want of sampling.scores ({distribution})"
    if distribution == "window":
        return sampling_probabilities([1.0] * count, "uniform"), "window, uniform for want of sampling.scores"
    origin = distribution if isinstance(distribution, str) else "a list of weights"
    return sampling_probabilities([1.0] * count, distribution), origin


UTILISATION = 0.4
"""The share of a card's dense rate that training is taken to reach. Published runs on one card lie between 0.3 and 0.5."""


@dataclass(frozen=True)
class Speed:
    """A method's speed on a card.

    Attributes:
        tokens_per_second: On one device.
        bound_by: ``compute``, or ``link`` where frozen blocks arrive more slowly than they are used.
        compute_seconds: Of an optimizer step.
        fetched_bytes: Of an optimizer step, in expectation over the draws.
        fetch_seconds: What they take over the card's link.
        hides_from_tokens: Tokens of a micro-batch from which on a block's fetch takes no longer than a block's forward pass.
    """

    tokens_per_second: float
    bound_by: str
    compute_seconds: float
    fetched_bytes: int
    fetch_seconds: float
    hides_from_tokens: int

    def words(self) -> str:
        """Says in a few words what bounds it."""
        if not self.fetched_bytes:
            return f"compute, {self.compute_seconds:.1f} s a step"
        hidden = "hide behind" if self.bound_by == "compute" else "do not hide behind"
        return (
            f"{self.bound_by}: {self.fetched_bytes / 1e9:.0f} GB fetched a step take {self.fetch_seconds:.1f} s and {hidden} "
            f"{self.compute_seconds:.1f} s of compute; block by block from {self.hides_from_tokens:,} tokens a micro-batch on"
        )


def speed(settings: PlanSettings, method: TrainingMethod, computes: Compute, card: Card) -> Speed:
    """Estimates a method's speed: the longer of what its FLOPs take at `UTILISATION`, and what its fetches take.

    Args:
        settings: The model and what it is trained on.
        method: How it trains.
        computes: What it computes.
        card: Where.
    """
    rate, link = card.tflops * 1e12 * UTILISATION, card.link * 1e9 * LINK_SHARE
    block = ModelSizes.of(settings).offloaded
    fetches = sum(fetched_blocks(draw, settings, method, settings.blocks) for draw in computes.draws) / len(computes.draws)
    fetched = int(fetches * block) * settings.accumulate_grad_batches
    tokens = settings.batch_size * settings.max_seq_length * settings.accumulate_grad_batches
    computing, fetching = tokens * computes.flops_per_token / rate, fetched / link
    return Speed(
        tokens_per_second=tokens / max(computing, fetching),
        bound_by="compute" if computing >= fetching else "link",
        compute_seconds=computing,
        fetched_bytes=fetched,
        fetch_seconds=fetching,
        hides_from_tokens=-int(-block / link * rate // computes.block_forward) if fetched else 0,
    )
