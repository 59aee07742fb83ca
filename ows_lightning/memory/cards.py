"""GPUs: what they hold, how fast they compute, and how fast they are fed."""

from __future__ import annotations

import re
from typing import NamedTuple

from ows_lightning.errors import UsageError, nearest

LINK_SHARE = 0.8
"""Share of its link's rate that a large copy from page-locked memory reaches: usually 25 of PCIe 4.0 x16's 31.5 GB/s."""


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: As people call it.
        memory: GB, of 10^9 bytes.
        link: GB/s to the host, each way, by the link's specification: PCIe 4.0 has 1.97 a lane, 5.0 has 3.94.
        tflops: Dense bfloat16 matrix products that are summed up in float32, in 10^12 FLOPs a second.
        source: Where the last figure comes from.
    """

    name: str
    memory: int
    link: float
    tflops: float
    source: str


_CORES = "SMs x 512 FLOPs x boost clock (GeForce, float32 sums; NVIDIA's Ampere GA102 and Ada whitepapers)"
CARDS = (
    Card("RTX 3060", 12, 31.5, 25.5, f"28 {_CORES}, 1.777 GHz"),
    Card("RTX 4070", 12, 31.5, 58.3, f"46 {_CORES}, 2.475 GHz"),
    Card("RTX 4060 Ti 16GB", 16, 15.8, 44.1, f"34 {_CORES}, 2.535 GHz; 8 lanes"),
    Card("RTX 5070 Ti", 16, 63.0, 87.9, f"70 {_CORES}, 2.452 GHz"),
    Card("RTX 5080", 16, 63.0, 112.6, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    Card("RTX 4080", 16, 31.5, 97.5, "NVIDIA Ada GPU architecture whitepaper, appendix"),
    Card("RTX 3090", 24, 31.5, 71.0, "NVIDIA Ampere GA102 whitepaper, table 3"),
    Card("RTX 4090", 24, 31.5, 165.2, "NVIDIA Ada GPU architecture whitepaper, appendix"),
    Card("L4", 24, 31.5, 121.0, "NVIDIA L4 data sheet, half of the rate with sparsity"),
    Card("A10", 24, 31.5, 125.0, "NVIDIA A10 data sheet"),
    Card("RTX 5090", 32, 63.0, 209.5, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    Card("A100 40GB", 40, 31.5, 312.0, "NVIDIA A100 data sheet"),
    Card("RTX A6000", 48, 31.5, 154.8, "NVIDIA RTX A6000 data sheet, half of the rate with sparsity"),
    Card("RTX 6000 Ada", 48, 31.5, 364.2, "NVIDIA RTX 6000 Ada data sheet, a quarter of the FP8 rate with sparsity"),
    Card("L40S", 48, 31.5, 362.0, "NVIDIA L40S data sheet"),
    Card("A100 80GB", 80, 31.5, 312.0, "NVIDIA A100 data sheet"),
    Card("H100", 80, 63.0, 989.4, "NVIDIA H100 data sheet, SXM, half of the rate with sparsity"),
    Card("H100 PCIe", 80, 63.0, 756.5, "NVIDIA H100 data sheet, PCIe, half of the rate with sparsity"),
    Card("H100 NVL", 94, 63.0, 835.5, "NVIDIA H100 data sheet, NVL, half of the rate with sparsity"),
    Card("H200", 141, 63.0, 989.4, "NVIDIA H200 data sheet, half of the rate with sparsity"),
    Card("B200", 180, 63.0, 2250.0, "NVIDIA HGX B200 data sheet, half of the rate with sparsity"),
)
"""By memory. A card's nominal GB are counted as 10^9 bytes: CUDA's context and fragmentation take the 7 % that it has more."""


_MAKERS = {"nvidia", "geforce", "tesla", "rtx", "gpu", "generation"}
_FORMS = {"sxm", "sxm2", "sxm4", "sxm5", "pcie", "nvl", "hbm2", "hbm2e", "hbm3", "hbm3e"}


def find_card(name: str, key: str = "card") -> Card:
    """Returns the card of a name as people, shops or ``nvidia-smi`` write it: ``rtx4090``, ``NVIDIA A100-SXM4-80GB``.

    Args:
        name: With or without the maker and the memory.
        key: What gave the name, for the errors.

    Raises:
        UsageError: There is none in `CARDS`, or there are several.
    """
    wanted, memory = _parts(name)
    found: list[Card] = []
    for left_out in (_MAKERS, _MAKERS | _FORMS):  # the form first: it tells an H100 PCIe from the others
        found = found or [card for card in CARDS if _joined(_parts(card.name)[0], _MAKERS) == _joined(wanted, left_out)]
    fitting = [card for card in found if memory in (None, card.memory)]
    if len(fitting) == 1:
        return fitting[0]
    if candidates := [f"'{card.name}' ({card.memory} GB)" for card in fitting or found]:
        raise UsageError(f"{key}: '{name}' is no card that is known; did you mean {' or '.join(candidates)}?")
    known = [card.name for card in CARDS]
    raise UsageError(f"{key}: unknown card '{name}'{nearest(name.upper(), known) or ';'} Known: {', '.join(known)}")


def _parts(name: str) -> tuple[list[str], int | None]:
    """A name's words in small letters, and the memory that it says, in GB."""
    text = name.lower().replace("rtx", "rtx ")
    memory = re.search(r"(?<![^\W_])(\d+)\s*gi?b?\b", text)
    rest = text if memory is None else text[: memory.start()] + text[memory.end() :]
    return re.findall(r"[a-z0-9]+", rest), memory and int(memory[1])


def _joined(words: list[str], left_out: set[str]) -> str:
    return "".join(word for word in words if word not in left_out)
