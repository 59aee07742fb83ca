"""The commands that take a config: LightningCLI with this package's classes, and two callbacks at the top level."""

import copy
import inspect
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.timer import Interval
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger

import ows_lightning.distributed  # noqa: F401  registers fsdp2 and ddp_layerwise
from ows_lightning.callbacks.auto_gradient_checkpointing import AutoGradientCheckpointing
from ows_lightning.callbacks.generations import PredictionFile
from ows_lightning.callbacks.resume import ContinueMetricsCSV
from ows_lightning.callbacks.run_checkpoint import RunCheckpoint
from ows_lightning.callbacks.run_folder import RunFolder, RunLogger
from ows_lightning.callbacks.run_summary import RunSummary
from ows_lightning.callbacks.save_on_signal import SaveOnSignal
from ows_lightning.callbacks.self_checks import SelfChecks
from ows_lightning.callbacks.throughput import LearningRates
from ows_lightning.checkpoints.find import find_checkpoint
from ows_lightning.cli import peer_watchdog
from ows_lightning.cli.commands import CommandTrainer
from ows_lightning.cli.config_files import ConfigFile, shipped_data
from ows_lightning.cli.help import DEFAULTS
from ows_lightning.cli.parser import OneLineParser
from ows_lightning.cli.preflight import check_plan, check_run, check_settings
from ows_lightning.data.datamodule import InstructionDataModule
from ows_lightning.errors import UsageError
from ows_lightning.fit.checks import check_strategy
from ows_lightning.module import CausalLMModule
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.sampling.callback import LayerwiseSampling

log = logging.getLogger(__name__)
_OUR_COMMANDS = {"score": {"model", "datamodule"}, "plan": {"config"}, "export": {"model", "datamodule"}}
_COMMANDS: dict[str, set[str]] = {**LightningCLI.subcommands(), **_OUR_COMMANDS}
_OPTIMIZER = {"class_path": "ows_lightning.GaLoreAdamW", "init_args": {"lr": DEFAULTS["model.optimizer.lr"]}}

# The callback is configured by its own arguments, not by class_path.
set_parsing_settings(subclasses_disabled=[LayerwiseSampling])
# The default of Lightning's Timer, with which no config could be written or printed.
yaml.SafeDumper.add_representer(Interval, lambda dumper, interval: dumper.represent_str(interval.value))


class SaveConfig(SaveConfigCallback):
    """Writes a run's ``config.yaml``, for any command: without the checkpoint that this run went on from."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config.clone(), **kwargs)
        self.config.ckpt_path = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps a training's config where an evaluation without a logger runs in its folder."""
        if stage == "fit" or trainer.loggers:
            super().setup(trainer, pl_module, stage)


class BlocksProgressBar(TQDMProgressBar):
    """Lightning's bar, with the blocks that train at the moment."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """Lightning's figures without the run's number, and the blocks."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        if (sampling := LayerwiseSampling.of(trainer)) is not None:
            items["blocks"] = ",".join(map(str, sampling.active_blocks))
        return items


class OWSCLI(LightningCLI):
    """LightningCLI with ``sampling`` (or null) and ``checkpoint`` at the top level, and our classes of model and data."""

    def __init__(self, args: list[str], **kwargs: Any) -> None:
        self._asked = args[0] if args else None
        super().__init__(
            LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
            trainer_class=CommandTrainer, parser_class=OneLineParser, parser_kwargs={"allow_abbrev": False},
            auto_configure_optimizers=False,  # the module takes its optimizer as a callable: FSDP2 replaces parameters
            save_config_callback=SaveConfig, save_config_kwargs={"overwrite": True}, seed_everything_default=0,
            args=args, **kwargs,
        )  # fmt: skip

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Maps each command to those of its method's arguments that are no keys; or the asked one alone, to save seconds."""
        return {self._asked: _COMMANDS[self._asked]} if self._asked in _COMMANDS else _COMMANDS

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser whose ``--config`` also takes names of shipped files."""
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the two callbacks' keys, and default classes for model and data."""
        parser.add_argument("--sampling", type=LayerwiseSampling | None, default=None)
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        model = {"class_path": "ows_lightning.CausalLMModule", "init_args": {"optimizer": copy.deepcopy(_OPTIMIZER)}}
        data, last = {"class_path": "ows_lightning.InstructionDataModule"}, DEFAULTS["checkpoint.save_last"]
        parser.set_defaults({"model": model, "data": data, "checkpoint.save_last": last})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Lets every command take the config that another one wrote into a run's folder, or printed."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        assert isinstance(parser, OneLineParser)
        no_keys = {"self", "args", "kwargs", *self._subcommand_method_arguments[subcommand]}
        parser.foreign_keys = [
            (key, parameter.default if name in _OUR_COMMANDS else ...)
            for name, not_keys in _COMMANDS.items()
            for key, parameter in inspect.signature(getattr(CommandTrainer, name)).parameters.items()
            if key not in no_keys | not_keys
        ]
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments, and checks what the parser does not."""
        # Without --print_config, which would end the program here. Parsed again if a named class has other defaults.
        asked = [word for word in args if not word.startswith("--print_config")]
        self.config = parser.parse_args(asked)
        if self._start_from_named_classes() or asked != args:
            self.config = parser.parse_args(args)
        command = self.config.get("subcommand")
        config = self.config.get(str(command), self.config)
        for section in ("trainer", "checkpoint"):
            if not isinstance(value := config[section], Namespace):
                raise UsageError(f"{section}: '{value}' is no mapping of keys to values")
        keys = ["trainer.default_root_dir", "checkpoint.dirpath", "sampling.scores", "ckpt_path", "output", "include_path"]
        loggers = config["trainer.logger"] if isinstance(config["trainer.logger"], list) else [config["trainer.logger"]]
        parts = [(one.init_args, "save_dir") for one in loggers if isinstance(one, Namespace) and "init_args" in one]
        for part, key in [*((config, key) for key in keys), *parts]:
            if isinstance(value := part.get(key), (str, Path)):  # the ~ of --key=~/folder, which shells leave as it is
                part[key] = type(value)(os.path.expanduser(value))
                if "${" in str(value):
                    raise UsageError(f"{key}: '{value}' names a variable, which YAML files do not replace; write the path")
        check_settings(config, trains=command == "fit")
        data = config["data"].get("init_args", {}) if config["data"] else {}
        for key in {"dataset", "eval_dataset", "test_dataset"}.intersection(data.keys()):
            data[key] = shipped_data(data[key])
        if config["sampling"]:
            config["sampling"]["scores"] = shipped_data(config["sampling"].get("scores"))

    def _start_from_named_classes(self) -> bool:
        """Where other classes are named than the default ones, lets the parser start from the defaults of those.

        The parser would keep the former class's values for arguments of the same name: AdamW would get GaLoreAdamW's rate.
        """
        command, defaults = self.config.get("subcommand"), {}
        model, data = (self.config.get(str(command), self.config)[section] or {} for section in ("model", "data"))
        optimizer = model.get("init_args", {}).get("optimizer")
        named = optimizer.get("class_path") if isinstance(optimizer, Namespace) else None
        kind = locate(model["class_path"]) if model else None
        if isinstance(kind, type) and not issubclass(kind, CausalLMModule):
            defaults["model"] = {"class_path": model["class_path"]}
        elif named is not None and (kind is not CausalLMModule or locate(named) is not GaLoreAdamW):
            given = copy.deepcopy(_OPTIMIZER) if locate(named) is GaLoreAdamW else {"class_path": named}
            defaults["model"] = {"class_path": model["class_path"], "init_args": {"optimizer": given}}
        if data and locate(data["class_path"]) is not InstructionDataModule:
            defaults["data"] = {"class_path": data["class_path"]}
        self._parser(command).set_defaults(defaults)
        return bool(defaults)

    def instantiate_classes(self) -> None:
        """Makes model, data and Trainer; for a plan no Trainer, and all settings are checked."""
        if self.subcommand != "plan":
            super().instantiate_classes()
            return
        made = self.parser.instantiate_classes(self.config).plan
        check_plan(made.model, made.sampling, made.trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "plan":
            config = self.config.plan
            CommandTrainer.plan(config, **{name: config[name] for name in self._subcommand_method_arguments["plan"]})
            return
        launcher = self.trainer.strategy.launcher if subcommand in LightningCLI.subcommands() else None  # ours launch nothing
        if launcher is not None and not launcher.is_interactive_compatible:  # its processes run this command line
            peer_watchdog.set_local_world_size(self.trainer.num_devices)
        super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Gives the Trainer its callbacks, and a CSV logger in ``default_root_dir`` if none is configured."""
        trainer_args, sampling = self._get(self.config_init, "trainer"), self._get(self.config_init, "sampling")
        if trainer_args["barebones"]:
            for key in ("logger", "enable_checkpointing", "enable_progress_bar"):
                trainer_args[key] = False
        callbacks = trainer_args["callbacks"] or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        if (self.subcommand == "fit" and sampling is not None) or "ddp" not in str(trainer_args["strategy"]):
            check_strategy(trainer_args["strategy"])  # before Lightning reports something else
        # After the user's, which may log; before sampling, whose scores take a while.
        callbacks.append(SaveOnSignal())
        callbacks += [] if sampling is None else [sampling]
        config = self.config.get(str(self.subcommand), self.config)
        callbacks += [RunFolder(), ContinueMetricsCSV(), AutoGradientCheckpointing(config), SelfChecks(), RunSummary(config)]
        if self.subcommand == "predict" and isinstance(self.model, CausalLMModule) and not trainer_args["fast_dev_run"]:
            callbacks.append(PredictionFile())
        if trainer_args["enable_checkpointing"] is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        if trainer_args["enable_progress_bar"] is not False and not any(isinstance(one, ProgressBar) for one in callbacks):
            callbacks.append(BlocksProgressBar())
        kwargs["default_root_dir"] = trainer_args["default_root_dir"] or "runs"
        if trainer_args["logger"] is not False:
            kwargs["logger"] = with_csv_logger(trainer_args["logger"], kwargs["default_root_dir"])
            callbacks.append(LearningRates())
        if trainer_args["enable_model_summary"] is None:
            kwargs["enable_model_summary"] = False  # RunSummary says more
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except UsageError:
            raise
        except (ValueError, TypeError, MisconfigurationException, RuntimeError) as error:
            hint = ""
            if "SLURM_NTASKS" in os.environ and "SLURM" in str(error):
                hint = "; start it with srun, or unset SLURM_NTASKS in an interactive job"
            elif "No supported gpu backend" in str(error):
                hint = "; set trainer.accelerator: cpu"
            raise UsageError(f"trainer: {' '.join(str(error).rstrip('!').split())}{hint}") from error
        if self.subcommand is not None:
            check_run(self.subcommand, self.model, self.datamodule, trainer_args, trainer)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Finds the checkpoint. Settings come from the user, not from the checkpoint (as they would in Lightning)."""
        command = str(self.config.get("subcommand"))
        config = self.config.get(command, Namespace())
        ckpt_path = config.get("ckpt_path")
        if ckpt_path is not None and not str(ckpt_path).strip():
            raise UsageError("ckpt_path: it is empty; give a path or `last`, or leave it out")
        if ckpt_path is None and command in ("validate", "test", "predict"):
            log.info("ckpt_path: none is given, so this is about the model as it is loaded")
        if ckpt_path == "best":
            raise UsageError("ckpt_path: only the process that trained knows which one is best; give its path, or last")
        if not ckpt_path or ckpt_path == "hpc":
            return
        root = Path(config.trainer.default_root_dir or "runs")
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        own = [logger.init_args for logger in loggers if "CSVLogger" in str(logger)]  # whose folder is the run's
        of_loggers = [Path(str(logger.save_dir), logger.get("name") or "") for logger in own] or [root]
        places = [root / "checkpoints", root] if loggers == [False] else of_loggers
        if config.checkpoint.dirpath:
            places = [Path(config.checkpoint.dirpath), *places]
        if command == "export" and "://" in str(ckpt_path):
            raise UsageError(f"ckpt_path: export reads local checkpoints only; copy '{ckpt_path}' to this machine first")
        path = find_checkpoint(str(ckpt_path), *places)
        config.ckpt_path = None if path is None else str(path)
        if path is None:
            where = " or ".join(f"'{place}'" for place in places)
            if command != "fit":
                raise UsageError(f"ckpt_path: no run has saved a checkpoint in {where}; give the path of one")
            log.warning("ckpt_path: no earlier run has saved a checkpoint in %s yet; this one starts anew", where)


def with_csv_logger(loggers: Logger | Iterable[Logger] | bool | None, folder: str) -> list[Logger]:
    """Puts a CSV logger before those of ``trainer.logger``: its folder is the run's, and pictures come from its file."""
    listed = loggers if isinstance(loggers, Iterable) else [loggers]
    given = [logger for logger in listed if isinstance(logger, Logger)]  # not true, false or null
    if not any(isinstance(logger, CSVLogger) for logger in given):
        given.append(RunLogger(folder, name="", flush_logs_every_n_steps=1))  # so that a killed run keeps its curves
    return sorted(given, key=lambda logger: not isinstance(logger, CSVLogger))
