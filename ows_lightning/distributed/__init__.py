"""Training on several processes; importing it registers the strategies ``fsdp2`` and ``ddp_layerwise`` with Lightning."""

from lightning.pytorch.strategies import StrategyRegistry

from ows_lightning.distributed.ddp import LayerwiseDDPStrategy
from ows_lightning.distributed.fsdp2 import FSDP2Strategy

for name, strategy, description in (
    ("fsdp2", FSDP2Strategy, "FSDP2: weights, gradients and optimizer state sharded over all processes"),
    ("ddp_layerwise", LayerwiseDDPStrategy, "Data parallelism with projected gradients and changing trained blocks"),
):
    if name not in StrategyRegistry:
        StrategyRegistry.register(name, strategy, description=description)

__all__ = ["FSDP2Strategy", "LayerwiseDDPStrategy"]
