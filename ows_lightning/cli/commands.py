"""CommandTrainer: the Trainer with a method for each command that Lightning lacks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from ows_lightning.checkpoints.find import read_checkpoint
from ows_lightning.checkpoints.shards import load_weights
from ows_lightning.cli.preflight import check_writable
from ows_lightning.errors import UsageError
from ows_lightning.evaluation import run_tasks
from ows_lightning.memory import plan_from_config, plot_plan, write_config_for_card
from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.delta import Sizes, write_delta
from ows_lightning.models.export import check_replaceable, save_huggingface
from ows_lightning.models.pretrained import allocate
from ows_lightning.module import DTYPES, CausalLMModule
from ows_lightning.report.model_card import model_card, upload
from ows_lightning.report.plots import plot_scores
from ows_lightning.report.run import RunRecord, run_folder_of
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.distributions import OUTLIER_DISTRIBUTIONS
from ows_lightning.sampling.scores import OutlierScores
from ows_lightning.trainer import OWSTrainer


class CommandTrainer(OWSTrainer):
    """``OWSTrainer`` with a method for each command of this package, and tables of what ``validate`` and ``test`` find."""

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
        tasks: list[str] | None = None,
        include_path: Path | None = None,
    ) -> Any:
        """Evaluate on the test set: loss, perplexity, exact match of generated answers, accuracy where rows have choices.

        Args:
            model: The module.
            dataloaders: Test data, where there is no data module.
            ckpt_path: The checkpoint to evaluate; without it, the model as it is.
            verbose: Print the figures.
            datamodule: The data module.
            weights_only: As in Lightning; our checkpoints load either way.
            tasks: Names of tasks of lm-evaluation-harness to run, too. Needs the extra ``eval``.
            include_path: A folder with YAML files of further tasks.
        """
        figures = super().test(model, dataloaders, ckpt_path, False, datamodule, weights_only)
        if verbose and self.is_global_zero:
            print(figures_table(figures))
        module = self.lightning_module
        if tasks and isinstance(module, CausalLMModule):
            module.to(self.strategy.root_device)  # Lightning moves it to the CPU when a loop ends
            run_tasks(module.language_model, module.tokenizer, tasks, None if include_path is None else str(include_path))
        return figures

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Evaluate on the validation set: loss, perplexity, exact match of generated answers.

        Args:
            model: The module.
            dataloaders: Validation data, where there is no data module.
            ckpt_path: The checkpoint to evaluate; without it, the model as it is.
            verbose: Print the figures.
            datamodule: The data module.
            weights_only: As in Lightning; our checkpoints load either way.
        """
        figures = super().validate(model, dataloaders, ckpt_path, False, datamodule, weights_only)
        if verbose and self.is_global_zero:
            print(figures_table(figures))
        return figures

    def score(self, model: LightningModule, datamodule: LightningDataModule, output: Path = Path(".")) -> OutlierScores:
        """Compute the blocks' outlier scores; prints them, and writes them as JSON and as a bar chart.

        Args:
            model: The module with the model.
            datamodule: Where the calibration rows come from.
            output: The folder for ``outlier_scores.json`` (which ``sampling.scores`` takes) and ``outlier_scores.png``.
        """
        check_writable("output", output)
        sampling = copy.copy(LayerwiseSampling.of(self)) or LayerwiseSampling()
        sampling.scores = None
        if sampling.distribution not in (*OUTLIER_DISTRIBUTIONS, "weight_norm"):
            sampling.distribution = "outlier"  # the other distributions need no scores
        self._prepare(model, datamodule)
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.to(self.strategy.root_device)
        scores = sampling.compute_scores(model, datamodule.train_dataloader())
        scores.save(output / "outlier_scores.json")
        figure, _ = plot_scores(RunRecord(name=scores.model, path=output, scores=asdict(scores)))
        figure.savefig(output / "outlier_scores.png")
        print(f"{scores.table()}\nWritten: {output / 'outlier_scores.json'} and outlier_scores.png")
        return scores

    @staticmethod
    def plan(
        config: Any,
        method: str | list[str] | None = None,
        format: Literal["table", "json"] = "table",
        output: Path | None = None,
        card: str | None = None,
        fit: str | None = None,
    ) -> None:
        """Predict the memory and compute that a config needs, and what other methods would; loads nothing, needs no GPU.

        Args:
            config: The parsed config.
            method: Methods to predict, as ``ows,full`` or a list; all by default.
            format: ``table`` for people, ``json`` for programs.
            output: A folder for ``plan.png`` and ``plan.json``, and for the config of ``fit``.
            card: A card's name, such as ``RTX 4090``: estimate tokens a second on it, and what limits them.
            fit: A card's name: only write a config with which the run fits it.
        """
        if fit is not None:
            if method or card or format != "table":
                raise UsageError("fit: it only writes a config; leave out --card, --method and --format")
            folder = output or Path()
            check_writable("output", folder)
            print(write_config_for_card(config, fit, folder))
            return
        plan = plan_from_config(config, method.split(",") if isinstance(method, str) else method, card)
        print(plan.to_json() if format == "json" else plan.to_table())
        if output is not None:
            check_writable("output", output)
            (output / "plan.json").write_text(plan.to_json() + "\n")
            plot_plan(plan)[0].savefig(output / "plan.png")

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | Path,
        output: Path | None = None,
        push_to_hub: str | None = None,
        delta: bool = False,
    ) -> None:
        """Write a checkpoint's model as a Hugging Face directory.

        Args:
            model: The module that the checkpoint was saved from.
            datamodule: Not needed.
            ckpt_path: The checkpoint.
            output: The directory to write; by default ``model-NAME`` in the run's folder, NAME being the checkpoint's.
            push_to_hub: Upload the directory to the hub under this name, ``owner/name``, too.
            delta: Write only the tensors that differ from the base model; `apply-delta` makes the model of both.
        """
        if not isinstance(model, CausalLMModule):
            raise UsageError(f"model: {type(model).__name__} holds no model that this package can export; use CausalLMModule")
        checkpoint = Path(ckpt_path)
        run = run_folder_of(checkpoint) or checkpoint.absolute().parent
        output = output or run / f"{'delta' if delta else 'model'}-{checkpoint.name.removesuffix('.ckpt')}"
        target = check_replaceable(output, model.hparams["model_name_or_path"])
        check_writable("output", target.parent)
        model.trainer = self  # the module reads the precision from it
        model.causal_lm = CausalLM(allocate(model.build(empty=True)))
        read_checkpoint(checkpoint, lambda path: load_weights(model, path))
        card = model_card(model.hparams, run)
        if delta:
            print(f"Written: {output} ({self._export_delta(model, target, card)})")
        else:
            save_huggingface(model.model, model.tokenizer, target, card)
            print(f"Written: {output}")
        if push_to_hub is not None:
            print(f"Uploaded: {upload(output, push_to_hub)}")

    def _export_delta(self, module: CausalLMModule, output: Path, card: str) -> Sizes:
        """Writes the whole model beside the output, compares it with the base, and keeps the difference."""
        name, trusts = module.hparams["model_name_or_path"], module.hparams["trust_remote_code"]
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
            save_huggingface(module.model, module.tokenizer, whole := Path(folder, "model"), card)
            module.causal_lm = None  # free its memory for the base
            return write_delta(whole, output, name, DTYPES.get(str(self.precision), torch.float32), trusts)

    def _prepare(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Connects model and data to this Trainer and loads the weights, without running a loop."""
        self.strategy.connect(model)
        model.trainer = self
        datamodule.trainer = self
        model.configure_model()


def figures_table(figures: Sequence[Mapping[str, float]]) -> str:
    """Returns an evaluation's figures as lines of text, each once (Lightning repeats them for every data loader)."""
    merged = {name: value for part in figures for name, value in part.items()}
    lines = []
    for name, value in merged.items():
        if not name.endswith("_stderr"):
            error = f" ± {merged[f'{name}_stderr']:.3g}" if f"{name}_stderr" in merged else ""
            lines.append(f"{name:<20} {value:.4g}{error}")
    return "\n".join(lines)
