"""Training on several processes; importing it registers the strategies ``fsdp2`` and ``ddp_layerwise`` with Lightning."""

import atexit

from lightning.pytorch.strategies import StrategyRegistry

from ows_lightning.distributed.ddp import LayerwiseDDPStrategy
from ows_lightning.distributed.fsdp2 import FSDP2Strategy
from ows_lightning.distributed.process_group import destroy_process_group

StrategyRegistry.register("fsdp2", FSDP2Strategy, override=True)
StrategyRegistry.register("ddp_layerwise", LayerwiseDDPStrategy, override=True)
atexit.register(destroy_process_group, False)  # gloo's threads must end before the interpreter does
