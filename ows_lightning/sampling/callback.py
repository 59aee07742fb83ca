"""LayerwiseSampling: the callback that decides which decoder blocks train, and when that changes."""

from __future__ import annotations

import copy
import csv
import itertools
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ows_lightning.distributed.requirements import require_layerwise
from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import causal_lm, decoder_layers, non_block_parameters
from ows_lightning.sampling.activation import activate_blocks
from ows_lightning.sampling.distributions import draw_blocks, sampling_probabilities
from ows_lightning.sampling.outliers import layer_outlier_ratios, layer_weight_norms
from ows_lightning.sampling.scores import OutlierScores, architecture_of

log = logging.getLogger(__name__)

Distribution = Literal["outlier", "uniform", "decreasing", "increasing", "outlier_reverse", "weight_norm"]
Part = Literal["embeddings", "lm_head", "norm"]


class LayerwiseSampling(Callback):
    """Trains a few sampled decoder blocks at a time: OWS (arXiv 2405.18380), LISA and their relatives.

    Every ``interval_steps`` optimizer steps, ``activated_layers`` distinct blocks are drawn, in proportion to the
    blocks' share of outliers for OWS and uniformly for LISA. Only these train until the next draw; frozen blocks have
    no gradient and no optimizer state, and their weights stay bit-identical. Works with any optimizer and any
    LightningModule that holds a causal LM.

    When it acts: scores are computed and the first blocks drawn in ``on_train_start``, when every parameter is
    registered with the optimizer and a checkpoint's state is restored; each further draw happens in
    ``on_train_batch_start`` of the first batch after the boundary, so once per boundary whatever
    ``accumulate_grad_batches`` is. The draw of interval i depends on ``seed`` and i
    alone: a resumed run draws what the uninterrupted one would have drawn, and every rank draws the same.

    What does not work with it: optimizers that are built from the parameters trainable at the moment (freeze nothing
    yourself before ``configure_optimizers``), and strategies that fix the set of trained parameters at the start (``ddp``: use
    ``ddp_layerwise``; ``fsdp``: use ``fsdp2``).

    Args:
        activated_layers: Blocks that train at a time (gamma).
        interval_steps: Optimizer steps between two draws (K).
        distribution: ``outlier`` (OWS) | ``uniform`` (LISA) | ``decreasing`` (LISA-D) | ``increasing`` | ``outlier_reverse`` |
            ``weight_norm``, or a list with a weight for each block.
        threshold: A weight is an outlier if its score exceeds ``threshold`` (tau) times the block's mean.
        calibration_samples: Training rows whose activations the scores are computed from.
        scores: A JSON file written by ``score`` or by an earlier run; nothing is computed then.
        rescore_every: Compute the scores anew after this many intervals; None keeps the first ones.
        always_train: What outside the blocks trains at all: ``embeddings``, ``lm_head``, ``norm``. A weight that
            embeddings and head share trains if either is named.
        seed: Seeds the draws and the choice of calibration rows.

    Raises:
        UsageError: A setting is out of its range.
    """

    def __init__(
        self,
        activated_layers: int = 5,
        interval_steps: int = 50,
        distribution: Distribution | list[float] = "outlier",
        threshold: float = 13.0,
        calibration_samples: int = 128,
        scores: str | Path | None = None,
        rescore_every: int | None = None,
        always_train: Sequence[Part] = ("embeddings", "lm_head", "norm"),
        seed: int = 0,
    ) -> None:
        at_least_one = {
            "activated_layers": activated_layers,
            "interval_steps": interval_steps,
            "calibration_samples": calibration_samples,
            "rescore_every": 1 if rescore_every is None else rescore_every,
        }
        for name, value in at_least_one.items():
            if value < 1:
                raise UsageError(f"sampling.{name}: {value} must be at least 1")
        if not 0 < threshold < math.inf:
            raise UsageError(f"sampling.threshold: {threshold} must be a finite number above 0 (the paper's is 13)")
        if unknown := set(always_train) - {"embeddings", "lm_head", "norm"}:
            raise UsageError(f"sampling.always_train: unknown {sorted(unknown)}; choose from embeddings, lm_head, norm")
        self.activated_layers = activated_layers
        self.interval_steps = interval_steps
        self.distribution = distribution
        self.threshold = threshold
        self.calibration_samples = calibration_samples
        self.scores = scores
        self.rescore_every = rescore_every
        self.always_train = tuple(always_train)
        self.seed = seed
        self.outlier_scores: OutlierScores | None = None
        self.history: list[tuple[int, int, list[int]]] = []  # (interval, optimizer step, blocks) of every draw
        self.probabilities: Tensor | None = None
        self.seconds = 0.0  # spent on scores and draws so far

    @property
    def active_blocks(self) -> list[int]:
        """The blocks that train now, ascending."""
        return self.history[-1][2] if self.history else []

    # ------------------------------------------------------------------ when it acts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies that can't let the trained blocks change."""
        if stage == "fit":
            require_layerwise(trainer.strategy)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the blocks and checks the settings against them; nothing is frozen yet."""
        layers = decoder_layers(pl_module)
        self.check(len(layers), architecture_of(getattr(causal_lm(pl_module), "config", None)))
        # What a user froze before (LoRA's base, say) is none of our business.
        self._trainable = [p for p in pl_module.parameters() if p.requires_grad]
        self._layers = [nn.ParameterList(p for p in layer.parameters() if p.requires_grad) for layer in layers]
        outside = non_block_parameters(pl_module)
        always = {p for part in self.always_train for p in outside[part]}
        self._others = [(p, p in always) for part in outside.values() for p in part if p.requires_grad]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the blocks and draws the first ones, or puts back those of the run that is resumed."""
        if self.probabilities is None:
            self._score(trainer, pl_module)
        if self.history:
            self._activate(trainer)
            self._write_history(self._folder(trainer))
        else:
            self._draw(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draws new blocks where this batch is the first of an interval."""
        if self.should_draw(trainer.global_step):
            if self.rescore_every is not None and len(self.history) % self.rescore_every == 0:
                self._score(trainer, pl_module)
            self._draw(trainer)

    def should_draw(self, step: int) -> bool:
        """Whether optimizer step ``step`` (from 0) needs a draw that has not happened. Override to draw at other times."""
        return step // self.interval_steps > self.history[-1][0]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Names the blocks that never trained."""
        never = sorted(set(range(len(self._layers))) - {block for _, _, blocks in self.history for block in blocks})
        if never:
            log.warning(
                "%d of %d blocks never trained in %d intervals: %s. A higher `activated_layers` or a lower `interval_steps` "
                "reaches more.",
                len(never),
                len(self._layers),
                len(self.history),
                ", ".join(map(str, never)),
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unfreezes what this callback froze."""
        if stage == "fit":
            for p in getattr(self, "_trainable", []):
                p.requires_grad_(True)

    # ------------------------------------------------------------------ what it does

    def check(self, num_layers: int, architecture: Mapping[str, Any]) -> None:
        """Checks the settings against what is known of a model before its weights are.

        Args:
            num_layers: Number of the model's blocks.
            architecture: See `architecture_of`.

        Raises:
            UsageError: More blocks are to train than there are or can be drawn, the weights are those of another number of
                blocks, or the scores those of another model.
        """
        if self.activated_layers > num_layers:
            raise UsageError(
                f"sampling.activated_layers: {self.activated_layers} is more than the model's {num_layers} blocks"
            )
        ratios: Sequence[float] = [1.0] * num_layers
        if self.scores is not None:
            ratios = OutlierScores.load(Path(self.scores)).ratios_for(num_layers, architecture, self.distribution)
        draw_blocks(sampling_probabilities(ratios, self.distribution), self.activated_layers, torch.Generator())

    def blocks_of(self, interval: int) -> list[int]:
        """Draws the blocks of an interval, which follow from the probabilities, the seed and the interval alone."""
        assert self.probabilities is not None
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + interval)
        return draw_blocks(self.probabilities, self.activated_layers, generator)

    def compute_scores(self, pl_module: LightningModule, loader: Any) -> OutlierScores:
        """Returns the blocks' scores and the probabilities that follow from them.

        Args:
            pl_module: The module with the model.
            loader: The train DataLoader; calibration rows are taken from its data set, not from its position.
        """
        config = getattr(causal_lm(pl_module), "config", None)
        num_layers, architecture = len(decoder_layers(pl_module)), architecture_of(config)
        threshold, samples = self.threshold, 0
        ratios: Sequence[float] | Tensor = torch.zeros(num_layers)
        if self.scores is not None:
            known = OutlierScores.load(Path(self.scores))
            ratios = known.ratios_for(num_layers, architecture, self.distribution)
            threshold, samples = known.threshold, known.calibration_samples
        elif self.distribution == "weight_norm":
            ratios = layer_weight_norms(pl_module)
        elif self.distribution in ("outlier", "outlier_reverse"):
            samples = self.calibration_samples
            with pl_module.trainer.precision_plugin.forward_context():
                ratios = layer_outlier_ratios(pl_module, self._calibration_batches(loader), self.threshold)
        return OutlierScores(
            model=pl_module.hparams.get("model_name_or_path", getattr(config, "_name_or_path", "")),
            num_layers=num_layers,
            threshold=threshold,
            calibration_samples=samples,
            distribution=self.distribution,
            outlier_ratios=torch.as_tensor(ratios).tolist(),
            probabilities=sampling_probabilities(ratios, self.distribution).tolist(),
            architecture=architecture,
        )

    def _calibration_batches(self, loader: Any) -> Iterable[dict[str, Tensor]]:
        """Training rows, the same on every rank, through a loader of their own so that the run's data order stays as it is."""
        if not isinstance(loader, DataLoader):
            raise UsageError("sampling.scores: give a file from `main.py score`; calibration needs a single train DataLoader")
        dataset = loader.dataset
        kind: Any = DataLoader
        if isinstance(dataset, IterableDataset):
            # The run's own position stays: the copy moves, and a loader of its kind knows what its rows look like.
            dataset, kind = copy.deepcopy(dataset), type(loader)
        else:
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed))  # type: ignore[arg-type]
            dataset = Subset(dataset, order[: self.calibration_samples].tolist())
        size = min(loader.batch_size or 1, self.calibration_samples)
        # A generator of its own: a DataLoader without one draws from the global one, and the run's order would change.
        batches = kind(dataset, batch_size=size, collate_fn=loader.collate_fn, generator=torch.Generator())
        return itertools.islice(batches, -(-self.calibration_samples // size))

    def _score(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the sampling probabilities of the coming intervals, and writes them down."""
        start = time.perf_counter()
        self.outlier_scores = trainer.strategy.broadcast(self.compute_scores(pl_module, trainer.train_dataloader))
        self.probabilities = torch.tensor(self.outlier_scores.probabilities, dtype=torch.float64)
        self._log_timing(trainer, "scoring_s", start)
        folder = self._folder(trainer)
        if trainer.is_global_zero:
            self.outlier_scores.save(folder / "outlier_scores.json")

    def _draw(self, trainer: Trainer) -> None:
        """Draws the blocks of a new interval and lets them train."""
        start = time.perf_counter()
        interval = trainer.global_step // self.interval_steps
        self.history.append((interval, trainer.global_step, self.blocks_of(interval)))
        self._activate(trainer)
        self._log_timing(trainer, "drawing_s", start, interval=float(interval))
        self._write_history(self._folder(trainer))

    def _activate(self, trainer: Trainer) -> None:
        activate_blocks(self._layers, self.active_blocks, self._others, trainer.optimizers)

    @rank_zero_only
    def _write_history(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "sampling_history.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["interval", "step", "blocks"])
            writer.writerows([interval, step, " ".join(map(str, blocks))] for interval, step, blocks in self.history)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir)

    def _log_timing(self, trainer: Trainer, name: str, start: float, **metrics: float) -> None:
        seconds = time.perf_counter() - start
        self.seconds += seconds
        for logger in trainer.loggers:
            logger.log_metrics({name: seconds, **metrics}, step=trainer.global_step)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: probabilities and the draws so far. Tensors and plain values only."""
        return {
            "probabilities": self.probabilities,
            "history": [(interval, step, list(blocks)) for interval, step, blocks in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of the run that is resumed; ``on_train_start`` applies it."""
        self.probabilities = state_dict["probabilities"]
        self.history = [(interval, step, list(blocks)) for interval, step, blocks in state_dict["history"]]
