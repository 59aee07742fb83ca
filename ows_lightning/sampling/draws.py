"""Drawing distinct blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ows_lightning.errors import UsageError
from ows_lightning.sampling.grouping import grouped_draws, uniform
from ows_lightning.sampling.inclusion import window_probabilities


def draw_blocks(
    probabilities: Tensor, count: int, generator: torch.Generator | None = None, grouping: float = 0.0
) -> list[int]:
    """Draws distinct blocks, each in proportion to the probabilities of those still left, and returns them in ascending order.

    Args:
        probabilities: Shape (num_layers,), see `sampling_probabilities`.
        count: How many blocks to draw (gamma in the paper); a UsageError says that there are fewer.
        generator: The CPU random generator to draw with; None is torch's global one.
        grouping: The chance, 0 to 1, of a draw in which each block is as likely, but together with blocks of similar depth,
            see ``GroupedDraws``: so the lowest block lies on average so far between that of independent draws and the highest.
    """
    blocks, drawable = len(probabilities), int((probabilities > 0).sum())
    if count > drawable:
        which = f"the {drawable} of {blocks} blocks whose probability is not zero; take another distribution or threshold, or"
        which = which if count <= blocks else f"the model's {blocks} blocks;"
        raise UsageError(f"sampling.activated_layers: {count} is more than {which} give at most {drawable}")
    if grouping >= 1 or (grouping > 0 and uniform(generator) < grouping):
        return grouped_draws(tuple(probabilities.tolist()), count).draw(generator)
    return sorted(torch.multinomial(probabilities, count, replacement=False, generator=generator).tolist())


def draw_window(probabilities: Tensor, count: int, generator: torch.Generator | None = None) -> list[int]:
    """Draws a window of neighbouring blocks, in proportion to the sum of their probabilities; see `draw_blocks`."""
    lowest = int(torch.multinomial(torch.from_numpy(window_probabilities(probabilities, count)), 1, generator=generator))
    return list(range(lowest, lowest + count))
