"""Which strategies sampling and projection work with."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from ows_lightning.errors import UsageError


def require_layerwise(strategy: object) -> None:
    """Refuses strategies that can't freeze and unfreeze weights during a run, or can't project gradients.

    Args:
        strategy: A strategy of Lightning's, or the name of one.

    Raises:
        UsageError: With the strategy to choose instead.
    """
    name = strategy if isinstance(strategy, str) else ""
    if isinstance(strategy, FSDPStrategy) or (name.startswith("fsdp") and name != "fsdp2"):
        reason = "FSDP1 shows the optimizer flat slices of weights, which have no singular vectors; write strategy: fsdp2"
    elif (isinstance(strategy, DDPStrategy) and not getattr(strategy, "averages_changing_blocks", False)) or (
        name.startswith("ddp") and name != "ddp_layerwise"
    ):
        reason = "DDP fixes the set of trained parameters, and averages full gradients; write strategy: ddp_layerwise"
    elif type(strategy).__name__ == "DeepSpeedStrategy" or name.startswith("deepspeed"):
        reason = "DeepSpeed shows the optimizer flat slices of weights, which have no singular vectors; write strategy: fsdp2"
    else:
        return
    raise UsageError(f"trainer.strategy: {name or type(strategy).__name__} can't train sampled or projected weights: {reason}")
