"""``model.gradient_checkpointing: auto``: recompute as few blocks as fit the device's memory."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ows_lightning.errors import first_line
from ows_lightning.memory.cards import available_bytes
from ows_lightning.memory.plan_settings import settings_of_run
from ows_lightning.memory.planner import fewest_checkpointed_blocks
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.execution import checkpoint_activations
from ows_lightning.module import CausalLMModule

log = logging.getLogger(__name__)
MEMORY_FRACTION = 0.9  # of the free memory: workspaces of kernels, fragmentation and 5 % of error are not predicted


class AutoGradientCheckpointing(Callback):
    """Chooses the number of recomputed blocks before training, if the module's ``gradient_checkpointing`` is ``auto``.

    The memory is predicted from the parsed ``config``. The number changes no bit, so a resumed run may choose another.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the number on all processes; all blocks if the memory can't be predicted."""
        if not isinstance(pl_module, CausalLMModule) or pl_module.hparams["gradient_checkpointing"] != "auto":
            return
        number = count = len(decoder_layers(pl_module))
        if trainer.is_global_zero:
            try:
                budget = MEMORY_FRACTION * available_bytes(pl_module.device, pl_module.parameters(), trainer.num_devices)
                number = fewest_checkpointed_blocks(settings_of_run(self.config, pl_module), budget)
                what = "model.gradient_checkpointing: auto, %d of %d blocks recompute (%.1f GB for the run)"
                log.info(what, number, count, budget / 1e9)
            except Exception as error:  # no fault of a prediction may end a run
                log.info("model.gradient_checkpointing: auto is true, the memory is not predicted (%s)", first_line(error))
        checkpoint_activations(pl_module.language_model, int(trainer.strategy.broadcast(number)))
