"""Drawing distinct blocks."""

import torch
from torch import Tensor

from ows_lightning.errors import UsageError
from ows_lightning.sampling.grouping import grouped_draws, random_uniform
from ows_lightning.sampling.inclusion import window_probabilities


def draw_blocks(probabilities: Tensor, count: int, generator: torch.Generator, grouping: float = 0.0) -> list[int]:
    """Draws distinct blocks, each in proportion to the probabilities of those still left, and returns them in ascending order.

    Args:
        probabilities: Shape (num_layers,), see `sampling_probabilities`.
        count: How many blocks to draw (gamma in the paper); a UsageError says that there are fewer.
        generator: The CPU random generator to draw with.
        grouping: Chance, 0 to 1, that a draw is a grouped one (``GroupedDraws``): each block is as likely as in an independent
            draw, but its companions have similar depth, so the lowest block is higher on average.
    """
    blocks, drawable = len(probabilities), int((probabilities > 0).sum())
    if count > drawable:
        which, hint = f"the model's {blocks} blocks", f"give at most {drawable}"
        if count <= blocks:
            which = f"the {drawable} of {blocks} blocks whose probability is not zero"
            hint = f"take another distribution or threshold, or {hint}"
        raise UsageError(f"sampling.activated_layers: {count} is more than {which}; {hint}")
    if grouping >= 1 or (grouping > 0 and random_uniform(generator) < grouping):
        return grouped_draws(tuple(probabilities.tolist()), count).draw(generator)
    return sorted(torch.multinomial(probabilities, count, replacement=False, generator=generator).tolist())


def draw_window(probabilities: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Draws a window of neighbouring blocks, in proportion to the sum of their probabilities; see `draw_blocks`."""
    lowest = int(torch.multinomial(torch.from_numpy(window_probabilities(probabilities, count)), 1, generator=generator))
    return list(range(lowest, lowest + count))
