"""LayerwiseSampling: the Lightning callback that decides which decoder blocks train, and when that changes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from ows_lightning.errors import UsageError
from ows_lightning.fit.checks import check_strategy
from ows_lightning.fit.projection import prepare_fit
from ows_lightning.optim.sharding import is_sharded
from ows_lightning.sampling.activation import unfreeze
from ows_lightning.sampling.sampler import BlockSampler
from ows_lightning.sampling.scores import BlockScores


class LayerwiseSampling(BlockSampler, Callback):
    """Trains a few sampled decoder blocks at a time: OWS (arXiv 2405.18380), LISA and their relatives.

    Every ``interval_steps`` optimizer steps, ``activated_layers`` distinct blocks are drawn: by their share of outliers for
    OWS, uniformly for LISA. Only these train until the next draw; frozen blocks have no gradient and no optimizer state, and
    keep every bit, unless ``resting_rank`` lets some learn a little, which takes GaLoreAdamW. Without it any optimizer
    will do, and any LightningModule that holds a causal LM. The rules and the arguments are those of ``BlockSampler``.

    When it acts: every ``fit`` starts afresh, in ``setup``. ``on_train_start`` computes the scores and draws the first blocks,
    when every parameter is registered with the optimizer and a checkpoint's state is restored. Each further draw happens in
    ``on_train_batch_start`` of an interval's first batch, under accumulation too. All is unfrozen when ``fit`` ends or fails.

    Scores and draws are written as ``outlier_scores.json`` and ``sampling_history.csv`` into the folder of the Trainer's
    logger, or into ``folder`` if that is set; without either, nothing is written.

    Not supported are optimizers that hold only some of the parameters (freeze nothing yourself before
    ``configure_optimizers``), and strategies that fix the set of trained parameters at the start (instead of ``ddp`` use
    ``ddp_layerwise``, instead of ``fsdp`` use ``fsdp2``, under which a module that is no CausalLMModule shards itself).
    """

    folder: Path | None = None
    _written_to: Path | None = None

    @classmethod
    def of(cls, trainer: Trainer) -> "LayerwiseSampling | None":
        """Returns the Trainer's LayerwiseSampling callback, if it has one."""
        return next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)  # type: ignore[attr-defined]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts afresh, and refuses strategies that can't let the trained blocks change."""
        if stage == "fit":
            check_strategy(trainer.strategy)
            prepare_fit(trainer)
            unfreeze(pl_module)  # a copy that was made in mid-run, before an optimizer is made of it
            self.reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the blocks and checks the settings against them; nothing is frozen yet."""
        self.attach(pl_module)
        sharded = any(map(is_sharded, pl_module.parameters()))
        if trainer.world_size > 1 and isinstance(trainer.strategy, ModelParallelStrategy) and not sharded:
            how = 'by shard_model(self.model, self.device_mesh["data_parallel"]) of ows_lightning.distributed.sharded_model'
            what = f"any other module has to shard itself in configure_model, {how}; or take ddp_layerwise"
            raise UsageError(f"trainer.strategy: fsdp2 shards a CausalLMModule; {what}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the blocks and draws the first ones, or puts back those of the run that is resumed."""
        log_dir = trainer.log_dir if trainer.loggers else None  # every rank has to ask: `log_dir` is broadcast
        folder = Path(chosen) if (chosen := self.folder or log_dir) else None
        self._written_to = folder if trainer.is_global_zero and not trainer.fast_dev_run else None  # type: ignore[attr-defined]
        metrics = self.start(trainer.global_step, trainer.optimizers, partial(self._scores, trainer, pl_module))
        self._write_and_log(trainer, metrics)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draws new blocks where this batch is the first of an interval."""
        if metrics := self.advance(trainer.global_step, trainer.optimizers, partial(self._scores, trainer, pl_module)):
            self._write_and_log(trainer, metrics)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Notes the gradients' norms, before Lightning clips them; a module that clips by hand has done so."""
        if optimizer is trainer.optimizers[0]:  # once a step: of several, each has some of the weights
            self.observe(trainer.optimizers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Names the blocks that never trained."""
        if trainer.is_global_zero:
            self.warn_of_never_trained()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning calls no ``teardown`` after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unfreezes what this callback froze."""
        if stage == "fit":
            self.release()

    def compute_scores(self, model: LightningModule, loader: Any) -> BlockScores:  # type: ignore[override]
        """As ``BlockSampler.compute_scores``, in the Trainer's precision and under the name that the module was given."""
        with model.trainer.precision_plugin.forward_context():
            scores = super().compute_scores(model, loader)
        return replace(scores, model=str(model.hparams.get("model_name_or_path", scores.model)))  # it may be a Path

    def _scores(self, trainer: Trainer, pl_module: LightningModule) -> BlockScores:
        return trainer.strategy.broadcast(self.compute_scores(pl_module, trainer.train_dataloader))

    def _write_and_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.write(self._written_to)
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=trainer.global_step)
