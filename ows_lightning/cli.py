"""The command line: LightningCLI with this package's classes, two callbacks of its own keys, and errors in one line."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from ows_lightning.artifacts import ProgressBar, RunArtifacts
from ows_lightning.checkpoints import find_checkpoint
from ows_lightning.data import InstructionDataModule
from ows_lightning.distributed import require_layerwise
from ows_lightning.errors import RunError, UsageError
from ows_lightning.module import CausalLMModule
from ows_lightning.parsing import OneLineParser
from ows_lightning.preemption import SaveOnSignal
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.trainer import OWSTrainer

log = logging.getLogger(__name__)

# The callback is configured by its own arguments, not by class_path.
set_parsing_settings(subclasses_disabled=[LayerwiseSampling])


class OWSCLI(LightningCLI):
    """LightningCLI for this package.

    ``sampling`` (LayerwiseSampling, or null) and ``checkpoint`` (ModelCheckpoint) are top-level keys. ``model`` and
    ``data`` are CausalLMModule and InstructionDataModule unless a ``class_path`` names others.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=OWSTrainer,
            parser_class=OneLineParser,
            parser_kwargs={"allow_abbrev": False},
            auto_configure_optimizers=False,  # the module takes its optimizer as a callable: FSDP2 replaces parameters
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            args=args,
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, and those of OWSTrainer."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in ("score", "export")}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the two callbacks' keys, and default classes for model and data."""
        parser.add_argument("--sampling", type=LayerwiseSampling | None, default=None, help="Which blocks train; null: all")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "model": {"class_path": f"{CausalLMModule.__module__}.{CausalLMModule.__name__}"},
                "data": {"class_path": f"{InstructionDataModule.__module__}.{InstructionDataModule.__name__}"},
                "checkpoint.save_last": True,
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Gives the Trainer its callbacks, and a CSV logger in ``default_root_dir`` where no logger is configured."""
        given = self._get(self.config_init, "trainer")
        sampling = self._get(self.config_init, "sampling")
        callbacks = given["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        require_layerwise(given["strategy"])  # before Lightning complains of something else
        callbacks += [RunArtifacts(), SaveOnSignal()] if sampling is None else [sampling, RunArtifacts(), SaveOnSignal()]
        if given["enable_progress_bar"] is not False:
            callbacks.append(ProgressBar())
        if given["logger"] in (None, True):
            kwargs["logger"] = CSVLogger(given["default_root_dir"] or "runs", name="")
        if given["logger"] is not False:
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _parse_ckpt_path(self) -> None:
        """Finds the checkpoint. A resumed run's settings are the user's, not those in the checkpoint."""
        config = self.config.get(self.config.get("subcommand"), {})
        if self.config.get("subcommand") != "export" and (given := config.get("ckpt_path")) and given not in ("best", "hpc"):
            path = find_checkpoint(str(given), Path(config.trainer.default_root_dir or "runs"))
            config.ckpt_path = None if path is None else str(path)
            if path is None:
                log.warning("ckpt_path: there is no checkpoint of an earlier run yet; this one starts anew")


def main(args: ArgsType = None) -> None:
    """Runs one command; a user's mistake ends it with one line, and exit code 2 (usage) or 1 (run)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("ows_lightning").setLevel(logging.INFO)
    try:
        OWSCLI(args)
    except (UsageError, RunError) as error:
        if os.environ.get("OWS_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except torch.OutOfMemoryError as error:
        if os.environ.get("OWS_DEBUG") == "1":
            raise
        print(f"error: {_out_of_memory(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def _out_of_memory(error: torch.OutOfMemoryError) -> str:
    needed = str(error).split(". ")[0]
    return (
        f"{needed}; lower data.batch_size (and raise trainer.accumulate_grad_batches by as much), data.max_seq_length or "
        "sampling.activated_layers, set model.gradient_checkpointing: true, or trainer.precision: bf16-true; "
        "`main.py plan` with the same config says how much each saves"
    )
