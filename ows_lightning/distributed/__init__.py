"""Training on several processes; importing it registers the strategies ``fsdp2`` and ``ddp_layerwise`` with Lightning."""

import atexit
import contextlib
from datetime import timedelta

import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry

from ows_lightning.distributed.ddp import LayerwiseDDPStrategy
from ows_lightning.distributed.fsdp2 import FSDP2Strategy


def destroy_process_group(wait_for_others: bool = True) -> None:
    """Leaves the process group, if there is one, so that its threads have ended before the process does.

    It waits for the others first, half a minute at most, since rank 0 holds the store, which the last one may still ask;
    not after an error, which they may not have met.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    is_gloo = dist.get_backend() == "gloo"
    if is_gloo and wait_for_others:
        with contextlib.suppress(RuntimeError):  # one of them has failed, and says so itself
            dist.monitored_barrier(timeout=timedelta(seconds=30))
    if is_gloo or wait_for_others:  # after an error, NCCL would wait for what never comes
        dist.destroy_process_group()


StrategyRegistry.register("fsdp2", FSDP2Strategy, override=True)
StrategyRegistry.register("ddp_layerwise", LayerwiseDDPStrategy, override=True)
atexit.register(destroy_process_group, False)  # gloo's threads must end before the interpreter does
