"""Changes to the method that the studies ``recipe`` and ``length`` try: what does not help stays out of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from ows_lightning import LayerwiseSampling
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.optim import galore, resting
from ows_lightning.optim.projected_adamw import adam_
from ows_lightning.sampling.inclusion import inclusion_probabilities


def active_parameters(trainer: Trainer, module: LightningModule) -> dict[int, list[nn.Parameter]]:
    """The trained parameters of each block that is active now."""
    sampling = LayerwiseSampling.of(trainer)
    assert sampling is not None
    layers = decoder_layers(module)
    return {block: [p for p in layers[block].parameters() if p.requires_grad] for block in sampling.active_blocks}


class RateByInclusion(Callback):
    r"""Divides a block's updates by its chance of being drawn, so that all blocks move equally far in expectation.

    The update of block l is multiplied by :math:`(\gamma / L) / \pi_l`, whose mean over what is drawn is 1, with
    :math:`\pi_l` of ``inclusion_probabilities``. Weights are what is scaled, since Adam ignores a gradient's scale.
    """

    def __init__(self) -> None:
        self._before: dict[int, list[Tensor]] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keeps the active blocks' weights."""
        active = active_parameters(trainer, pl_module)
        self._before = {block: [p.detach().clone() for p in parameters] for block, parameters in active.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Scales the step that was taken, if one was."""
        sampling = LayerwiseSampling.of(trainer)
        assert sampling is not None
        assert sampling.probabilities is not None
        chances = inclusion_probabilities(sampling.probabilities, sampling.activated_layers)
        for block, parameters in active_parameters(trainer, pl_module).items():
            factor = sampling.activated_layers / len(chances) / float(chances[block])
            for p, before in zip(parameters, self._before.pop(block, []), strict=False):
                p.copy_(before.lerp(p, factor))


class KeptMoments(Callback):
    """Keeps a block's moments and subspaces in host memory while it is frozen, and gives them back when it is drawn again."""

    def __init__(self) -> None:
        self._kept: dict[nn.Parameter, dict[str, Any]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Copies the active blocks' state, which a draw may free before the next step."""
        state = trainer.optimizers[0].state
        for parameters in active_parameters(trainer, pl_module).values():
            for p in parameters:
                if p in state:
                    self._kept[p] = {key: value.to("cpu", copy=True) for key, value in state[p].items()}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Gives blocks that return their state, before the first gradient is projected."""
        state = trainer.optimizers[0].state
        for parameters in active_parameters(trainer, pl_module).values():
            for p in parameters:
                if p not in state and p in self._kept:
                    kept = self._kept[p]
                    state[p] = {key: value if key == "step" else value.to(p.device) for key, value in kept.items()}


class KeptRest(Callback):
    """Lets a block that rests again go on with the subspaces and moments of its first rest, instead of new ones."""

    def __init__(self) -> None:
        self._kept: dict[Tensor, dict[str, Any]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sees what a draw ends and begins."""
        sampling = LayerwiseSampling.of(trainer)
        assert sampling is not None
        sampling.activate = partial(self._activate, sampling.activate)  # type: ignore[method-assign]

    def _activate(self, activate: Callable[[list[Optimizer]], None], optimizers: Iterable[Optimizer]) -> None:
        optimizers = list(optimizers)
        for optimizer in optimizers:
            self._kept.update({p: state for p, state in optimizer.state.items() if "rest" in state})
        activate(optimizers)
        for optimizer in optimizers:
            begins = [p for p, state in optimizer.state.items() if state.keys() == {"rest"} and p in self._kept]
            optimizer.state.update({p: self._kept[p] for p in begins})


class SharedSubspaces(Callback):
    """Gives weights of one width whose rest begins together one subspace, which depends on the draw's seed alone.

    A package that took this over would keep one Q instead of a block's seven, and one X Q for all layers of one input.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the choice of subspaces over."""
        self._rule, resting._resting_subspace = resting._resting_subspace, self._subspace

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives it back."""
        resting._resting_subspace = self._rule

    @staticmethod
    def _subspace(weight: Tensor, rest: Tensor, number: int) -> Tensor:
        return resting.random_subspace(weight, rest.numel(), int(rest[0]))


class SlowRest(Callback):
    """Multiplies the learning rate of blocks at rest by a factor.

    Adam moves each of the m x r' numbers of a resting matrix about as far as each of the m x r of an active one, however
    little of the gradient its random subspace sees.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the settings of each weight's update over."""
        (optimizer,) = trainer.optimizers
        assert isinstance(optimizer, galore.GaLoreAdamW)
        optimizer._advance_state = partial(self._settings, optimizer, optimizer._advance_state)  # type: ignore[method-assign]

    def _settings(
        self, optimizer: galore.GaLoreAdamW, settings: Callable[..., dict[str, Any]], p: nn.Parameter, *which: Any
    ) -> dict[str, Any]:
        found = settings(p, *which)
        return {**found, "lr": found["lr"] * self.factor} if optimizer.is_resting(p) else found


class PolarDirection(Callback):
    """Projected matrices move along the polar factor of their first moment instead of Adam's quotient.

    The second moment is not used; a package that took this over would not keep it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the update rule of projected matrices over; all others keep theirs."""
        self._rule, galore.projected_adamw_ = galore.projected_adamw_, self._step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives it back."""
        galore.projected_adamw_ = self._rule

    def _step(
        self,
        weight: Tensor,
        gradient: Tensor,
        projector: Tensor | None,
        exp_avg: Tensor,
        *state: Any,
        **settings: Any,
    ) -> None:
        if projector is None:
            self._rule(weight, gradient, projector, exp_avg, *state, **settings)
            return
        exp_avg.lerp_(gradient.to(exp_avg.dtype), 1 - settings["betas"][0])
        direction = polar_factor(exp_avg).to(weight.dtype)
        update = direction @ projector.mT if settings["side"] == "right" else projector @ direction
        weight.sub_(update, alpha=settings["lr"] * settings["scale"])


def polar_factor(matrix: Tensor) -> Tensor:
    """Returns U V^T of a matrix U S V^T, with entries of the mean size 0.2, about Adam's (Moonlight, arXiv 2502.16982)."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return 0.2 * max(matrix.shape[-2:]) ** 0.5 * (u @ vh)


class ScaledGradient(Optimizer):
    """Matrices move along their whole gradients, whose rows a low-rank Adam scales (APOLLO, arXiv 2412.05270).

    With Adam's direction D of R = G Q, for a random orthonormal Q of rank r, row i of the update is |D_i| / |R_i| G_i.
    """

    def __init__(
        self, params: Any, lr: float, rank: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "rank": rank, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step; returns what the closure does."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(self._direction(p, group), alpha=group["lr"])
        return loss

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state, gradient = self.state[p], p.grad
        assert gradient is not None
        if not state:
            state["step"] = 0
            if p.dim() == 2:
                state["projector"] = torch.linalg.qr(torch.randn(p.size(1), group["rank"])).Q
            shape = p.shape if p.dim() < 2 else (p.size(0), group["rank"])
            state["exp_avg"], state["exp_avg_sq"] = p.new_zeros(shape), p.new_zeros(shape)
        state["step"] += 1
        projected = gradient if p.dim() < 2 else gradient @ state["projector"]
        direction = adam_(state["exp_avg"], state["exp_avg_sq"], projected, state["step"], group["betas"], group["eps"])
        if p.dim() < 2:
            return direction
        return gradient * (direction.norm(dim=1) / projected.norm(dim=1).clamp_min(1e-12))[:, None]


class BalancedDraws(Callback):
    """Draws blocks with the chances of independent draws, but each as often as can be expected, give or take one.

    A round has as many intervals as it takes to draw every block once on average. In each round the blocks lie in a new random
    order, block l on a stretch as long as its inclusion probability; a comb with teeth 1 apart takes the blocks that it
    meets, and moves on by the same part of 1 from interval to interval (systematic sampling). With equal chances that is a
    deck of cards that is shuffled anew when it is used up.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the draws over."""
        sampling = LayerwiseSampling.of(trainer)
        assert sampling is not None
        sampling.blocks_of = partial(balanced_blocks, sampling)  # type: ignore[method-assign]


def balanced_blocks(sampling: LayerwiseSampling, interval: int) -> list[int]:
    """Returns the blocks of an interval, ascending; they follow from the probabilities, the seed and the interval alone."""
    assert sampling.probabilities is not None
    count = sampling.activated_layers
    chances = inclusion_probabilities(sampling.probabilities, count)
    intervals = -(-len(chances) // count)
    round_, place = divmod(interval, intervals)
    generator = np.random.default_rng([sampling.seed, round_])
    order = generator.permutation(len(chances))
    first = generator.random() / intervals
    ends = np.cumsum(chances[order])
    comb = (first + place / intervals + np.arange(count)) * ends[-1] / count
    return sorted(order[np.searchsorted(ends[:-1], comb, side="right")].tolist())
