"""GPUs: what they are called, what they hold, and how fast a method is on one."""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from ows_lightning.errors import UsageError, did_you_mean
from ows_lightning.memory.flops import FlopCount
from ows_lightning.memory.plan_settings import PlanSettings
from ows_lightning.memory.prediction import ModelSizes, fetched_blocks

LINK_SHARE = 0.8
"""Share of its link's rate that a large copy from page-locked memory reaches: usually 25 of PCIe 4.0 x16's 31.5 GB/s."""
UTILISATION = 0.4
"""The assumed model FLOPs utilisation (MFU). Published runs on one card lie between 0.3 and 0.5."""


class Card(NamedTuple):
    """A GPU."""

    name: str  # as people call it
    memory: int  # GB, of 10^9 bytes
    link: float  # GB/s to the host, each way, by the link's specification: PCIe 4.0 has 1.97 a lane, 5.0 has 3.94
    tflops: float  # dense bfloat16 matrix products that are summed up in float32, in 10^12 FLOPs a second
    source: str  # of the last figure


_, *_rows = csv.reader(Path(__file__).with_name("cards.csv").read_text(encoding="utf-8").splitlines())
CARDS = tuple(Card(name, int(memory), float(link), float(tflops), source) for name, memory, link, tflops, source in _rows)
"""By memory. A card's nominal GB are counted as 10^9 bytes; most give 5 % more, an L4, A10 or L40S up to 2 % less."""

_MAKERS = {"nvidia", "geforce", "tesla", "rtx", "gpu", "generation"}
_FORM_FACTORS = {"sxm", "sxm2", "sxm4", "sxm5", "pcie", "nvl", "hbm2", "hbm2e", "hbm3", "hbm3e"}


def find_card(name: str, key: str = "card") -> Card:
    """Returns the card of a name as people, shops or ``nvidia-smi`` write it: ``rtx4090``, ``NVIDIA A100-SXM4-80GB``.

    It raises a UsageError, which begins with the key that gave the name, if there is none in `CARDS` or there are several.
    """
    whole, memory = _name_and_memory(name)
    model, _ = _name_and_memory(name, _MAKERS | _FORM_FACTORS)
    names = {card: _name_and_memory(card.name)[0] for card in CARDS}
    # The form counts if there is such a card: it tells an H100 PCIe from the others.
    found = [card for card in CARDS if names[card] == (whole if whole in names.values() else model)]
    fitting = [card for card in found if memory in (None, card.memory)]
    if len(fitting) == 1:
        return fitting[0]
    if candidates := [f"'{card.name}' ({card.memory} GB)" for card in fitting or found]:
        raise UsageError(f"{key}: '{name}' is no card that is known; did you mean {' or '.join(candidates)}?")
    known = [card.name for card in CARDS]
    raise UsageError(f"{key}: unknown card '{name}'{did_you_mean(name.upper(), known) or ';'} Known: {', '.join(known)}")


def _name_and_memory(name: str, left_out: set[str] = _MAKERS) -> tuple[str, int | None]:
    """A name in lower case, joined, without some words; and the memory that it says, in GB."""
    text = name.lower().replace("rtx", "rtx ")
    memory = re.search(r"(?<![^\W_])(\d+)\s*gi?b?\b", text)
    rest = text if memory is None else text[: memory.start()] + text[memory.end() :]
    return "".join(word for word in re.findall(r"[a-z0-9]+", rest) if word not in left_out), memory and int(memory[1])


def available_bytes(device: torch.device, weights: Iterable[Tensor] = (), processes: int = 1) -> int:
    """Bytes that are free on a GPU or reserved by torch; on a CPU a process's share, with the ``weights`` there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available // processes + sum(p.nbytes for p in weights if p.device.type == device.type)


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
