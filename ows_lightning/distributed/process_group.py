"""How a process leaves the group that it trained in."""

from __future__ import annotations

import atexit
import contextlib
from datetime import timedelta

import torch.distributed as dist

_BARRIER_TIMEOUT = timedelta(seconds=30)


def leave_at_exit() -> None:
    """Lets this process leave its group, if it is in one still, before the interpreter ends: gloo's threads must end first."""
    atexit.unregister(leave_process_group)
    atexit.register(leave_process_group, False)


def leave_process_group(together: bool = True) -> None:
    """Leaves the process group, if there is one, so that its threads have ended before the process does.

    Not after an error, which the others may not have met, it waits for them first (``together``), half a minute at most, so
    that none loses the store of the first while it still asks.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":
        if together:
            with contextlib.suppress(RuntimeError):  # one of them has ended otherwise, and says so itself
                dist.monitored_barrier(timeout=_BARRIER_TIMEOUT)
        dist.destroy_process_group()
    elif together:
        dist.destroy_process_group()  # after an error, NCCL would wait for what never comes
