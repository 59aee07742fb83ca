"""What a run leaves behind besides checkpoints: a model directory that any tool loads, and pictures."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from ows_lightning.card import model_card
from ows_lightning.export import save_huggingface
from ows_lightning.module import CausalLMModule
from ows_lightning.report import write_pictures
from ows_lightning.resume import continue_curves
from ows_lightning.sampling.callback import LayerwiseSampling

log = logging.getLogger(__name__)


class RunArtifacts(Callback):
    """Writes the trained model as a Hugging Face directory, and the run as pictures, at the end of ``fit``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the curves of a resumed run with what was logged before."""
        continue_curves(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``model/`` and the PNGs into the run's folder."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if isinstance(pl_module, CausalLMModule) and pl_module.model is not None:
            save_huggingface(pl_module.model, pl_module.tokenizer, folder / "model", model_card(pl_module, folder))
        if trainer.is_global_zero:
            write_pictures(folder)
            figures = {name: f"{value:.4g}" for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
            log.info("After training: %s", ", ".join(f"{name} {value}" for name, value in figures.items()))
            log.info("The run is in %s: the model in model/, pictures, metrics.csv, checkpoints/", folder)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, with the blocks that train at the moment."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """Adds the active blocks to the logged figures."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LayerwiseSampling):
                items["blocks"] = ",".join(map(str, callback.active_blocks))
        return items
