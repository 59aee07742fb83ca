"""The command line: LightningCLI with this package's classes, two callbacks of its own keys, and errors in one line."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from ows_lightning.artifacts import ProgressBar, RunArtifacts
from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import RunError, UsageError
from ows_lightning.module import CausalLMModule
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.trainer import OWSTrainer

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
        callbacks += [RunArtifacts()] if sampling is None else [sampling, RunArtifacts()]
        if given["enable_progress_bar"] is not False:
            callbacks.append(ProgressBar())
        if given["logger"] in (None, True):
            kwargs["logger"] = CSVLogger(given["default_root_dir"] or "runs", name="")
        if given["logger"] is not False:
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration as it is: a resumed run's settings are the user's, not those in the checkpoint."""


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
