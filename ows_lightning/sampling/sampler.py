"""BlockSampler: which decoder blocks train and when that changes, for any training loop."""

import csv
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ows_lightning.checkpoints.fixed_settings import check_fixed_settings, plain, sampling_settings
from ows_lightning.compat import drop_input_gradients
from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import NON_BLOCK_PARTS, Part, decoder_layers, language_model_of, non_block_parameters
from ows_lightning.optim.sharding import total_norm
from ows_lightning.optim.subspace import derived_seed
from ows_lightning.sampling import activation
from ows_lightning.sampling.calibration import calibration_batches
from ows_lightning.sampling.distributions import OUTLIER_RATIO, Distribution, sampling_probabilities, score_name
from ows_lightning.sampling.draws import draw_blocks, draw_window
from ows_lightning.sampling.outliers import layer_outlier_ratios, layer_weight_norms
from ows_lightning.sampling.scores import BlockScores, architecture_of

log = logging.getLogger(__name__)
NORM_DECAY = 0.9  # of the exponential mean of gradient norms, by optimizer step


class BlockSampler:
    """Draws the blocks that train, freezes the others, and remembers what a resumed run needs.

    It knows no training framework: ``LayerwiseSampling`` drives it from Lightning's hooks, and your own loop can do the same::

        compute = lambda: sampler.compute_scores(model, loader)    # of the rows that train
        sampler.load_state_dict(state)                             # only to resume a run; before or after `attach`
        sampler.attach(model)                                      # once every parameter is in the optimizer
        sampler.start(step, [optimizer], compute)                  # the first draw, or the last one of a resumed run again
        sampler.advance(step, [optimizer], compute)                # before every step's forward pass
        sampler.observe([optimizer])                               # before every optimizer.step(), for `gradient_norm`
        sampler.release()                                          # at the end, also after an exception

    The draw of interval i depends only on ``seed``, i and the probabilities: a resumed run and every rank draw the same.

    Args:
        activated_layers: Blocks that train at a time (gamma).
        interval_steps: Optimizer steps between two draws (K).
        distribution: ``outlier`` (OWS) | ``uniform`` (LISA) | ``decreasing`` (LISA-D) | ``increasing`` | ``outlier_reverse`` |
            ``weight_norm`` | ``window`` (neighbouring blocks, by the sum of their outliers) | ``gradient_norm`` (by the mean
            norm of each block's gradients), or a list with a weight for each block.
        threshold: A weight is an outlier if its score exceeds ``threshold`` (tau) times the block's mean.
        calibration_samples: How many training rows the scores are computed from.
        scores: A JSON file written by ``score`` or by an earlier run; then none are computed at the start.
        rescore_every: Compute the scores again after this many intervals; None keeps the first ones.
        always_train: What trains outside the blocks: any of ``embeddings``, ``lm_head``, ``norm``. A weight that embeddings
            and head share trains if either is named.
        seed: Seeds the draws and the choice of calibration rows.
        grouping: Chance, 0.0 to 1.0, that a draw is a grouped one. Every block trains as often as with 0, the paper's draws,
            but beside blocks of similar depth: the lowest active block, which decides a step's time, is higher on average.
        resting_rank: Rank in which the matrices of frozen blocks above the lowest active one train in a random subspace, drawn
            anew whenever a block begins to rest; needs GaLoreAdamW. 0, the paper's method, does not train them.

    Attributes:
        history: (interval, optimizer step, blocks) of every draw so far.
        probabilities: Shape (num_layers,), float64; None before the first draw.
        outlier_scores: The scores that the probabilities come from; None before the first draw.
        seconds: Seconds spent on scores and draws so far.

    Raises:
        UsageError: A setting is out of range.
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
        grouping: float = 0.0,
        resting_rank: int = 0,
    ) -> None:
        distribution = plain(distribution)  # not NumPy's or torch's: JSON, generators and safe checkpoints want plain values
        counts = {"activated_layers": activated_layers, "interval_steps": interval_steps}
        counts |= {"calibration_samples": calibration_samples, "rescore_every": 1 if rescore_every is None else rescore_every}
        for key, number in {**counts, "resting_rank": resting_rank, "seed": seed}.items():
            if not isinstance(number, Integral) or isinstance(number, bool):
                raise UsageError(f"sampling.{key}: {number!r} is no whole number")
        parts = isinstance(always_train, (list, tuple)) and {*always_train} <= {*NON_BLOCK_PARTS}
        for name, value, valid, limit in (
            *((key, number, number >= 1, "must be at least 1") for key, number in counts.items()),
            ("threshold", threshold, 0 < threshold < math.inf, "must be a finite number above 0 (the paper's is 13)"),
            ("always_train", always_train, parts, f"is no list of names among {', '.join(NON_BLOCK_PARTS)}"),
            ("grouping", grouping, 0 <= grouping <= 1, "is not between 0 (independent draws) and 1"),
            ("resting_rank", resting_rank, resting_rank >= 0, "must be at least 1, or 0: frozen blocks stay as they are"),
        ):
            if not valid:
                raise UsageError(f"sampling.{name}: {value} {limit}")
        if grouping > 0 and distribution == "window":
            raise UsageError("sampling.grouping: the blocks of a window are neighbours already; leave it out, or take outlier")
        self.activated_layers, self.interval_steps = int(activated_layers), int(interval_steps)
        self.distribution, self.threshold, self.scores = distribution, float(threshold), scores
        self.calibration_samples, self.rescore_every = int(calibration_samples), plain(rescore_every)
        self.always_train, self.seed = tuple(always_train), int(seed)
        self.grouping, self.resting_rank = float(grouping), int(resting_rank)
        self._model: nn.Module | None = None
        self._blocks: list[nn.ParameterDict] = []
        self._others: dict[nn.Parameter, bool] = {}
        self._frozen: set[nn.Parameter] = set()
        self.reset()

    @property
    def active_blocks(self) -> list[int]:
        """The blocks that train now, ascending."""
        return self.history[-1][2] if self.history else []

    @property
    def gradient_norms(self) -> list[float]:
        """Of each block, for `gradient_norm`: the mean norm of its gradient per weight, 0 where it has not been active yet."""
        return self._norms.tolist()

    def reset(self) -> None:
        """Forgets an earlier run."""
        self.outlier_scores: BlockScores | None = None
        self.history: list[tuple[int, int, list[int]]] = []
        self.probabilities: Tensor | None = None
        self.seconds = 0.0
        self._norms = torch.zeros(0)  # what `gradient_norms` lists, on the gradients' device
        self._written: tuple[int, BlockScores | None] = 0, None  # the draws and the scores that `write` has written
        self._loaded_settings: dict[str, Any] | None = None  # of a state that was loaded, until `start` goes on from it

    def attach(self, model: nn.Module) -> None:
        """Finds the blocks and checks the settings against them, see `check`; nothing is frozen yet.

        An earlier run is forgotten, except a state that was loaded; what it left frozen is unfrozen.
        """
        self.release()
        self._model, self._frozen = model, activation.track_frozen(model)
        if self._loaded_settings is None:
            self.reset()
        self.check(len(decoder_layers(model)), architecture_of(getattr(language_model_of(model), "config", None)))
        self._blocks = activation.trainable_by_block(model)
        self._others = activation.non_block_trains(model, self.always_train)
        if warning := self.check_resting_rank(self._blocks):
            log.warning("%s, which stay frozen at rest", warning)
        untrainable = [index for index, block in enumerate(self._blocks) if not len(block)]
        if len(untrainable) == len(self._blocks):
            name = type(language_model_of(model)).__name__
            raise UsageError(f"sampling: no block of {name} has a weight to train; unfreeze them, or train without sampling")
        if untrainable:
            log.warning("Blocks %s have no weight to train, and only a window includes them", untrainable)
        if self.distribution != "window" and self.activated_layers > (count := len(self._blocks) - len(untrainable)):
            fault = f"{self.activated_layers} is more than the {count} blocks that can train"
            raise UsageError(f"sampling.activated_layers: {fault}")
        others = set(non_block_parameters(model)["other"])
        if foreign := [name for name, p in model.named_parameters() if p in others and p.requires_grad]:
            log.warning("%s and all else outside the decoder stays frozen while blocks are sampled", foreign[0])
        drop_input_gradients(language_model_of(model))  # else frozen blocks below the active ones are recomputed

    def start(self, step: int, optimizers: Iterable[Optimizer], compute: Callable[[], BlockScores]) -> dict[str, float]:
        """Draws the first blocks, or puts back those of the run that is resumed; arguments and result as of `advance`."""
        optimizers, self._written = [*map(activation.unwrapped, optimizers)], (0, None)
        self._check_optimizers(optimizers)
        if self._loaded_settings is not None:  # not as early as it is loaded: what evaluates a checkpoint loads it, too
            check_fixed_settings(self._loaded_settings, sampling_settings(self), prefix="sampling")
            self._loaded_settings = None
        if not self.history:
            return self.advance(step, optimizers, compute)
        self.activate(optimizers)
        interval, drawn, _ = self.history[-1]
        return {"interval": float(interval)} if drawn == step else {}  # saved within the step that the draw was for

    def _check_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Refuses optimizers that hold no weight of some block, which would never train; see also `check_optimizer`."""
        held = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for optimizer in dict.fromkeys(held[p] for p in activation.block_matrices(self._blocks) if p in held):
            self.check_optimizer(optimizer)
        if left_out := [i for i, block in enumerate(self._blocks) if len(block) and held.keys().isdisjoint(block.values())]:
            fault = f"the optimizer holds no weight of blocks {left_out}, which would train nothing"
            raise UsageError(f"sampling: {fault}; build it from all parameters, before any is frozen")

    def advance(self, step: int, optimizers: Iterable[Optimizer], compute: Callable[[], BlockScores]) -> dict[str, float]:
        """Draws new blocks if an interval begins, and lets them train.

        Args:
            step: The optimizer step that comes, from 0.
            optimizers: Those that hold the parameters.
            compute: Gives the blocks' scores, the same on every rank; called when there are none, or new ones are due, as they
                are at every draw by ``gradient_norm``.

        Returns:
            Seconds by what they were spent on, and the number of the interval; empty if no draw was due.
        """
        if self.history and (step == self.history[-1][1] or not self.should_draw(step)):
            return {}
        figures = {}
        new = self.rescore_every is not None and len(self.history) % self.rescore_every == 0
        if self.probabilities is None or new or self.distribution == "gradient_norm":
            start = time.perf_counter()
            self.outlier_scores = self._without_untrainable_blocks(compute())
            self.probabilities = torch.tensor(self.outlier_scores.probabilities, dtype=torch.float64, device="cpu")
            figures["scoring_s"] = time.perf_counter() - start
        start = time.perf_counter()
        # `should_draw` may be overridden to draw within an interval: that draw needs a number of its own.
        interval = max(step // self.interval_steps, self.history[-1][0] + 1 if self.history else 0)
        self.history.append((interval, step, self.blocks_of(interval)))
        self.activate([*optimizers])
        figures["drawing_s"] = time.perf_counter() - start
        self.seconds += sum(figures.values())
        return {**figures, "interval": float(interval)}

    def _without_untrainable_blocks(self, scores: BlockScores) -> BlockScores:
        """The scores, with a probability of 0 for blocks that have no weight to train."""
        if all(map(len, self._blocks)):
            return scores
        kept = [p if len(block) else 0.0 for p, block in zip(scores.probabilities, self._blocks, strict=True)]
        return replace(scores, probabilities=sampling_probabilities(kept, kept).tolist())

    def should_draw(self, step: int) -> bool:
        """Whether optimizer step ``step`` (from 0) needs a draw that has not happened. Override to draw at other times."""
        return step // self.interval_steps > self.history[-1][1] // self.interval_steps

    @torch.no_grad()
    def observe(self, optimizers: Iterable[Optimizer]) -> None:
        """Updates the mean gradient norms of active blocks, if the draws depend on them.

        Call it before every optimizer step, when the gradients are complete. For GaLoreAdamW these are the projected
        gradients, else ``grad``. Gradients that are not finite are ignored. No device is waited for: a draw reads the means.
        """
        if self.distribution != "gradient_norm":
            return
        projected: dict[Tensor, Tensor] = {}
        for optimizer in map(activation.unwrapped, optimizers):
            if hasattr(optimizer, "projected_gradients"):
                optimizer.gradients()
                projected |= optimizer.projected_gradients
        for index in self.active_blocks:
            weights = self.weights_of([index])
            gradients = [gradient for p in weights if (gradient := projected.get(p, p.grad)) is not None]
            if not gradients:
                continue
            norm = total_norm(gradients) / math.sqrt(sum(p.numel() for p in weights))
            if self._norms.numel() == 0:
                self._norms = norm.new_zeros(len(self._blocks))
            self._norms = self._norms.to(norm)
            before = self._norms[index]
            mean = torch.where(before > 0, NORM_DECAY * before + (1 - NORM_DECAY) * norm, norm)
            before.copy_(torch.where((norm > 0) & norm.isfinite(), mean, before))

    def activate(self, optimizers: Sequence[Optimizer]) -> None:
        """Lets the active blocks train, and freezes the others or lets them rest."""
        self._frozen.clear()  # in place: the model and peft's layers hold this very set
        others, rest = self._others.items(), (self.resting_rank, derived_seed(self.seed, self.history[-1][0]))
        self._frozen |= activation.activate_blocks(self._blocks, self.active_blocks, others, optimizers, *rest)

    def release(self) -> None:
        """Unfreezes what was frozen, and drops the references to the model; what rests does so until the optimizer ends it."""
        if self._model is not None and getattr(language_model_of(self._model), "frozen_by_sampling", None) is self._frozen:
            activation.unfreeze(self._model)  # else another sampler has it by now
        self._model, self._blocks, self._others, self._frozen = None, [], {}, set()

    def warn_of_never_trained(self) -> None:
        """Warns of the blocks that were never drawn, and never trained at rest either."""
        blocks = len(self._blocks)
        if never := sorted({index for index in range(blocks) if len(self._blocks[index])} - self.trained_blocks()):
            hint = "A higher `activated_layers` or a lower `interval_steps` reaches more"
            what = f"{len(never)} of {blocks} blocks never trained in {len(self.history)} intervals"
            log.warning("%s: %s. %s.", what, ", ".join(map(str, never)), hint)

    def write(self, folder: Path | None) -> None:
        """Writes what is new into ``outlier_scores.json`` and ``sampling_history.csv``, if there is a folder for them.

        The first call of a run replaces what an earlier run left there.
        """
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        draws, scores = self._written
        if self.outlier_scores is not None and self.outlier_scores is not scores:
            self.outlier_scores.save(folder / "outlier_scores.json")
        with (folder / "sampling_history.csv").open("a" if draws else "w", newline="") as file:
            writer = csv.writer(file)
            if not draws:
                writer.writerow(["interval", "step", "blocks", *(["resting"] if self.resting_rank else [])])
            for interval, step, active in self.history[draws:]:
                blocks = [active, self.resting_blocks(active)] if self.resting_rank else [active]
                writer.writerow([interval, step, *(" ".join(map(str, each)) for each in blocks)])
        self._written = len(self.history), self.outlier_scores

    def check(self, num_layers: int, architecture: Mapping[str, Any]) -> None:
        """Checks the settings against a model's dimensions, see `architecture_of`, before its weights are loaded.

        A UsageError says that fewer blocks can be drawn, or that the list of weights or the scores are of another model.
        """
        ratios: Sequence[float] = [1.0] * num_layers
        if self.scores is not None and self.distribution != "gradient_norm":
            ratios = BlockScores.load(self.scores).scores_for(num_layers, architecture, self.distribution)
        # A window also takes in blocks whose own probability is zero.
        distribution = "uniform" if self.distribution == "window" else self.distribution
        draw_blocks(sampling_probabilities(ratios, distribution), self.activated_layers, torch.Generator())  # may raise

    def check_resting_rank(self, blocks: Iterable[nn.Module]) -> str | None:
        """Returns a warning if `resting_rank` is too high for some matrices of the blocks; a UsageError if it is for all."""
        matrices = activation.block_matrices(blocks)
        small = [p for p in matrices if p.size(-1) <= self.resting_rank]
        which = f"{len(small)} of the {len(matrices)} matrices of the blocks"
        warning = f"sampling.resting_rank: {self.resting_rank} is no less than the inputs of {which}"
        if small and len(small) == len(matrices):
            raise UsageError(f"{warning}; give at most {max(p.size(-1) for p in small) - 1}")
        return warning if small else None

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuses an optimizer that can't let blocks rest, or that moves frozen ones: a UsageError."""
        if self.resting_rank and not hasattr(optimizer, "rest"):
            what = f"{type(optimizer).__name__} can't train frozen blocks at rest"
            raise UsageError(f"sampling.resting_rank: {what}; take GaLoreAdamW, or set it to 0")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UsageError("sampling: LBFGS steps all weights by one history, frozen ones, too; take another optimizer")

    def blocks_of(self, interval: int) -> list[int]:
        """Draws the blocks of an interval, which follow from the probabilities, the seed and the interval alone."""
        assert self.probabilities is not None
        generator = torch.Generator().manual_seed(derived_seed(self.seed, interval))
        if self.distribution == "window":
            return draw_window(self.probabilities, self.activated_layers, generator)
        return draw_blocks(self.probabilities, self.activated_layers, generator, self.grouping)

    def planned_blocks(self, steps: int) -> set[int] | None:
        """Returns all blocks that train in a run of ``steps`` optimizer steps; None if that can't be known before it."""
        at_other_times = getattr(self.should_draw, "__func__", None) is not BlockSampler.should_draw
        if not self.history or self.rescore_every is not None or self.distribution == "gradient_norm" or at_other_times:
            return None
        return self.trained_blocks(map(self.blocks_of, range(self.history[-1][0] + 1, -(-steps // self.interval_steps))))

    def weights_of(self, blocks: Iterable[int]) -> list[nn.Parameter]:
        """Returns the weights that train where these blocks are drawn."""
        return [p for block in blocks for p in self._blocks[block].values()]

    def trained_blocks(self, coming: Iterable[Sequence[int]] = ()) -> set[int]:
        """Returns the blocks that were drawn so far or will be, and those that train at rest meanwhile."""
        draws = [*(blocks for _, _, blocks in self.history), *coming]
        return {block for blocks in draws for block in [*blocks, *self.resting_blocks(blocks)]}

    def resting_blocks(self, active: Sequence[int]) -> list[int]:
        """Returns the blocks that train at rest while others are active: with a `resting_rank`, all above the lowest."""
        count = 0 if self.probabilities is None or not self.resting_rank else len(self.probabilities)
        can_rest = [any(p.size(-1) > self.resting_rank for p in activation.block_matrices([block])) for block in self._blocks]
        first = {p: index for index, block in reversed([*enumerate(self._blocks)]) for p in block.parameters()}
        lowest = min((first[p] for p in self.weights_of(active)) if first else active, default=count)  # Zamba shares weights
        return [block for block in range(lowest + 1, count) if block not in active and (not can_rest or can_rest[block])]

    def compute_scores(self, model: nn.Module, loader: Any) -> BlockScores:
        """Returns the blocks' scores and probabilities; calibration takes rows of the train DataLoader, not its position."""
        config = getattr(language_model_of(model), "config", None)
        num_layers, architecture = len(decoder_layers(model)), architecture_of(config)
        threshold, samples = self.threshold, 0
        ratios: Sequence[float] | Tensor = [0.0] * num_layers
        if self.distribution == "gradient_norm":
            ratios = self.gradient_norms or ratios  # which are equal before there are any
        elif self.scores is not None and self.outlier_scores is None:  # `rescore_every` measures
            known = BlockScores.load(self.scores)
            ratios = known.scores_for(num_layers, architecture, self.distribution)
            threshold, samples = known.threshold, known.calibration_samples
            if threshold != self.threshold and score_name(self.distribution) == OUTLIER_RATIO:
                text = "sampling.threshold: %g counts where blocks are scored again alone; the scores in '%s' are those of %g"
                log.warning(text, self.threshold, self.scores, threshold)
        elif self.distribution == "weight_norm":
            ratios = layer_weight_norms(model)
        elif score_name(self.distribution) == OUTLIER_RATIO:
            samples = self.calibration_samples
            ratios = layer_outlier_ratios(model, calibration_batches(loader, samples, self.seed), self.threshold)
        return BlockScores(
            model=getattr(config, "_name_or_path", ""), architecture=architecture, num_layers=num_layers,
            distribution=self.distribution, threshold=threshold, calibration_samples=samples,
            outlier_ratios=torch.as_tensor(ratios, dtype=torch.float64).tolist(),
            probabilities=sampling_probabilities(ratios, self.distribution).tolist(),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: settings, scores, probabilities and draws so far. Tensors and plain values only."""
        return {
            "settings": sampling_settings(self),
            "scores": None if self.outlier_scores is None else asdict(self.outlier_scores),
            "probabilities": self.probabilities,
            "history": [(interval, step, list(blocks)) for interval, step, blocks in self.history],
            "seconds": self.seconds,
            "gradient_norms": self.gradient_norms,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of the run that is resumed; `start` applies it, and refuses that of other settings."""
        self._loaded_settings = state_dict.get("settings") or sampling_settings(self)  # older states have none to compare
        self.outlier_scores = None if (scores := state_dict.get("scores")) is None else BlockScores(**scores)
        saved = state_dict["probabilities"]
        self.probabilities = None if saved is None else torch.as_tensor(saved, dtype=torch.float64, device="cpu")
        self.history = [(interval, step, list(blocks)) for interval, step, blocks in state_dict["history"]]
        self.seconds = state_dict.get("seconds", 0.0)
        self._norms = torch.tensor(state_dict.get("gradient_norms", []), dtype=torch.float64, device="cpu")
