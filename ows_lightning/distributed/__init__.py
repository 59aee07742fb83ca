"""Training on several processes; importing it registers the strategies ``fsdp2`` and ``ddp_layerwise`` with Lightning."""

from lightning.pytorch.strategies import StrategyRegistry

from ows_lightning.distributed.ddp import LayerwiseDDPStrategy
from ows_lightning.distributed.fsdp2 import FSDP2Strategy

StrategyRegistry.register("fsdp2", FSDP2Strategy, override=True)
StrategyRegistry.register("ddp_layerwise", LayerwiseDDPStrategy, override=True)
