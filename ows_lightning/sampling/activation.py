"""Freezing: some blocks train, the others cost no gradient and no optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer


def activate_blocks(
    layers: Iterable[nn.Module],
    active: Sequence[int],
    others: Iterable[tuple[nn.Parameter, bool]] = (),
    optimizers: Iterable[Optimizer] = (),
) -> None:
    """Lets some decoder blocks train and freezes the rest.

    A frozen parameter has ``requires_grad=False``, no gradient, and no state in any of the optimizers: moments and
    projectors are freed, so that memory does not grow with the blocks that have ever been active. Call it between two
    optimizer steps.

    Args:
        layers: The decoder blocks, see ``decoder_layers``, or what of each of them may train.
        active: Indices of the blocks that train from now on.
        others: Parameters outside the blocks, each with whether it trains.
        optimizers: Optimizers that hold the parameters; they must have been built before anything was frozen.
    """
    trains = {p: index in active for index, layer in enumerate(layers) for p in layer.parameters()}
    trains.update(others)
    for p, trainable in trains.items():
        p.requires_grad_(trainable)
        if not trainable:
            p.grad = None
            for optimizer in optimizers:
                optimizer.state.pop(p, None)
