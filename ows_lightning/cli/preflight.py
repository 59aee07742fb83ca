"""Checks of a command's settings before weights are loaded and devices used: one line names the setting and the fix.

What jsonargparse, Lightning's Trainer and torch's optimizers refuse by themselves is left to them.
"""

import inspect
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc import locate
from string import Formatter
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only

from ows_lightning.callbacks.run_checkpoint import RunCheckpoint
from ows_lightning.cli.parser import SECTIONS
from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import UsageError, did_you_mean, not_writable, refuse_url
from ows_lightning.fit.checks import check_callbacks, check_offloading, check_strategy, check_unscaled
from ows_lightning.fit.duration import accumulation_scheduler, time_is_up
from ows_lightning.memory.plan_settings import find_model_config, number_of_devices
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.execution import liger_for
from ows_lightning.models.pretrained import meta_model
from ows_lightning.module import CausalLMModule
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.scores import BlockScores, architecture_of

log = logging.getLogger(__name__)
LOGGED_METRICS = (
    "train_loss", "val_loss", "val_perplexity", "val_exact_match", "tokens_per_second", "grad_norm", "peak_memory_mb",
    "tokens", "target_tokens", "time_s", "renewal_s", "epoch", "step",
)  # fmt: skip
"""The metrics that CausalLMModule and Lightning log in a fit, beside the learning rates (``lr-...``)."""
_BEST = {"train_loss": "min", "val_loss": "min", "val_perplexity": "min", "val_exact_match": "max", "tokens_per_second": "max"}

_MAX_INT64 = 2**63 - 1
_RANGES = {
    "trainer.accumulate_grad_batches": (1, _MAX_INT64), "trainer.num_nodes": (1, _MAX_INT64),
    "trainer.gradient_clip_val": (0, _MAX_INT64), "trainer.num_sanity_val_steps": (-1, _MAX_INT64),
    "sampling.seed": (0, 2**32 - 1), "seed_everything": (0, 2**32 - 1),
}  # fmt: skip
"""The least and the greatest value of a number where nothing else checks it."""

_RUN_COMMANDS = {
    "fit": ("max_steps", "max_epochs", "limit_train_batches", "val_check_interval", "check_val_every_n_epoch"),
    "validate": ("limit_val_batches",), "test": ("limit_test_batches",), "predict": ("limit_predict_batches",),
}  # fmt: skip
"""The commands that write into a run's folder, each with the Trainer's arguments that can't be 0."""


def check_settings(config: Mapping[str, Any], trains: bool) -> None:
    """Checks the numbers and names of a command's parsed config; if it trains, a learning rate of 0 is a mistake, too."""
    for key, value in iter_numbers(config):
        least, most = _RANGES.get(key, (-_MAX_INT64, _MAX_INT64))
        if not least <= value <= most:  # nor is NaN
            raise UsageError(f"{key}: {value:.7g} is out of range; give a number from {least} to {most}")
        if trains and key.startswith("model.") and key.endswith((".lr", ".learning_rate")) and value <= 0:
            raise UsageError(f"{key}: {value} must be above 0; with it nothing would train")
    for section, kind in SECTIONS.items():
        described = config[section] or {}
        given, own = described.get("init_args", described) or {}, locate(str(described.get("class_path", "")))
        if isinstance(own, type) and not issubclass(own, kind):
            continue  # another class, whose parameters mean something else
        for name, parameter in inspect.signature(own if isinstance(own, type) else kind).parameters.items():
            takes_none = parameter.default is None or any(word in str(parameter.annotation) for word in ("None", "Optional"))
            if not takes_none and name in given and given[name] is None:
                raise UsageError(f"{section}.{name}: nothing is given; write a value, or leave the key out")
    trainer = config["trainer"]
    if "://" in str(folder := trainer["default_root_dir"]):
        raise UsageError(f"trainer.default_root_dir: '{folder}' is an address; give a folder, and that as checkpoint.dirpath")
    number_of_devices(trainer["devices"])
    for key, known, usual in (
        ("strategy", StrategyRegistry.available_strategies(), "auto, ddp_layerwise or fsdp2"),
        ("accelerator", [*AcceleratorRegistry.available_accelerators(), "gpu"], "auto"),
    ):
        name = trainer[key]
        if isinstance(name, str) and name not in ("auto", *known):
            raise UsageError(f"trainer.{key}: there is no '{name}'{did_you_mean(name, known) or f'; take {usual}'}")


def iter_numbers(config: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Yields the key and the value of every number, keys as a user writes them: without ``init_args``."""
    if hasattr(config, "as_dict"):
        config = config.as_dict()
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from iter_numbers(value, key if name in ("init_args", "dict_kwargs") else f"{key}.{name}".lstrip("."))
    elif isinstance(config, Sequence) and not isinstance(config, (str, bytes)):
        for value in config:
            yield from iter_numbers(value, key)
    elif isinstance(config, (int, float)) and not isinstance(config, bool):
        yield key, config


def check_run(command: str, model: LightningModule, data: object, trainer_args: Mapping[str, Any], trainer: Trainer) -> None:
    """Checks what a command is about to use: the module without its weights, the Trainer as it is given, the first rows."""
    for key in [key for key in _RUN_COMMANDS.get(command, ()) if trainer_args[key] == 0]:
        raise UsageError(f"trainer.{key}: it can't be 0 in `{command}`; give a number above 0, or leave it out")
    if command != "export":  # which computes nothing
        check_devices(trainer)
    if command in _RUN_COMMANDS:
        _check_nodes(trainer)
        check_writable("trainer.default_root_dir", Path(trainer.default_root_dir))
        for logger in (logger for logger in trainer.loggers if isinstance(logger, CSVLogger) and logger._version is not None):
            if command != "fit":
                logger._version = None  # a free one, chosen as late as possible
            elif getattr(rank_zero_only, "rank", 0) == 0 and Path(logger.log_dir, "metrics.csv").exists():
                raise UsageError(f"trainer.logger.version: '{logger.log_dir}' holds a run already; leave version out")
    sampling = LayerwiseSampling.of(trainer) if command == "fit" else None
    if command == "fit":
        _check_fit(model, data, sampling, trainer_args, trainer)
    if isinstance(model, CausalLMModule):
        config = model.check()
        if model.hparams["kernels"] is not None and command != "export":
            liger_for(config)
        if command in _RUN_COMMANDS:
            trains_unsampled = command == "fit" and sampling is None
            check_offloading(model.hparams, trains_unsampled, trainer.num_devices, _shards(trainer_args["strategy"]))
        if sampling is not None:
            _check_sampling(sampling, config, model)
            name, scores = model.hparams["model_name_or_path"], sampling.scores
            if scores is not None and Path(scored := BlockScores.load(scores).model).name != Path(name).name:
                log.warning("sampling.scores: '%s' holds the scores of '%s', and the model is '%s'", scores, scored, name)
    reads_rows = command in ("score", *_RUN_COMMANDS) and getattr(rank_zero_only, "rank", 0) == 0
    if reads_rows and isinstance(data, InstructionDataModule):
        data.check(command)


def _check_fit(
    model: LightningModule, data: object, sampling: LayerwiseSampling | None, trainer_args: Mapping[str, Any], trainer: Trainer
) -> None:
    """Checks what only a training asks for: of strategy and precision, of callbacks, and of the time that is left."""
    projects = isinstance(model, CausalLMModule) and model.hparams["rank"] is not None
    if sampling is not None or projects:
        check_strategy(trainer.strategy)  # that Lightning has chosen, before it starts other processes
    if projects:
        check_unscaled(trainer.precision_plugin)
    callbacks, sharded = trainer.callbacks, _shards(trainer_args["strategy"])  # type: ignore[attr-defined]
    if isinstance(model, CausalLMModule):
        check_callbacks(callbacks, sharded)
    if trainer.accumulate_grad_batches > 1 and accumulation_scheduler(trainer) is not None:
        raise UsageError("trainer.accumulate_grad_batches: GradientAccumulationScheduler sets it, too; leave one out")
    if time_is_up(callbacks):
        key = "callbacks.Timer.duration" if trainer_args["max_time"] is None else "max_time"
        raise UsageError(f"trainer.{key}: it leaves no time to train; give more, as 00:01:30:00 for 90 minutes")
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            _check_checkpoint(callback, sharded)
    _check_monitors(model, data, callbacks, trainer_args["limit_val_batches"] != 0)


def _shards(strategy: object) -> bool:
    return "fsdp2" in str(strategy).lower()  # its name, or an FSDP2Strategy


def check_plan(model: LightningModule, sampling: LayerwiseSampling | None, trainer: Mapping[str, Any]) -> None:
    """Checks what a plan is made of as `check_run` does, except what depends on this machine; the data may be elsewhere."""
    if isinstance(model, CausalLMModule):
        config, _ = model.check(find_model_config)
        check_offloading(model.hparams, sampling is None, number_of_devices(trainer["devices"]), _shards(trainer["strategy"]))
        if sampling is not None or model.hparams["rank"] is not None:
            check_strategy(trainer["strategy"])
        if model.hparams["rank"] is not None:
            check_unscaled(str(trainer.get("precision")))
        if sampling is not None:
            _check_sampling(sampling, config, model)


def _check_sampling(sampling: LayerwiseSampling, config: Any, model: CausalLMModule) -> None:
    """Checks the settings against the optimizer and the blocks, which are counted: not every config has their number."""
    sampling.check_optimizer(model.example_optimizer())
    blocks = decoder_layers(meta_model(config, trust_remote_code=model.hparams["trust_remote_code"]))
    sampling.check(len(blocks), architecture_of(config))
    if model.hparams["lora"] is None:  # else adapters may rest
        sampling.check_resting_rank(blocks)


def check_devices(trainer: Trainer) -> None:
    """Checks precision and number of processes of a Trainer that computes on the CPU; Lightning checks those of GPUs."""
    if not isinstance(trainer.accelerator, CPUAccelerator):
        return
    if trainer.precision == "16-true":
        raise UsageError("trainer.precision: 16-true needs a GPU; set trainer.precision: bf16-true or bf16-mixed")
    if trainer.precision.startswith("bf16") and not cpu_has_bfloat16():
        what = "is slow on this CPU, which has no bfloat16 arithmetic; 32-true is faster"
        log.warning("trainer.precision: %s %s", trainer.precision, what)
    cores = os.cpu_count() or 1
    if trainer.num_devices > 8 * cores:  # a few processes may share a core
        raise UsageError(f"trainer.devices: {trainer.num_devices} are more than the {cores} CPU cores of this machine")


def cpu_has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are fast on this CPU; on x86 without AVX-512 they take many times as long."""
    return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")


def _check_nodes(trainer: Trainer) -> None:
    """Refuses several machines of which nothing says where they are: this one would wait for the others, silently."""
    unknown = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)  # no launcher's
    if trainer.num_nodes > 1 and unknown and "MASTER_ADDR" not in os.environ:
        hint = "start the processes of each by torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        raise UsageError(f"trainer.num_nodes: {trainer.num_nodes}, but nothing says where the other machines are; {hint}")


def check_writable(key: str, folder: Path) -> None:
    """Checks that a folder, which the key names, can be made and written to; raises a UsageError if not."""
    refuse_url(key, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # an empty file can be made on a full disk
    except OSError as error:
        raise not_writable(key, folder, error) from error


def _check_checkpoint(checkpoint: ModelCheckpoint, sharded: bool) -> None:
    """Checks the names of checkpoints, and that their folder can be written to; raises a UsageError if not."""
    folder, name = checkpoint.dirpath, checkpoint.filename
    if sharded and "://" in str(folder):  # the strategy would take it for a local path
        raise UsageError(f"checkpoint.dirpath: fsdp2 saves into local folders alone, not to '{folder}'; give one")
    if folder and "://" not in str(folder):
        check_writable("checkpoint.dirpath", Path(folder))
    try:
        made = os.path.relpath(checkpoint.format_checkpoint_name({}), folder or ".")
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise UsageError(f"checkpoint.filename: '{name}' is no format ({error}); write metrics as {{val_loss:.2f}}") from error
    if made.startswith(".."):
        raise UsageError(f"checkpoint.filename: '{name}' leaves its folder; set checkpoint.dirpath for another")
    if os.sep in made and not checkpoint.save_last:
        hint = "set checkpoint.save_last: true, or write '-' for '/'"
        raise UsageError(f"checkpoint.filename: '{name}' makes folders, in which `--ckpt_path last` does not look; {hint}")


def _check_monitors(model: LightningModule, data: object, callbacks: Sequence[Callback], val_batches: bool) -> None:
    """Refuses monitors, and fields of file names, that are never logged (as far as that is known), and wrong modes."""
    known = all(type(part).__module__.startswith(("lightning.", "ows_lightning.")) for part in (model, *callbacks))
    for callback in callbacks:
        owner = "checkpoint" if isinstance(callback, RunCheckpoint) else f"trainer.callbacks.{type(callback).__name__}"
        names = [("monitor", getattr(callback, "monitor", None))]
        if isinstance(callback, ModelCheckpoint):
            names += [("filename", field) for _, field, _, _ in Formatter().parse(callback.filename or "")]
        for key, metric in names:
            if known and metric and metric not in LOGGED_METRICS and not metric.startswith("lr-"):
                hint = did_you_mean(metric, LOGGED_METRICS) or f"; choose from {', '.join(LOGGED_METRICS)}"
                raise UsageError(f"{owner}.{key}: no metric '{metric}' is logged{hint}")
            if metric and metric.startswith("val_") and isinstance(data, InstructionDataModule):
                needs = {"data.val_size": data.val_size or data.eval_dataset, "trainer.limit_val_batches": val_batches}
                needs |= {"data.exact_match_rows": data.exact_match_rows} if metric == "val_exact_match" else {}
                for setting in (name for name, value in needs.items() if not value):
                    raise UsageError(f"{owner}.{key}: there is no {metric} without {setting}; set it, or monitor train_loss")
            mode, best = getattr(callback, "mode", None), _BEST.get(str(metric))
            if key == "monitor" and {mode, best} == {"min", "max"}:
                raise UsageError(f"{owner}.mode: {mode} would take the worst {metric} for the best; set it to {best}")
