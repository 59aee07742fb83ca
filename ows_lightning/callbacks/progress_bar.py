"""The progress bar, with the blocks that train at the moment."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from ows_lightning.sampling.callback import LayerwiseSampling


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
