"""Data parallelism for models whose trained blocks change: ``--trainer.strategy ddp_layerwise``."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.sharding import average_, broadcast_, zero_missing_gradients


class LayerwiseDDPStrategy(DDPStrategy):
    """DDP that averages what the optimizer consumes, for whichever parameters train at the moment.

    torch's DistributedDataParallel fixes the set of trained parameters when it wraps a model, and averages full gradients.
    Here the model stays unwrapped: when a step's last backward pass is through, the gradients are averaged, projected ones
    where the optimizer is GaLoreAdamW (r/n of the bytes). In a step that renews a subspace the full gradient is averaged
    before the subspace is taken, one matrix at a time, and all processes take the one that rank 0 finds.
    """

    averages_changing_blocks = True  # what `check_strategy` asks of a DDP strategy
    _accumulates = False

    def configure_ddp(self) -> None:
        """Gives all processes rank 0's weights; the model is not wrapped."""
        assert self.model is not None
        if ignored := [*self._ddp_kwargs, *(["ddp_comm_hook"] if self._ddp_comm_hook is not None else [])]:
            rank_zero_warn(f"trainer.strategy: LayerwiseDDPStrategy wraps no model, so it ignores {', '.join(ignored)}")
        if self.world_size > 1:  # one process may offload blocks, and NCCL takes nothing from host memory
            for tensor in itertools.chain(self.model.parameters(), self.model.buffers()):
                broadcast_(tensor.detach())

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning's context of the micro-batches that are not the last of their step."""
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Makes the optimizers; subspaces wait for the average of the gradients."""
        super().setup_optimizers(trainer)
        for optimizer in (one for one in self.optimizers if isinstance(one, GaLoreAdamW)):
            optimizer.ddp_averaging = self.world_size > 1

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients of a step that is complete."""
        if self._accumulates or self.world_size == 1:
            return
        for optimizer in self.optimizers:
            if not isinstance(optimizer, GaLoreAdamW):
                parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
                zero_missing_gradients(parameters, [p.grad is not None for p in parameters])
                average_([p.grad for p in parameters if p.grad is not None])
            elif not optimizer.accumulating:  # as in a micro-batch of manual optimization that is not the last
                optimizer.average_gradients()
