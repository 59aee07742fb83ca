"""Freezing: some blocks train; the others, unless they train at rest, have no gradient and no optimizer state."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers, is_matrix, language_model_of, non_block_parameters

_UNFREEZING = ("enable_adapters", "set_adapter")  # methods of peft's layers that unfreeze adapters


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped, whose attributes it hides."""
    return getattr(optimizer, "optimizer", optimizer)


def trainable_by_block(model: nn.Module) -> list[nn.ParameterDict]:
    """Returns each block's trainable parameters, first block first, without what the user froze (LoRA's base)."""
    named = ([(f"/{name.replace('.', '/')}", p) for name, p in layer.named_parameters()] for layer in decoder_layers(model))
    return [nn.ParameterDict((name, p) for name, p in block if p.requires_grad) for block in named]


def block_matrices(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Returns what may train at rest: blocks' matrices, also stacks of them, given as blocks or by `trainable_by_block`."""
    return [p for layer in layers for name, p in layer.named_parameters() if is_matrix(name, p) and p.dim() <= 3]


def non_block_trains(model: nn.Module, always_train: Iterable[str]) -> dict[nn.Parameter, bool]:
    """Maps each trainable parameter outside the blocks to whether it always trains: its part (`NON_BLOCK_PARTS`) is named."""
    outside = non_block_parameters(model)
    always = {p for part in always_train for p in outside[part]}
    return {p: p in always for part in outside.values() for p in part if p.requires_grad}


def activate_blocks(
    layers: Iterable[nn.Module], active: Sequence[int], others: Iterable[tuple[nn.Parameter, bool]] = (),
    optimizers: Sequence[Any] = (), resting_rank: int = 0, resting_seed: int = 0,
) -> set[nn.Parameter]:  # fmt: skip
    """Lets some decoder blocks train, and freezes the rest or lets it rest; call it between two steps.

    A frozen parameter has ``requires_grad=False``, no gradient, and no state in any of the optimizers, so that memory does not
    grow with the blocks that have ever been active. One that blocks share (Zamba2's attention) trains if any of them does.

    With a ``resting_rank``, the matrices of the blocks above the lowest active one, which backward passes through anyway,
    keep ``requires_grad`` and train at rest, see ``GaLoreAdamW.rest``; vectors and the blocks below are frozen. A UsageError
    names an optimizer that has some of these matrices and can't do this.

    Args:
        layers: The decoder blocks, or `trainable_by_block`'s modules.
        active: Indices of the blocks that train from now on.
        others: Parameters outside the blocks, each with whether it trains.
        optimizers: Built before anything was frozen; with a ``resting_rank``, GaLoreAdamW for the matrices.
        resting_rank: Rank in which blocks train at rest; 0 freezes them.
        resting_seed: Of this interval's random subspaces and of the noise of rounding; another one for every draw.

    Returns:
        Those of the given parameters that are frozen now.
    """
    optimizers = [*map(unwrapped, optimizers)]
    trains: dict[nn.Parameter, bool] = {}
    for p, trainable in others:
        trains[p] = trains.get(p, False) or trainable  # a tied weight is there twice
    layers = list(layers)
    first: dict[nn.Parameter, int] = {}  # the lowest block that each is in
    for index, layer in enumerate(layers):
        for p in layer.parameters():
            trains[p] = trains.get(p, False) or index in active
            first.setdefault(p, index)
    lowest = min((first[p] for p in first if trains[p]), default=len(first))
    above = (p for p in block_matrices(layers) if not trains[p] and first[p] > lowest)
    held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    resting = {p for p in above if p.size(-1) > resting_rank > 0 and (p in held or not optimizers)}
    for optimizer in optimizers:
        if hasattr(optimizer, "rest"):
            optimizer.rest(resting, resting_rank, resting_seed, among=trains.keys())
        elif not resting.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
            raise UsageError(f"resting_rank: {type(optimizer).__name__} can't train blocks at rest; take GaLoreAdamW, or 0")
    for p, trainable in trains.items():
        p.requires_grad_(trainable or p in resting)
    frozen = {p for p in trains if not p.requires_grad}
    for p in frozen:
        p.grad = None
        for optimizer in optimizers:
            optimizer.state.pop(p, None)
    return frozen


def unfreeze(model: nn.Module) -> None:
    """Lets those parameters train again that a BlockSampler froze, in any run, and none that the user did."""
    for module in model.modules():
        for p in vars(module).pop("frozen_by_sampling", ()):
            p.requires_grad_(True)
        for name in _UNFREEZING:
            vars(module).pop(name, None)


def track_frozen(model: nn.Module) -> set[nn.Parameter]:
    """Unfreezes what an interrupted run left frozen; returns a set, kept on the model, to list what is frozen from now on.

    Layers of peft freeze it again when they have unfrozen all their adapters, as after a pass of DPO's reference model.
    """
    unfreeze(model)
    frozen = language_model_of(model).frozen_by_sampling = set[nn.Parameter]()  # type: ignore[assignment]
    of_peft = (m for m in model.modules() if hasattr(type(m), "enable_adapters") and not isinstance(m, PreTrainedModel))
    for layer in of_peft:
        for name in _UNFREEZING:
            setattr(layer, name, partial(_freeze_again_after, layer, getattr(type(layer), name), frozen))
    return frozen


def _freeze_again_after(layer: Any, change: Callable[..., None], frozen: set[nn.Parameter], *args: Any, **kwargs: Any) -> None:
    change(layer, *args, **kwargs)
    for p in layer.parameters():
        if p in frozen:
            p.requires_grad_(False)
