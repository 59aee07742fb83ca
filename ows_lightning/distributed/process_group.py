"""How a process leaves the process group that it trained in."""

import contextlib
from datetime import timedelta

import torch.distributed as dist

_BARRIER_TIMEOUT = timedelta(seconds=30)


def destroy_process_group(wait_for_others: bool = True) -> None:
    """Leaves the process group, if there is one, so that its threads have ended before the process does.

    It waits for the others first, half a minute at most, since rank 0 holds the store, which the last one may still ask;
    not after an error, which they may not have met.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":
        if wait_for_others:
            with contextlib.suppress(RuntimeError):  # one of them has failed, and says so itself
                dist.monitored_barrier(timeout=_BARRIER_TIMEOUT)
        dist.destroy_process_group()
    elif wait_for_others:
        dist.destroy_process_group()  # after an error, NCCL would wait for what never comes
