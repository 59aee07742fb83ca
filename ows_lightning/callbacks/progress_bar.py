"""The progress bar, which shows the blocks that train."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from ows_lightning.sampling.callback import LayerwiseSampling


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, with the blocks that train at the moment."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """Adds the active blocks to the logged figures."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        if (sampling := LayerwiseSampling.of(trainer)) is not None:
            items["blocks"] = ",".join(map(str, sampling.active_blocks))
        return items
