"""Drawing distinct blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ows_lightning.errors import UsageError
from ows_lightning.sampling.grouping import grouped_draws, independent_draw
from ows_lightning.sampling.inclusion import window_probabilities


def draw_blocks(
    probabilities: Tensor, count: int, generator: torch.Generator | None = None, grouping: float = 0.0
) -> list[int]:
    """Draws distinct blocks, one after the other, each in proportion to the probabilities of those still left.

    With ``grouping``, each block is drawn as often, but together with blocks of similar depth, see ``GroupedDraws``.

    Args:
        probabilities: Shape (num_layers,), see `sampling_probabilities`.
        count: How many blocks to draw (gamma in the paper).
        generator: The CPU random generator to draw with; None is torch's global one.
        grouping: 0 draws independently; 1 raises the lowest block, on average, as far as possible; values between are the
            share of that gain.

    Returns:
        The indices of the blocks, ascending.

    Raises:
        UsageError: `count` is below 1 or above the number of blocks that can be drawn, or `grouping` not between 0 and 1.
    """
    num_layers, drawable = len(probabilities), int((probabilities > 0).sum())
    if count < 1:
        raise UsageError(f"activated_layers: {count} blocks leave nothing to train; give at least 1")
    if count > num_layers:
        raise UsageError(f"activated_layers: {count} is more than the model's {num_layers} blocks; give at most that")
    if count > drawable:
        raise UsageError(
            f"activated_layers: {count} is more than the {drawable} of {num_layers} blocks whose probability is not "
            f"zero; give at most {drawable}, or another `distribution` or a lower `threshold`"
        )
    if not 0 <= grouping <= 1:
        raise UsageError(f"grouping: {grouping} is not between 0 and 1")
    if grouping > 0:
        return grouped_draws(tuple(probabilities.tolist()), count, grouping).draw(generator)
    return independent_draw(probabilities, count, generator)


def draw_window(probabilities: Tensor, count: int, generator: torch.Generator | None = None) -> list[int]:
    """Draws a window of neighbouring blocks, in proportion to the sum of their probabilities.

    Args:
        probabilities: Shape (num_layers,), see `sampling_probabilities`.
        count: How many blocks a window has, at most all.
        generator: The CPU random generator to draw with; None is torch's global one.

    Returns:
        The indices of the blocks, ascending.
    """
    lowest = int(torch.multinomial(torch.from_numpy(window_probabilities(probabilities, count)), 1, generator=generator))
    return list(range(lowest, lowest + count))
