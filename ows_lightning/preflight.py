"""What is wrong with a run's settings, found before its weights are loaded and its devices taken."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import UsageError
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.scores import OutlierScores, architecture_of

log = logging.getLogger(__name__)


def check_run(
    command: str,
    model: LightningModule,
    data: LightningDataModule,
    sampling: LayerwiseSampling | None,
    checkpoint: ModelCheckpoint,
    trainer: Mapping[str, Any],
) -> None:
    """Checks what a command is about to use; the first thing that is wrong ends it.

    Args:
        command: ``fit``, ``score``, ...
        model: The module, without its weights.
        data: The data module.
        sampling: The sampling callback.
        checkpoint: The checkpoint callback.
        trainer: The Trainer's arguments.

    Raises:
        UsageError: Names the setting or the row, and the mend.
    """
    if command == "fit":
        check_precision(model, str(trainer["precision"]))
    check_devices(trainer, torch.cuda.device_count())
    if command == "fit":
        check_writable("trainer.default_root_dir", Path(trainer["default_root_dir"] or "runs"))
        if isinstance(data, InstructionDataModule):
            _check_monitor(checkpoint, data)
    if isinstance(model, CausalLMModule):
        config = model.check()
        if sampling is not None and command == "fit":
            sampling.check(config.get_text_config().num_hidden_layers, architecture_of(config))
            _warn_of_scores(sampling, model.hparams["model_name_or_path"])
    if isinstance(data, InstructionDataModule) and command != "export" and getattr(rank_zero_only, "rank", 0) == 0:
        data.check()


def check_devices(trainer: Mapping[str, Any], gpus: int) -> None:
    """Checks accelerator, devices and precision against the machine.

    Args:
        trainer: The Trainer's arguments.
        gpus: Number of CUDA devices.
    """
    if (micro_batches := trainer["accumulate_grad_batches"]) < 1:
        raise UsageError(f"trainer.accumulate_grad_batches: {micro_batches} must be at least 1")
    accelerator, devices, precision = trainer["accelerator"], trainer["devices"], str(trainer["precision"])
    if accelerator in ("gpu", "cuda") and not gpus and not (accelerator == "gpu" and torch.backends.mps.is_available()):
        raise UsageError(
            f"trainer.accelerator: {accelerator}, but torch sees no GPU; set trainer.accelerator: cpu, or mend the driver"
        )
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not gpus and not torch.backends.mps.is_available())
    if on_cpu and precision in ("16", "16-mixed", "16-true"):
        raise UsageError(f"trainer.precision: {precision} needs a GPU; set trainer.precision: bf16-true or bf16-mixed")
    if on_cpu and precision.startswith("bf16") and not cpu_has_bfloat16():
        log.warning(
            "trainer.precision: %s is slow on this CPU, which has no bfloat16 arithmetic; 32-true is faster", precision
        )
    cores = os.cpu_count() or 1
    wanted, there = _number_of_devices(devices), 8 * cores if on_cpu else gpus  # a few processes may share a core
    if wanted > there > 0:
        what = f"{cores} CPU cores" if on_cpu else f"{gpus} GPUs"
        raise UsageError(f"trainer.devices: {wanted} are more than the {what} of this machine")


def cpu_has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are fast on this CPU; without AVX-512, an x86 one takes many times as long."""
    return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")


def _number_of_devices(devices: Any) -> int:
    """How many devices are asked for; 0 for all there are."""
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part]
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if devices == "auto" or str(devices) == "-1":
        return 0
    if not str(devices).isdigit() or int(devices) < 1:
        raise UsageError(f"trainer.devices: '{devices}' is no number of devices; give 1 or more, a list of indices, or auto")
    return int(devices)


def check_writable(key: str, folder: Path) -> None:
    """Makes sure of a folder to write to.

    Raises:
        UsageError: It can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{key}: can't write to '{folder}' ({error.strerror}); choose another folder") from error


def check_precision(model: LightningModule, precision: str) -> None:
    """Refuses loss scaling with gradients that the scaler never sees."""
    if precision not in ("16", "16-mixed") or not isinstance(model, CausalLMModule):
        return
    if isinstance(model.check_optimizer(), GaLoreAdamW):
        raise UsageError(
            "trainer.precision: 16-mixed scales the loss, and what GaLoreAdamW projects in backward is never unscaled; "
            "set trainer.precision: bf16-mixed"
        )


def _check_monitor(checkpoint: ModelCheckpoint, data: InstructionDataModule) -> None:
    if (checkpoint.monitor or "").startswith("val_") and not (data.eval_dataset or data.val_size):
        raise UsageError(
            f"checkpoint.monitor: {checkpoint.monitor} needs held-out rows; set data.val_size or data.eval_dataset, "
            "or checkpoint.monitor: null"
        )


def _warn_of_scores(sampling: LayerwiseSampling, model: str) -> None:
    if sampling.scores is not None and Path(of := OutlierScores.load(Path(sampling.scores)).model).name != Path(model).name:
        log.warning("sampling.scores: '%s' holds the scores of '%s', and the model is '%s'", sampling.scores, of, model)
