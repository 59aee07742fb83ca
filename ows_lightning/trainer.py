"""OWSTrainer: Lightning's Trainer with the further verbs of ``main.py``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from ows_lightning.checkpoints import WholeCheckpointIO
from ows_lightning.errors import UsageError
from ows_lightning.export import save_huggingface
from ows_lightning.module import CausalLMModule
from ows_lightning.report.plots import plot_scores
from ows_lightning.report.run import RunRecord
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.scores import OutlierScores


class OWSTrainer(Trainer):
    """Lightning's Trainer, with a method for each further subcommand, and checkpoints that are whole or not there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # no plugin of the user's
            self.strategy.checkpoint_io = WholeCheckpointIO()

    @property
    def sampling(self) -> LayerwiseSampling | None:
        """The run's LayerwiseSampling callback, if it has one."""
        return next((callback for callback in self.callbacks if isinstance(callback, LayerwiseSampling)), None)

    def score(
        self, model: LightningModule, datamodule: LightningDataModule, output: Path = Path(".")
    ) -> OutlierScores:
        """Compute the blocks' outlier scores; prints them, and writes them as JSON and as a bar chart.

        Args:
            model: The module with the model.
            datamodule: Where the calibration rows come from.
            output: The folder for ``outlier_scores.json`` (which ``sampling.scores`` takes) and ``outlier_scores.png``.
        """
        sampling = self.sampling or LayerwiseSampling()
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

    def export(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: Path, output: Path = Path("model")
    ) -> None:
        """Write a checkpoint's model as a Hugging Face directory.

        Args:
            model: The module that the checkpoint was saved from.
            datamodule: Not needed.
            ckpt_path: The checkpoint.
            output: The directory to write.
        """
        if not isinstance(model, CausalLMModule):
            raise UsageError(f"model: {type(model).__name__} holds no model that this package can export; use CausalLMModule")
        if not ckpt_path.exists():
            raise UsageError(f"ckpt_path: no checkpoint '{ckpt_path}'")
        self._prepare(model, datamodule)
        checkpoint = self.strategy.load_checkpoint(ckpt_path, weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
        save_huggingface(model.model, model.tokenizer, output)
        print(f"Written: {output}")

    def _prepare(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Connects model and data to this Trainer and loads the weights, without running a loop."""
        self.strategy.connect(model)
        model.trainer = self
        datamodule.trainer = self
        model.configure_model()
