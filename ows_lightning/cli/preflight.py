"""Checks of a run's settings, before its weights are loaded and its devices used."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import UsageError, nearest, not_writable
from ows_lightning.memory.plan_settings import find_dimensions
from ows_lightning.models.kernels import liger_for
from ows_lightning.models.lora import lora_config
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.scores import OutlierScores, architecture_of
from ows_lightning.streaming.options import check_offloading

log = logging.getLogger(__name__)

LOGGED = (
    "train_loss", "val_loss", "val_perplexity", "val_exact_match", "tokens_per_second", "grad_norm", "peak_memory_mb",
    "tokens", "time_s", "renewal_s", "epoch", "step",
)  # fmt: skip
"""The figures that CausalLMModule and Lightning log in a fit, beside the learning rates (``lr-...``)."""

_LAUNCHERS = (SLURMEnvironment, TorchElasticEnvironment, LSFEnvironment, MPIEnvironment)

_BATCHES = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}


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
        trainer: The Trainer's arguments, its callbacks as a list.

    Raises:
        UsageError: Names the setting or the row, and the mend.
    """
    if command == "fit":
        check_precision(model, str(trainer["precision"]))
        check_training(trainer)
        if isinstance(model, CausalLMModule):
            check_step(model.check_optimizer())
    if command in _BATCHES and trainer[_BATCHES[command]] == 0:
        key = _BATCHES[command]
        raise UsageError(f"trainer.{key}: with 0 there is nothing to {command}; give a number above 0, or leave it out")
    check_devices(trainer, torch.cuda.device_count())
    if command in ("fit", "validate", "test", "predict"):
        _check_machines(trainer)
        check_writable("trainer.default_root_dir", Path(trainer["default_root_dir"] or "runs"))
    if command == "fit":
        check_checkpoint(checkpoint)
        _check_monitors(model, data, checkpoint, trainer["callbacks"])
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer["callbacks"]):
            raise UsageError(
                "trainer.callbacks: StochasticWeightAveraging copies the model before its weights are loaded, and would "
                "average nothing; take WeightAveraging or EMAWeightAveraging"
            )
    if isinstance(model, CausalLMModule):
        config = model.check()
        if model.hparams["kernels"] is not None:
            liger_for(config)
        if command == "fit":
            some_are_frozen = sampling is not None or model.hparams["lora"] is not None
            devices = _number_of_devices(trainer["devices"])
            check_offloading(model.hparams, some_are_frozen, devices, str(trainer["strategy"]))
        if sampling is not None and command == "fit":
            sampling.check(config.get_text_config().num_hidden_layers, architecture_of(config))
            _warn_of_scores(sampling, model.hparams["model_name_or_path"])
    if isinstance(data, InstructionDataModule) and command != "export" and getattr(rank_zero_only, "rank", 0) == 0:
        data.check()


def check_training(trainer: Mapping[str, Any]) -> None:
    """Refuses settings with which nothing would train.

    Args:
        trainer: The Trainer's arguments.
    """
    for key in ("max_steps", "max_epochs", "limit_train_batches"):
        if trainer[key] == 0:
            raise UsageError(f"trainer.{key}: with 0 nothing is trained; give a number above 0, or leave it out")
    if (limit := trainer["max_time"]) is not None and not any(str(digit) in "123456789" for digit in str(limit)):
        raise UsageError(f"trainer.max_time: within {limit} nothing is trained; give a longer time, or leave it out")
    if trainer["barebones"]:
        raise UsageError(
            "trainer.barebones: it takes away checkpoints, logs and callbacks, sampling included; leave it out, and switch "
            "off what you don't want by trainer.logger, trainer.enable_checkpointing and trainer.enable_progress_bar"
        )
    if trainer["val_check_interval"] == 0:
        raise UsageError("trainer.val_check_interval: 0 is no interval; to validate never, set trainer.limit_val_batches: 0")
    if trainer["check_val_every_n_epoch"] == 0:
        raise UsageError("trainer.check_val_every_n_epoch: 0 must be at least 1; null counts trainer.val_check_interval alone")


def check_step(optimizer: Optimizer) -> None:
    """Lets an optimizer take a step on two small weights, which one for other uses can't.

    Raises:
        UsageError: It fails, as SparseAdam does on dense gradients.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception as error:  # a user's optimizer may raise anything
        name = type(optimizer).__name__
        raise UsageError(f"model.optimizer: {name} can't train this model ({error}); take AdamW or GaLoreAdamW") from error


def check_devices(trainer: Mapping[str, Any], gpus: int) -> None:
    """Checks strategy, accelerator, devices and precision against the machine.

    Args:
        trainer: The Trainer's arguments.
        gpus: Number of CUDA devices.
    """
    _check_hardware(trainer)
    accelerator, precision = trainer["accelerator"], str(trainer["precision"])
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
    wanted, there = _number_of_devices(trainer["devices"]), 8 * cores if on_cpu else gpus  # a few processes may share a core
    if wanted > there > 0:
        what = f"{cores} CPU cores" if on_cpu else f"{gpus} GPUs"
        raise UsageError(f"trainer.devices: {wanted} are more than the {what} of this machine")


def check_plan(model: LightningModule, sampling: LayerwiseSampling | None, trainer: Mapping[str, Any]) -> None:
    """Checks what a plan is made of as `check_run` does, but for what depends on this machine; the data may be elsewhere.

    Args:
        model: The module, without its weights.
        sampling: The sampling callback.
        trainer: The Trainer's arguments.

    Raises:
        UsageError: Names the setting, and the mend.
    """
    _check_hardware(trainer)
    if isinstance(model, CausalLMModule):
        model.check_optimizer()
        if model.hparams["lora"] is not None:
            lora_config(model.hparams["lora"])
        config, _ = find_dimensions(model.hparams["model_name_or_path"], model.hparams["trust_remote_code"])
        if sampling is not None:
            sampling.check(config.get_text_config().num_hidden_layers, architecture_of(config))


def _check_hardware(trainer: Mapping[str, Any]) -> None:
    for key in ("accumulate_grad_batches", "num_nodes"):
        if trainer[key] < 1:
            raise UsageError(f"trainer.{key}: {trainer[key]} must be at least 1")
    _number_of_devices(trainer["devices"])
    _check_name("strategy", trainer["strategy"], StrategyRegistry.available_strategies(), "auto, ddp_layerwise or fsdp2")
    _check_name("accelerator", trainer["accelerator"], [*AcceleratorRegistry.available_accelerators(), "gpu"], "auto")


def _check_machines(trainer: Mapping[str, Any]) -> None:
    """Refuses several machines of which nothing says where they are: this one would wait for the others, silently."""
    if trainer["num_nodes"] == 1:
        return
    if not (trainer["plugins"] or "MASTER_ADDR" in os.environ or any(launcher.detect() for launcher in _LAUNCHERS)):
        raise UsageError(
            f"trainer.num_nodes: {trainer['num_nodes']}, but nothing says where the other machines are; start the processes "
            "of each by torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )


def cpu_has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are fast on this CPU; on x86 without AVX-512 they take many times as long."""
    return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")


def _check_name(key: str, given: Any, known: Sequence[str], usual: str) -> None:
    if isinstance(given, str) and given not in ("auto", *known):
        raise UsageError(f"trainer.{key}: there is no '{given}'{nearest(given, known) or f'; take {usual}'}")


def _number_of_devices(devices: Any) -> int:
    """The number of devices that are asked for; 0 for all."""
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
    """Checks that a folder can be written to.

    Raises:
        UsageError: It can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # an empty file can be made on a full disk
    except OSError as error:
        raise not_writable(key, folder, error) from error


def check_checkpoint(checkpoint: ModelCheckpoint) -> None:
    """Checks the names of checkpoints, and that their folder can be written to.

    Raises:
        UsageError: A name is wrong, or the folder can't be written to.
    """
    if checkpoint.dirpath and "://" not in str(checkpoint.dirpath):
        check_writable("checkpoint.dirpath", Path(checkpoint.dirpath))
    filename = checkpoint.filename or ""
    if ".." in Path(filename).parts or Path(filename).is_absolute():
        raise UsageError(f"checkpoint.filename: '{checkpoint.filename}' leaves its folder; set checkpoint.dirpath for another")
    try:
        words = [word or "" for text, name, *_ in Formatter().parse(filename) for word in (text, name)]
        words = words if checkpoint.auto_insert_metric_name else words[::2]  # the names of figures are inserted, too
        if not checkpoint.save_last and any("/" in word for word in words):
            raise UsageError(
                f"checkpoint.filename: '{filename}' makes folders, in which `--ckpt_path last` does not look; set "
                "checkpoint.save_last: link, or write '-' for '/'"
            )
        checkpoint.format_checkpoint_name({})
    except UsageError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise UsageError(
            f"checkpoint.filename: '{checkpoint.filename}' is no format of a name ({error}); write figures as {{val_loss:.2f}}"
        ) from error


def check_precision(model: LightningModule, precision: str) -> None:
    """Refuses loss scaling together with gradients that the scaler never sees."""
    if precision not in ("16", "16-mixed") or not isinstance(model, CausalLMModule):
        return
    if isinstance(model.check_optimizer(), GaLoreAdamW):
        raise UsageError(
            "trainer.precision: 16-mixed scales the loss, and what GaLoreAdamW projects in backward is never unscaled; "
            "set trainer.precision: bf16-mixed"
        )


def _check_monitors(
    model: LightningModule, data: LightningDataModule, checkpoint: ModelCheckpoint, callbacks: list[Callback]
) -> None:
    """Refuses to monitor, or to name files by, figures that are never logged (only if all that logs is ours)."""
    alone = type(model) is CausalLMModule and all(
        type(callback).__module__.startswith(("lightning.", "ows_lightning.")) for callback in callbacks
    )
    figures = [("checkpoint.monitor", checkpoint.monitor)]
    figures += [(f"trainer.callbacks.{type(one).__name__}.monitor", getattr(one, "monitor", None)) for one in callbacks]
    fields = {field for _, field, _, _ in Formatter().parse(checkpoint.filename or "")} - {"epoch", "step"}
    figures += [("checkpoint.filename", field) for field in sorted(filter(None, fields))]
    names = ", ".join(LOGGED)
    for key, figure in figures:
        if alone and figure and figure not in LOGGED and not figure.startswith("lr-"):
            raise UsageError(f"{key}: no figure '{figure}' is logged{nearest(figure, LOGGED) or f'; choose from {names}'}")
        if figure and figure.startswith("val_") and isinstance(data, InstructionDataModule):
            _check_held_out(key, figure, data)


def _check_held_out(key: str, figure: str, data: InstructionDataModule) -> None:
    if not (data.eval_dataset or data.val_size):
        raise UsageError(f"{key}: {figure} needs held-out rows; set data.val_size or data.eval_dataset, or monitor train_loss")
    if figure == "val_exact_match" and not data.exact_match_rows:
        raise UsageError(f"{key}: {figure} needs answers to compare; set data.exact_match_rows, or monitor val_loss")


def _warn_of_scores(sampling: LayerwiseSampling, model: str) -> None:
    if sampling.scores is not None and Path(of := OutlierScores.load(Path(sampling.scores)).model).name != Path(model).name:
        log.warning("sampling.scores: '%s' holds the scores of '%s', and the model is '%s'", sampling.scores, of, model)
