"""How fast a method is on a card: what its FLOPs take, and what its fetches of frozen blocks take."""

from dataclasses import dataclass

from ows_lightning.memory.cards import LINK_SHARE, Card
from ows_lightning.memory.flops import FlopCount
from ows_lightning.memory.plan_settings import PlanSettings
from ows_lightning.memory.prediction import ModelSizes, fetched_blocks

UTILISATION = 0.4
"""The assumed model FLOPs utilisation (MFU). Published runs on one card lie between 0.3 and 0.5."""


@dataclass(frozen=True)
class Speed:
    """A method's speed on a card."""

    tokens_per_second: float  # on one device
    bound_by: str  # `compute`, or `link` where frozen blocks arrive more slowly than they are used
    compute_seconds: float  # of an optimizer step
    fetched_bytes: int  # of an optimizer step, in expectation over the draws
    fetch_seconds: float  # what they take over the card's link
    hides_from_tokens: int  # the smallest micro-batch whose forward pass of a block hides a fetch

    def words(self) -> str:
        """Says what bounds it, with the figures that show it."""
        if not self.fetched_bytes:
            return f"compute, {self.compute_seconds:.1f} s a step"
        hidden = "hide behind" if self.bound_by == "compute" else "do not hide behind"
        fetches = f"{self.fetched_bytes / 1e9:.0f} GB fetched a step take {self.fetch_seconds:.1f} s"
        alone = f"block by block from {self.hides_from_tokens:,} tokens a micro-batch on"
        return f"{self.bound_by}: {fetches} and {hidden} {self.compute_seconds:.1f} s of compute; {alone}"


def estimate_speed(settings: PlanSettings, computed: FlopCount, card: Card) -> Speed:
    """Estimates a speed: the longer of what a method's FLOPs take at `UTILISATION`, and what its fetches take."""
    rate, link = card.tflops * 1e12 * UTILISATION, card.link * 1e9 * LINK_SHARE
    block = sum(ModelSizes.of(settings).offloaded) / settings.num_blocks  # the mean, where they differ
    fetches = sum(fetched_blocks(draw, settings) for draw in computed.draws) / len(computed.draws)
    fetched = int(fetches * block) * settings.accumulate_grad_batches
    tokens = settings.batch_size * settings.max_seq_length * settings.accumulate_grad_batches
    computing, fetching = tokens * computed.flops_per_token / rate, fetched / link
    return Speed(
        tokens_per_second=tokens / max(computing, fetching), bound_by="compute" if computing >= fetching else "link",
        compute_seconds=computing, fetched_bytes=fetched, fetch_seconds=fetching,
        hides_from_tokens=-int(-block / link * rate // computed.block_forward) if fetched else 0,
    )  # fmt: skip
