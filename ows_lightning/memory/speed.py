"""How fast a method would be on a card, and what bounds it."""

from __future__ import annotations

from dataclasses import dataclass

from ows_lightning.memory.cards import LINK_SHARE, Card
from ows_lightning.memory.compute import Compute
from ows_lightning.memory.settings import PlanSettings
from ows_lightning.memory.simulated_step import TrainingMethod
from ows_lightning.memory.streamed import fetched_blocks

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


def speed(settings: PlanSettings, method: TrainingMethod, does: Compute, card: Card) -> Speed:
    """Estimates a method's speed: the longer of what its FLOPs take at `UTILISATION`, and what its fetches take.

    Args:
        settings: The model and what it is trained on.
        method: How it trains.
        does: What it computes.
        card: Where.
    """
    rate, link = card.tflops * 1e12 * UTILISATION, card.link * 1e9 * LINK_SHARE
    blocks = does.blocks
    fetches = sum(fetched_blocks(draw, settings, method, blocks.count) for draw in does.draws) / len(does.draws)
    fetched = int(fetches * blocks.waits) * settings.accumulate_grad_batches
    tokens = settings.batch_size * settings.max_seq_length * settings.accumulate_grad_batches
    computing, fetching = tokens * does.flops_per_token / rate, fetched / link
    return Speed(
        tokens_per_second=tokens / max(computing, fetching),
        bound_by="compute" if computing >= fetching else "link",
        compute_seconds=computing,
        fetched_bytes=fetched,
        fetch_seconds=fetching,
        hides_from_tokens=-int(-blocks.waits / link * rate // does.block_forward) if fetched else 0,
    )
