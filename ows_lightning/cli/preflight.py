"""Checks of a command's settings before weights are loaded and devices used: one line names the setting and the mend."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.environments import LSFEnvironment, MPIEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import UsageError, nearest, not_writable
from ows_lightning.memory.plan_settings import find_dimensions, number_of_devices
from ows_lightning.models.lora import lora_config
from ows_lightning.models.recomputation import liger_for
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

_LEAST = {
    **dict.fromkeys(("max_steps", "max_epochs", "num_sanity_val_steps", "save_top_k"), -1),
    **dict.fromkeys(("log_every_n_steps", "accumulate_grad_batches", "num_nodes"), 1),
    **dict.fromkeys(
        (
            "eps", "weight_decay", "momentum", "dampening", "seed", "num_workers", "gradient_clip_val", "overfit_batches",
            "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "min_steps",
            "min_epochs", "reload_dataloaders_every_n_epochs", "every_n_train_steps",
        ),
        0,
    ),
}  # fmt: skip
"""The least value of a number, by the last word of its key. What has a class of ours for its owner is checked there."""

_MORE = "give a number above 0, or leave it out"
_NOT_ZERO = {
    "fit": {
        **dict.fromkeys(("max_steps", "max_epochs", "limit_train_batches"), f"trains nothing; {_MORE}"),
        "val_check_interval": "is no interval; to validate never, set trainer.limit_val_batches: 0",
        "check_val_every_n_epoch": "is no interval; null counts trainer.val_check_interval alone",
    },
    "validate": {"limit_val_batches": f"leaves nothing to validate; {_MORE}"},
    "test": {"limit_test_batches": f"leaves nothing to test; {_MORE}"},
    "predict": {"limit_predict_batches": f"leaves nothing to predict; {_MORE}"},
}
"""By command: the Trainer's arguments with which 0 makes it useless, and what 0 does."""

_LAUNCHERS = (SLURMEnvironment, TorchElasticEnvironment, LSFEnvironment, MPIEnvironment)


def check_numbers(config: Mapping[str, Any], trains: bool) -> None:
    """Checks all numbers of a command's parsed config, those of optimizers and callbacks included.

    Args:
        config: The config of one command.
        trains: Whether the command trains, so that a learning rate of 0 is a mistake.

    Raises:
        UsageError: One is not finite, beyond 64 bits, or out of its range; names its key.
    """
    for key, value in numbers(config):
        name = key.rpartition(".")[2]
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key}: {value} is not finite; give a number, or leave the key out")
        if not -(2**63) <= value < 2**63:
            raise UsageError(f"{key}: {value:.3g} is beyond 64 bits; give a smaller number")
        if value < _LEAST.get(name, -math.inf):
            raise UsageError(f"{key}: {value} is out of range; it must be at least {_LEAST[name]}")
        if name == "betas" and not 0 <= value < 1:
            raise UsageError(f"{key}: {value} is out of range; both must be at least 0 and below 1")
        if trains and key.startswith("model.") and name in ("lr", "learning_rate") and value <= 0:
            raise UsageError(f"{key}: {value} must be above 0; with it nothing would train")


def numbers(config: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Yields the key and the value of every number, keys as a user writes them: without ``init_args``."""
    if hasattr(config, "as_dict"):
        config = config.as_dict()
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from numbers(value, key if name in ("init_args", "dict_kwargs") else f"{key}.{name}".lstrip("."))
    elif isinstance(config, Sequence) and not isinstance(config, (str, bytes)):
        for value in config:
            yield from numbers(value, key)
    elif isinstance(config, (int, float)) and not isinstance(config, bool):
        yield key, config


def check_run(
    command: str,
    model: LightningModule,
    data: LightningDataModule,
    sampling: LayerwiseSampling | None,
    checkpoint: ModelCheckpoint,
    trainer: Mapping[str, Any],
) -> None:
    """Checks what a command is about to use: the module without its weights, the Trainer's arguments, the first rows.

    Raises:
        UsageError: Names the setting or the row, and the mend.
    """
    for key, what in _NOT_ZERO.get(command, {}).items():
        if trainer[key] == 0:
            raise UsageError(f"trainer.{key}: 0 {what}")
    if command == "fit":
        _check_training(model, trainer)
    check_devices(trainer, torch.cuda.device_count())
    if command in _NOT_ZERO:  # those that write into a run's folder
        _check_machines(trainer)
        check_writable("trainer.default_root_dir", Path(trainer["default_root_dir"] or "runs"))
    if command == "fit":
        check_checkpoint(checkpoint)
        _check_monitors(model, data, checkpoint, trainer["callbacks"])
    if isinstance(model, CausalLMModule):
        config = model.check()
        if model.hparams["kernels"] is not None:
            liger_for(config)
        if command == "fit":
            some_are_frozen = sampling is not None or model.hparams["lora"] is not None
            devices, strategy = number_of_devices(trainer["devices"]), str(trainer["strategy"])
            check_offloading(model.hparams, some_are_frozen, devices, strategy)
            if sampling is not None:
                sampling.check(config.get_text_config().num_hidden_layers, architecture_of(config))
                _warn_of_scores(sampling, model.hparams["model_name_or_path"])
    if isinstance(data, InstructionDataModule) and command != "export" and getattr(rank_zero_only, "rank", 0) == 0:
        data.check()


def check_plan(model: LightningModule, sampling: LayerwiseSampling | None, trainer: Mapping[str, Any]) -> None:
    """Checks what a plan is made of as `check_run` does, but for what depends on this machine; the data may be elsewhere."""
    _check_names(trainer)
    if isinstance(model, CausalLMModule):
        model.check_optimizer()
        if model.hparams["lora"] is not None:
            lora_config(model.hparams["lora"])
        config, _ = find_dimensions(model.hparams["model_name_or_path"], model.hparams["trust_remote_code"])
        if sampling is not None:
            sampling.check(config.get_text_config().num_hidden_layers, architecture_of(config))


def _check_training(model: LightningModule, trainer: Mapping[str, Any]) -> None:
    """Refuses settings with which a fit would train nothing, or something else than is meant."""
    if (limit := trainer["max_time"]) is not None and not any(str(digit) in "123456789" for digit in str(limit)):
        raise UsageError(f"trainer.max_time: within {limit} nothing is trained; give a longer time, or leave it out")
    if trainer["barebones"]:
        raise UsageError(
            "trainer.barebones: it takes away checkpoints, logs and callbacks, sampling included; leave it out, and switch "
            "off what you don't want by trainer.logger, trainer.enable_checkpointing and trainer.enable_progress_bar"
        )
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer["callbacks"]):
        raise UsageError(
            "trainer.callbacks: StochasticWeightAveraging copies the model before its weights are loaded, and would "
            "average nothing; take WeightAveraging or EMAWeightAveraging"
        )
    if isinstance(model, CausalLMModule):
        optimizer = model.check_optimizer()
        if isinstance(optimizer, GaLoreAdamW) and str(trainer["precision"]) in ("16", "16-mixed"):
            raise UsageError(
                "trainer.precision: 16-mixed scales the loss, and what GaLoreAdamW projects in backward is never unscaled; "
                "set trainer.precision: bf16-mixed"
            )
        _try_step(optimizer)


def _try_step(optimizer: Optimizer) -> None:
    """Takes a step on two small weights, which optimizers for other uses can't: SparseAdam refuses dense gradients."""
    try:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception as error:  # a user's optimizer may raise anything
        name = type(optimizer).__name__
        raise UsageError(f"model.optimizer: {name} can't train this model ({error}); take AdamW or GaLoreAdamW") from error


def check_devices(trainer: Mapping[str, Any], gpus: int) -> None:
    """Checks strategy, accelerator, devices and precision against the machine, which has so many GPUs."""
    _check_names(trainer)
    accelerator, precision = trainer["accelerator"], str(trainer["precision"])
    mps = torch.backends.mps.is_available()
    if accelerator in ("gpu", "cuda") and not gpus and not (accelerator == "gpu" and mps):
        raise UsageError(
            f"trainer.accelerator: {accelerator}, but torch sees no GPU; set trainer.accelerator: cpu, or mend the driver"
        )
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not gpus and not mps)
    if on_cpu and precision in ("16", "16-mixed", "16-true"):
        raise UsageError(f"trainer.precision: {precision} needs a GPU; set trainer.precision: bf16-true or bf16-mixed")
    if on_cpu and precision.startswith("bf16") and not cpu_has_bfloat16():
        what = "is slow on this CPU, which has no bfloat16 arithmetic; 32-true is faster"
        log.warning("trainer.precision: %s %s", precision, what)
    cores = os.cpu_count() or 1
    wanted, there = number_of_devices(trainer["devices"]), 8 * cores if on_cpu else gpus  # a few processes may share a core
    if wanted > there > 0:
        what = f"{cores} CPU cores" if on_cpu else f"{gpus} GPUs"
        raise UsageError(f"trainer.devices: {wanted} are more than the {what} of this machine")


def cpu_has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are fast on this CPU; on x86 without AVX-512 they take many times as long."""
    return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")


def _check_names(trainer: Mapping[str, Any]) -> None:
    number_of_devices(trainer["devices"])
    accelerators = [*AcceleratorRegistry.available_accelerators(), "gpu"]
    for key, known, usual in (
        ("strategy", StrategyRegistry.available_strategies(), "auto, ddp_layerwise or fsdp2"),
        ("accelerator", accelerators, "auto"),
    ):
        given = trainer[key]
        if isinstance(given, str) and given not in ("auto", *known):
            raise UsageError(f"trainer.{key}: there is no '{given}'{nearest(given, known) or f'; take {usual}'}")


def _check_machines(trainer: Mapping[str, Any]) -> None:
    """Refuses several machines of which nothing says where they are: this one would wait for the others, silently."""
    known = trainer["plugins"] or "MASTER_ADDR" in os.environ or any(launcher.detect() for launcher in _LAUNCHERS)
    if trainer["num_nodes"] > 1 and not known:
        raise UsageError(
            f"trainer.num_nodes: {trainer['num_nodes']}, but nothing says where the other machines are; start the processes "
            "of each by torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )


def check_writable(key: str, folder: Path) -> None:
    """Checks that a folder, which the key names, can be made and written to; raises a UsageError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # an empty file can be made on a full disk
    except OSError as error:
        raise not_writable(key, folder, error) from error


def check_checkpoint(checkpoint: ModelCheckpoint) -> None:
    """Checks the names of checkpoints, and that their folder can be written to; raises a UsageError if not."""
    if checkpoint.dirpath and "://" not in str(checkpoint.dirpath):
        check_writable("checkpoint.dirpath", Path(checkpoint.dirpath))
    name = checkpoint.filename or ""
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise UsageError(f"checkpoint.filename: '{name}' leaves its folder; set checkpoint.dirpath for another")
    try:
        texts, fields, *_ = zip(*Formatter().parse(name), strict=True) if name else ((), ())
        checkpoint.format_checkpoint_name({})
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise UsageError(
            f"checkpoint.filename: '{name}' is no format of a name ({error}); write figures as {{val_loss:.2f}}"
        ) from error
    inserted = filter(None, fields) if checkpoint.auto_insert_metric_name else ()  # the names of figures, beside their values
    if not checkpoint.save_last and any("/" in word for word in (*texts, *inserted)):
        raise UsageError(
            f"checkpoint.filename: '{name}' makes folders, in which `--ckpt_path last` does not look; set "
            "checkpoint.save_last: link, or write '-' for '/'"
        )


def _check_monitors(
    model: LightningModule, data: LightningDataModule, checkpoint: ModelCheckpoint, callbacks: list[Callback]
) -> None:
    """Refuses to monitor, or to name files by, figures that are never logged (as far as all that logs is known)."""
    modules = [type(part).__module__ for part in (model, *callbacks)]
    known = all(module.startswith(("lightning.", "ows_lightning.")) for module in modules)
    figures = [("checkpoint.monitor", checkpoint.monitor)]
    figures += [(f"trainer.callbacks.{type(one).__name__}.monitor", getattr(one, "monitor", None)) for one in callbacks]
    fields = {field for _, field, _, _ in Formatter().parse(checkpoint.filename or "")} - {"epoch", "step"}
    figures += [("checkpoint.filename", field) for field in sorted(filter(None, fields))]
    for key, figure in figures:
        if known and figure and figure not in LOGGED and not figure.startswith("lr-"):
            mend = nearest(figure, LOGGED) or f"; choose from {', '.join(LOGGED)}"
            raise UsageError(f"{key}: no figure '{figure}' is logged{mend}")
        if not (figure and figure.startswith("val_") and isinstance(data, InstructionDataModule)):
            continue
        if not (data.eval_dataset or data.val_size):
            mend = "set data.val_size or data.eval_dataset, or monitor train_loss"
            raise UsageError(f"{key}: {figure} needs validation rows; {mend}")
        if figure == "val_exact_match" and not data.exact_match_rows:
            mend = "set data.exact_match_rows, or monitor val_loss"
            raise UsageError(f"{key}: {figure} needs answers to compare; {mend}")


def _warn_of_scores(sampling: LayerwiseSampling, model: str) -> None:
    if sampling.scores is not None and Path(of := OutlierScores.load(Path(sampling.scores)).model).name != Path(model).name:
        log.warning("sampling.scores: '%s' holds the scores of '%s', and the model is '%s'", sampling.scores, of, model)
