"""Callbacks that tests put into a run, to see on each rank what users can't, and to be at hand at the right moment."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ows_lightning.models.decoder import decoder_layers

KINDS = ("allreduce", "reduce_scatter", "allgather", "broadcast")


class Probe(Callback):
    """Writes each step's loss and, by kind, how many elements this rank gave to be communicated in it.

    Args:
        folder: Where to write ``rank0.json`` and so on.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.losses: list[float] = []
        self.sent: list[dict[str, int]] = []
        self._traffic = _Traffic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == len(self.losses) and batch_idx % trainer.accumulate_grad_batches == 0:
            self._traffic = _Traffic()
        self._traffic.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._traffic.__exit__(None, None, None)
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train_loss"]))
            self.sent.append(self._traffic.sent)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        frozen = [name for name, p in pl_module.named_parameters() if not p.requires_grad]
        state = trainer.optimizers[0].state
        local = {
            name: [list(_local(v).shape) for v in state[p].values()] for name, p in pl_module.named_parameters() if p in state
        }
        content = {"losses": self.losses, "sent": self.sent, "frozen": frozen, "state": local}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(content))


class Signalled(Callback):
    """Sends a signal to the last rank, once.

    Args:
        during: ``validation``, that before training; ``scoring``; or ``step 5``, between its first backward and its end.
        number: Of the signal.
    """

    def __init__(self, during: str, number: int = signal.SIGTERM.value) -> None:
        self.during, self.number = during, number

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.during == "validation":
            self._send(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def once(*_: Any) -> None:
            hook.remove()
            self._send(trainer)

        if self.during == "scoring":
            hook = decoder_layers(pl_module)[0].register_forward_pre_hook(once)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.during == f"step {trainer.global_step + 1}":
            self.during = ""
            self._send(trainer)

    def _send(self, trainer: Trainer) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), self.number)


MOMENTS = (
    "setup", "on_fit_start", "on_sanity_check_start", "on_validation_start", "on_validation_end", "on_train_start",
    "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad",
    "on_train_batch_end", "on_save_checkpoint", "on_train_end", "on_fit_end", "teardown",
)  # fmt: skip
"""Hooks of a callback in which a process may be killed."""


KILLED = "killed here"


class Kill(Callback):
    """Sends SIGKILL to its own process, which says so.

    Args:
        moment: In which hook.
        step: After how many optimizer steps; None after any number.
        rank: Which process, or None for each.
        delay: Seconds from there.
    """

    def __init__(self, moment: str, step: int | None = None, rank: int | None = None, delay: float = 0) -> None:
        def kill(trainer: Trainer, *more: Any, **named: Any) -> None:
            if step in (None, trainer.global_step) and rank in (None, trainer.global_rank):
                timer = threading.Timer(delay, end)
                timer.daemon = True
                timer.start() if delay else end()

        def end() -> None:
            os.write(1, f"{KILLED}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, moment, kill)


class KeepsAPath(Callback):
    """Its state can be written, and not be read again."""

    def state_dict(self) -> dict[str, Any]:
        return {"folder": Path("here")}


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        if "c10d" in namespace:
            kind = next((kind for kind in KINDS if kind in name.replace("all_", "all")), name)
            # An all-gather's and a reduce-scatter's first argument is the output.
            given = args[1] if name.startswith(("_allgather_base", "_reduce_scatter_base")) else args[0]
            elements = sum(t.numel() for t in tree_leaves(given) if isinstance(t, Tensor))
            self.sent[kind] = self.sent.get(kind, 0) + elements
        return func(*args, **(kwargs or {}))


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else torch.as_tensor(tensor)
