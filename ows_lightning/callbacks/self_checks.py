"""Checks at a run's end for the three ways in which the paper's method fails (arXiv 2405.18380)."""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from ows_lightning.callbacks.run_folder import run_folder
from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.sharding import local
from ows_lightning.report.run import RunRecord
from ows_lightning.sampling.callback import LayerwiseSampling

log = logging.getLogger(__name__)
POOR_LOSS_RATIO = 0.95  # a loss that ends above this share of where it began is a poor result
LISA_STATE_RATIO = 0.9  # and an optimizer's state above this share of LISA's saves nothing
UNIFORM_RATIO = 0.95  # draws among blocks as even as this are LISA's
MIN_STEPS = 20  # fewer tell nothing about learning
LISA_BLOCKS = 2


class StateBytes(NamedTuple):
    """Bytes of optimizer state on this process: what is held, and what LISA would hold of the same model."""

    held: int
    for_lisa: int


class SelfChecks(Callback):
    """Warns at a run's end if the loss hardly fell, the state is no smaller than LISA's, or draws are nearly uniform."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sampling, folder = LayerwiseSampling.of(trainer), run_folder(trainer)  # asks all ranks
        if sampling is None or not isinstance(pl_module, CausalLMModule) or not trainer.is_global_zero:
            return
        try:
            losses = [] if trainer.fast_dev_run else RunRecord.read(folder).series("train_loss")[1]  # type: ignore[attr-defined]
        except UsageError:  # without a logger, as in a development run, there may be no curves
            losses = []
        projecting = next((o for o in trainer.optimizers if isinstance(o, GaLoreAdamW)), None)
        states = None if projecting is None else measure_state_bytes(projecting, pl_module)
        found = [check_loss(losses, states), check_memory(states)]
        if sampling.probabilities is not None and sampling.distribution in ("outlier", "window"):
            found.append(check_draws(sampling.probabilities.tolist()))
        for line in filter(None, found):
            log.warning("Self-check: %s", line)
        if not any(found):
            log.info("Self-checks: none of the method's known failures shows in this run's figures")


def check_loss(losses: Sequence[float], states: StateBytes | None) -> str | None:
    """Compares the mean training loss (nats) of the last tenth of the steps with that of the first; says what to try."""
    if len(losses) < MIN_STEPS:
        return None
    tenth = len(losses) // 10
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    if last <= POOR_LOSS_RATIO * first:
        return None
    text = f"poor result, the training loss went from {first:.3f} to {last:.3f}; try other learning rates"
    if states is not None and states.held > states.for_lisa / 2:
        return f"{text}, then more blocks, resting_rank or a higher model.rank: memory is not short ({_state_text(states)})"
    return text


def check_memory(states: StateBytes | None) -> str | None:
    """Compares the optimizer's state with what LISA would hold."""
    if states is None or states.held < LISA_STATE_RATIO * states.for_lisa:
        return None
    hint = "lower model.rank or sampling.activated_layers, or leave embeddings and head out of sampling.always_train"
    return f"memory as LISA's ({_state_text(states)}); {hint}"


def check_draws(probabilities: Sequence[float]) -> str | None:
    """Checks whether blocks are drawn about uniformly, as LISA does, by the exponential of the distribution's entropy."""
    blocks, count = math.exp(-sum(p * math.log(p) for p in probabilities if p > 0)), len(probabilities)
    if blocks < UNIFORM_RATIO * count:
        return None
    even = f"draws are as even as among {blocks:.1f} of {count} blocks"
    return f"expect no gain over LISA: outliers hardly tell blocks apart ({even}); try another sampling.threshold"


def measure_state_bytes(optimizer: Optimizer, module: CausalLMModule) -> StateBytes:
    """Measures an optimizer's state, and computes LISA's: two moments, in the weights' dtype, of two blocks and the rest."""
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    held = sum(local(value).nbytes for value in state if isinstance(value, torch.Tensor))
    layers = decoder_layers(module)
    within = set(layers.parameters())
    block = max(sum(local(p).nbytes for p in layer.parameters()) for layer in layers)
    others = sum(local(p).nbytes for p in module.parameters() if p not in within)
    return StateBytes(held, 2 * (others + min(LISA_BLOCKS, len(layers)) * block))


def _state_text(states: StateBytes) -> str:
    return f"{states.held / 1e6:.4g} MB of optimizer state, LISA's would be {states.for_lisa / 1e6:.4g} MB"
