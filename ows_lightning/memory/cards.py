"""GPUs: what they hold, how fast they compute and are fed."""

import csv
import re
from pathlib import Path
from typing import NamedTuple

from ows_lightning.errors import UsageError, did_you_mean

LINK_SHARE = 0.8
"""Share of its link's rate that a large copy from page-locked memory reaches: usually 25 of PCIe 4.0 x16's 31.5 GB/s."""


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
    """A name in small letters, joined, without some words; and the memory that it says, in GB."""
    text = name.lower().replace("rtx", "rtx ")
    memory = re.search(r"(?<![^\W_])(\d+)\s*gi?b?\b", text)
    rest = text if memory is None else text[: memory.start()] + text[memory.end() :]
    return "".join(word for word in re.findall(r"[a-z0-9]+", rest) if word not in left_out), memory and int(memory[1])
