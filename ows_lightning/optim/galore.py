"""GaLoreAdamW: AdamW whose moments live in a low-rank subspace of each weight's gradient."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ows_lightning.errors import UsageError
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.large_tensors import rows_at_a_time
from ows_lightning.optim.hooks import hook_gradients, remove_hook
from ows_lightning.optim.linear import offer_factors, offer_gradients
from ows_lightning.optim.projection import (
    adam_direction,
    adam_directions,
    descend_,
    descend_together_,
    project,
    project_back_,
    project_factors,
)
from ows_lightning.optim.sharding import (
    agree,
    average_,
    clip_,
    is_sharded,
    local,
    place_projected,
    place_projector,
    projected_placements,
    projector_placements,
    take_part,
    total_norm,
    whole_matrices,
)
from ows_lightning.optim.stopwatch import Stopwatch
from ows_lightning.optim.subspace import Side, leading_singular_vectors, random_subspace

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement

log = logging.getLogger(__name__)

ProjType = Literal["std", "reverse_std", "right", "left"]

PROJECTION_DEFAULTS = {"update_proj_gap": 200, "scale": 1.0, "proj_type": "std", "subspace": "randomized"}


@dataclass
class _Progress:
    """State that changes in training. Lightning's wrapper copies the optimizer's attributes: it shares this object."""

    in_backward: bool = False
    accumulating: bool = False
    averaged: bool = False
    skipped_steps: int = 0
    renewals: Stopwatch = field(default_factory=Stopwatch)
    offering: weakref.WeakSet[nn.Linear] = field(default_factory=weakref.WeakSet)


def _to_host(gradient: Tensor) -> Tensor:
    """Copies a gradient of any shape to host memory; from a GPU to pinned memory, without waiting for it."""
    if not gradient.is_cuda:
        return gradient.to("cpu")
    return torch.empty_like(gradient, device="cpu", pin_memory=True).copy_(gradient, non_blocking=True)


class GaLoreAdamW(Optimizer):
    """AdamW in which a group with ``rank`` r trains its matrices by gradient low-rank projection.

    With G (m x n) the gradient of a weight W and m >= n::

        Q = top-r right singular vectors of G        every ``update_proj_gap`` steps
        R = G Q                                      (m x r), all that is kept of G
        W <- W - lr * scale * Adam(R) Q^T

    and with the left singular vectors for m < n (GaLore, arXiv 2403.03507, algorithm 2). A leading dimension is a batch: a
    3-D expert weight has one subspace an expert. All else trains by AdamW in full rank: a group without ``rank``, a vector, a
    matrix that ``rank`` does not make smaller, a weight with more than three dimensions. Works in any training loop.

    Clipping: set ``max_grad_norm``, and every step bounds the norm of what it consumes. Clipping of ``grad``, such
    as ``torch.nn.utils.clip_grad_norm_`` or Lightning's ``gradient_clip_val`` for your own module, misses gradients that were
    projected in backward. (With LayerwiseSampling or CausalLMModule, Lightning's clipping acts on ``gradients()``.)

    Also worth knowing:

    * ``project_in_backward()`` projects each gradient as soon as backward has produced it: full gradients never add up.
    * ``gradients()`` returns what a step consumes, projected gradients where there is a rank; clip those by any rule.
    * A step with a NaN or Inf in any gradient is skipped as a whole: weights, moments and subspaces stay as they were. A
      warning names the weight, ``skipped_steps`` counts.
    * ``rest()`` lets weights that would be frozen learn a little, in a random subspace of a small rank.
    * Weights sharded by FSDP2 keep their moments sharded, see ``sharding.py``. For whole weights on several processes,
      ``average_gradients()`` averages what a step consumes: r/n of the bytes of the gradients.
    * All settings are options of the groups, as the learning rate is: a copy, a pickle and a loaded state carry them, and a
      changed one holds from the next step on (``rank`` and ``proj_type``, which give the state its shape, stay as they are).
      Gradients that wait for a step are not carried.

    Args:
        params: Parameters, named parameters or groups, e.g. from ``galore_param_groups``. Keys of a projected group:
            ``rank``, ``update_proj_gap`` (200), ``scale`` (1.0), ``proj_type`` (``std | reverse_std | right | left``),
            ``subspace`` (``randomized | svd | random``; with ``svd`` the updates equal those of galore-torch's GaLoreAdamW).
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay; acts on W.
        moments_dtype: ``float32`` or ``bfloat16``, which halves the state; moments are then rounded stochastically. Moments
            that were saved in the other dtype are converted when they are next used.
        moments_at_renewal: What happens to the moments when the subspace is renewed: ``keep`` them as numbers (GaLore),
            ``reproject`` them onto the new subspace, or ``reset`` them.
        stochastic_rounding: Round bfloat16 weights up or down at random, with the right mean, instead of to nearest.
        max_grad_norm: Limit of the joint 2-norm of all gradients that a step consumes, see ``gradients``; None clips nothing.
        state_warmup_steps: The rate of a weight rises linearly over this many first steps of its state, while its moments rest
            on few gradients. A frozen block's state is freed, so a block that is drawn warms up each time. 0 is the paper's.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        moments_dtype: Literal["float32", "bfloat16"] = "float32",
        moments_at_renewal: Literal["keep", "reproject", "reset"] = "keep",
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        state_warmup_steps: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "moments_dtype": moments_dtype,
            "moments_at_renewal": moments_at_renewal,
            "stochastic_rounding": stochastic_rounding,
            "max_grad_norm": max_grad_norm,
            "state_warmup_steps": state_warmup_steps,
        }
        _check(defaults)
        self._begin()
        super().__init__(params, defaults)

    def _begin(self) -> None:
        """Makes the attributes that are not saved. They are only changed in place, see ``_Progress``."""
        self._progress = _Progress()
        self._places: dict[Tensor, tuple[dict[str, Any], int]] = {}  # each parameter's group, and its number
        self._projected: dict[Tensor, Tensor] = {}  # R of the coming step
        self._renewed: dict[Tensor, Tensor] = {}  # projectors that the coming step switches to
        self._hosted: dict[Tensor, Tensor] = {}  # full gradients of a step that renews, in host memory
        self._random: dict[Tensor, Tensor] = {}  # projectors of resting weights, made again where they are missing

    @property
    def accumulating(self) -> bool:
        """Set it True while backward runs for a micro-batch that is not the last of its step."""
        return self._progress.accumulating

    @accumulating.setter
    def accumulating(self, value: bool) -> None:
        self._progress.accumulating = value

    @property
    def averaged(self) -> bool:
        """Set it True once where ``average_gradients()`` comes before every step: no backward pass takes a subspace then."""
        return self._progress.averaged

    @averaged.setter
    def averaged(self, value: bool) -> None:
        self._progress.averaged = value

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped so far, for a NaN or Inf."""
        return self._progress.skipped_steps

    @property
    def renewal_s(self) -> float:
        """Seconds spent on finding subspaces so far. On a GPU, reading it waits for those that are being found."""
        return self._progress.renewals.seconds

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; a projected one gets the defaults of the keys that it does not set."""
        if param_group.get("rank") is not None:
            param_group = {**PROJECTION_DEFAULTS, **param_group}
        _check(param_group)
        super().add_param_group(param_group)
        self._find_places()
        self._own(self.param_groups[-1:])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "in_backward": self._progress.in_backward}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Sets up a copy or an unpickled optimizer, or takes over a loaded state (torch calls it in ``load_state_dict``)."""
        if "_progress" not in self.__dict__:
            self._begin()
            self._progress.in_backward = state["in_backward"]
            super().__setstate__({key: value for key, value in state.items() if key != "in_backward"})
        else:
            self._discard_gradients()
            self._random.clear()
            old_state, old_groups = self.state, self.param_groups
            super().__setstate__(state)
            # In place: Lightning's wrapper has copied the attributes and shares these objects.
            new_state, new_groups = self.state, self.param_groups
            old_state.clear()
            old_state.update(new_state)
            old_groups[:] = new_groups
            self.state, self.param_groups = old_state, old_groups
        for group in self.param_groups:  # an older version's state lacks some
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._find_places()
        self._own(self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; moments keep the dtype in which they were saved (torch casts to the parameter's).

        Raises:
            ValueError: The state is of an optimizer without a ``rank``: training would go on in full rank.
        """
        for number, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            if group.get("rank") is not None and "rank" not in saved:
                raise ValueError(f"group {number} has rank {group['rank']}, the loaded state none: it is another optimizer's")
        super().load_state_dict(state_dict)
        saved_ids = (i for group in state_dict["param_groups"] for i in group["params"])
        for saved_id, (p, _) in zip(saved_ids, self._parameters(), strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if key == "rest":
                    self.state[p][key] = value.detach().to("cpu", copy=True)
                elif isinstance(value, Tensor) and key != "step":
                    dtype = p.dtype if key == "projector" else value.dtype  # it may come from a run in another precision
                    self.state[p][key] = self._place(p, key, value.detach().to(p.device, dtype, copy=True))

    def rest(self, weights: Iterable[Tensor], rank: int = 0, seed: int = 0) -> None:
        """Lets these matrices, and no others, train at rest from now on, between two steps: in a random subspace.

        A resting weight keeps one subspace, Q of shape (n, r) on the right side, until it no longer rests, at its group's
        learning rate and ``scale``, without weight decay::

            R = G Q,    W <- W - lr * scale * Adam(R) Q^T

        Its state is two moments (m x r), a step and ``rest``, the numbers that Q is made from, which is not saved. It begins
        and ends with no other: a weight that begins to rest loses the state that it trained with, and one that ends its rest
        (or is frozen) that which it rested with. One that rests already goes on.

        Args:
            weights: Matrices of shape (..., m, n) with n > rank that require a gradient; those of other optimizers count not.
            rank: Rank r.
            seed: Of this rest period; a weight's subspace follows from it and from the weight's place in the groups.

        Raises:
            ValueError: A weight is no matrix that the rank makes smaller.
        """
        resting = {p for p in weights if p in self._places}
        if wrong := [tuple(p.shape) for p in resting if p.dim() not in (2, 3) or not 0 < rank < p.size(-1)]:
            raise ValueError(f"rank: {rank} makes a weight of shape {wrong[0]} no smaller")
        for p in self._places:
            if (p in resting) == self._rests(p):
                continue
            self.state.pop(p, None)
            for left in (self._random, self._projected, self._renewed, self._hosted):
                left.pop(p, None)
            if p in resting:
                self.state[p]["rest"] = torch.tensor([rank, seed])  # sharded checkpoints want tensors

    def _rests(self, p: Tensor) -> bool:
        return "rest" in self.state.get(p, ())

    # ------------------------------------------------------------------ gradients

    def project_in_backward(self, enabled: bool = True, model: nn.Module | None = None) -> None:
        """From now on a projected matrix's gradient is projected within backward, and freed at once.

        Several backward passes before a step add up their projected gradients, as ``grad`` would add up full ones. The
        subspace is found from the whole step's gradient if ``accumulating`` is True during all backward passes but the last:
        in a step that renews a subspace, the full gradient then adds up in host memory (never on the accelerator). Where
        ``accumulating`` is left False, the subspace comes from the step's first backward pass.

        A weight's gradient goes to the newest GaLoreAdamW that holds it, and to ``grad`` again once that one is deleted. A
        loss scaler (``torch.amp.GradScaler``) would find no gradient to unscale: its step is refused.

        With ``model``, the linear layers of its blocks hand over their gradients as factors, and R = dY^T (X Q) is all that
        is computed of them, but where a subspace is renewed or a hook of yours looks at the gradient. These layers
        are ``ProjectedLinear`` until projection in backward ends; ``torch.autograd.grad`` does not know their weights.

        Args:
            enabled: False leaves the gradients of later backward passes to ``grad`` again.
            model: A module that contains the causal LM whose weights this optimizer holds.
        """
        self._progress.in_backward = enabled
        self._own(self.param_groups)
        if not enabled:
            offer_gradients(self._progress.offering)
            self._progress.offering.clear()
        elif model is not None:
            self._progress.offering.update(offer_factors(decoder_layers(model).modules()))

    def gradients(self) -> list[Tensor]:
        """Returns what the next step consumes, to be scaled or clipped in place: R of projected matrices, else ``grad``.

        Their joint 2-norm is this optimizer's gradient norm: that of the gradients' parts within the subspaces, which is at
        most that of the full gradients. Call it after the step's last backward pass.

        Returns:
            For each parameter with a gradient, in the groups' order: R, of shape (..., m, r) or (..., r, n), of a projected
            matrix, else ``grad``, of the parameter's shape.
        """
        self._consume_gradients()
        return self._gradients_of(p for p, _ in self._parameters())

    def gradient_of(self, p: Tensor) -> Tensor | None:
        """What the next step consumes of one parameter, of a shape as in ``gradients()``, which has to be called before."""
        return self._projected.get(p, p.grad)

    @torch.no_grad()
    def clip_gradients(self, value: float, algorithm: str = "norm") -> Tensor:
        """Clips, in place, what the next step consumes.

        Args:
            value: Limit of the joint 2-norm, or of each element's absolute value.
            algorithm: ``norm`` or ``value``, as Lightning's ``gradient_clip_algorithm``.

        Returns:
            The joint 2-norm before, a scalar on the gradients' device (0 where nothing has a gradient).
        """
        gradients = self.gradients()
        norm = total_norm(gradients)
        clip_(gradients, norm, value, algorithm)
        return norm

    @torch.no_grad()
    def average_gradients(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Averages over processes, each with all weights, what the next step consumes; call it before ``gradients()``.

        With ``project_in_backward()``, set ``averaged`` before training: the full gradients of a step that renews subspaces
        wait in host memory then, and are averaged here, one at a time, before a subspace is taken.
        """
        self._consume_gradients(renew=False)
        # A process without a gradient, e.g. of an expert that saw no token, takes part with zeros.
        has_gradient = [p.grad is not None or p in self._projected or p in self._hosted for p in self._places]
        anywhere = agree(has_gradient, next(iter(self._places)).device, process_group)
        for p, here, there in zip(self._places, has_gradient, anywhere, strict=True):
            if there and not here:
                p.grad = torch.zeros_like(p)
        self._consume_gradients(renew=False)
        for p in [p for p in self._places if p in self._hosted]:  # in an order that is the same on all processes
            p.grad = self._hosted.pop(p).to(p.device, non_blocking=True)
            average_([p.grad], process_group)
            self._consume_gradient(p, processes=process_group or dist.group.WORLD)
        average_(self._gradients_of(p for p, _ in self._parameters()), process_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients, also projected ones."""
        super().zero_grad(set_to_none)
        self._discard_gradients()

    def _discard_gradients(self) -> None:
        for waiting in (self._projected, self._renewed, self._hosted):
            waiting.clear()

    def _consume_gradients(self, renew: bool = True) -> None:
        """Projects ``grad`` and what waits in host memory, where without ``renew`` gradients wait that need a new subspace."""
        for p, group in self._parameters():
            if not p.requires_grad:  # frozen since backward; its ``grad`` is None then, too
                for waiting in (self._projected, self._renewed, self._hosted):
                    waiting.pop(p, None)
            if self._side(p, group) is not None and (p.grad is not None or (renew and p in self._hosted)):
                self._consume_gradient(p, renew)

    def _consume_in_backward(self, p: Tensor) -> None:
        # torch calls hooks also where no gradient came, as after `consume_factors`.
        if p.grad is not None and self._side(p, self._places[p][0]) is not None:
            self._consume_gradient(p, renew=not (self.accumulating or self.averaged))

    @torch.no_grad()
    def _consume_gradient(self, p: Tensor, renew: bool = True, processes: dist.ProcessGroup | None = None) -> None:
        """Projects ``p.grad``, or moves it to host memory if a new subspace is due and ``renew`` is False.

        Processes that have averaged it take the new subspace of the first one of their group.
        """
        group, index = self._places[p]
        side = self._side(p, group)
        assert side is not None
        gradient, p.grad = torch.zeros_like(p) if p.grad is None else p.grad, None
        finite = None
        if (projector := self._projector_of(p, group)) is None:
            if p in self._hosted:
                local(gradient).add_(self._hosted.pop(p).to(p.device, non_blocking=True))
            if not renew:
                self._hosted[p] = _to_host(local(gradient))
                return
            with self._progress.renewals.measure(p.device):
                matrices = whole_matrices(gradient)
                # Decompositions fail on NaN and Inf. The projection is made NaN below, so that step() skips.
                finite = total_norm([matrices]).isfinite()
                torch.nan_to_num_(matrices, 0.0, 0.0, 0.0)
                seed = index + int(self.state[p].get("step", 0))
                vectors = leading_singular_vectors(matrices, group["rank"], side, group["subspace"], seed=seed)
                projector = self._renewed[p] = place_projector(vectors, p, side, processes)
        projected = project(local(gradient), local(projector), side)
        if finite is not None:
            projected *= torch.where(finite, 1.0, float("nan"))
        self._add_projected(p, place_projected(projected, p, side))

    @torch.no_grad()
    def consume_factors(self, p: Tensor, output_gradient: Tensor, inputs: Tensor) -> bool:
        """Takes a linear layer's gradient as its factors, within backward; see ``project_in_backward``.

        Args:
            p: The layer's weight, of shape (m, n).
            output_gradient: dY, of shape (tokens, m).
            inputs: X, of shape (tokens, n).

        Returns:
            False where the gradient itself is needed: a subspace has to be found, or the factors are no shorter.
        """
        group, _ = self._places[p]
        side, (m, n) = self._side(p, group), p.shape
        projector = None if side is None else self._projector_of(p, group)
        if side is None or projector is None or projector.size(-1) * (m + n) > m * n:
            return False
        if not projector.dtype == output_gradient.dtype == inputs.dtype:
            return False
        self._add_projected(p, project_factors(output_gradient, inputs, projector, side))
        return True

    def resting_projector(self, p: Tensor) -> Tensor | None:
        """Q (n, r) of a weight (m, n) that rests, see ``rest``; None of any other."""
        return self._projector_of(p, self._places[p][0]) if self._rests(p) else None

    def consume_projected(self, p: Tensor, projected: Tensor) -> None:
        """Takes R (m, r) of a weight that rests, within backward; several add up."""
        self._add_projected(p, projected)

    def _add_projected(self, p: Tensor, projected: Tensor) -> None:
        self._projected[p] = projected if p not in self._projected else self._projected[p] + projected

    def _projector_of(self, p: Tensor, group: dict[str, Any]) -> Tensor | None:
        """The projector of the coming step; None if it has to be found."""
        if p in self._renewed:
            return self._renewed[p]
        state = self.state.get(p, {})
        if "rest" in state:
            if p not in self._random:
                rank, seed = state["rest"].tolist()
                basis = random_subspace(p, rank, 1_000_003 * seed + self._places[p][1])
                self._random[p] = self._place(p, "projector", basis)
            return self._random[p]
        due = "projector" not in state or int(state["step"]) % group["update_proj_gap"] == 0
        return None if due else state["projector"]

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one optimizer step, or skips it with a warning if any gradient holds a NaN or Inf.

        Args:
            closure: Computes the loss and its gradients anew; called once, before all else.

        Returns:
            What the closure returned.

        Raises:
            UsageError: A loss scaler can't unscale gradients that were projected in backward.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if hasattr(self, "grad_scale") and (self._progress.in_backward or self.grad_scale is not None):
            raise UsageError(
                "GradScaler: it can't unscale gradients that are projected before it sees them; leave out "
                "project_in_backward() and call gradients() after unscale_(), or train in bfloat16 without a scaler"
            )
        self._consume_gradients()
        if not self._prepare_gradients():
            self._discard_gradients()
            return loss
        for group in self.param_groups:
            full_rank = []
            for p in group["params"]:
                if p in self._projected:
                    self._step_projected(p, self._projected.pop(p), group)
                elif p.grad is not None and p.numel():
                    full_rank.append(p)
            self._step_full_rank(full_rank, group)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes GradScaler pass its scale to ``step`` if gradients are not in ``grad``, so that ``step`` can refuse it."""
        return self._progress.in_backward or bool(self._projected)

    def _prepare_gradients(self) -> bool:
        """Clips what the step consumes; False, with a warning, if it is not finite. Only here does it wait for the device."""
        gradients = self._gradients_of(p for p, _ in self._parameters())
        if not gradients:
            return True
        norm = total_norm(gradients)
        for group in self.param_groups:
            if group["max_grad_norm"] is not None:
                clip_(self._gradients_of(group["params"]), norm, group["max_grad_norm"])
        if norm.isfinite():
            return True
        names = [
            name for name, p in self._named_parameters() for g in self._gradients_of([p]) if not local(g).isfinite().all()
        ]
        self._progress.skipped_steps += 1
        log.warning(
            "Step skipped: the gradient of %s holds NaN or Inf (%d skipped so far)",
            ", ".join(names) or "another process",
            self.skipped_steps,
        )
        return False

    def _step_projected(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        side, state = self._side(p, group), self.state[p]
        assert side is not None
        if p in self._renewed:
            self._renew(state, self._renewed.pop(p), side, group["moments_at_renewal"])
        rests = self._rests(p)
        projector = self._random[p] if rests else state["projector"]
        step = self._count(state, gradient, group)
        exp_avg, exp_avg_sq = local(state["exp_avg"]), local(state["exp_avg_sq"])
        of_moments, of_weight = self._generators(p, step, group)
        direction = adam_direction(local(gradient), exp_avg, exp_avg_sq, step, group["betas"], group["eps"], of_moments)
        lr = _rate(step, group)
        decay = 0.0 if rests else lr * group["weight_decay"]
        project_back_(local(p), direction, local(projector), side, lr * group.get("scale", 1.0), decay, of_weight)

    def _step_full_rank(self, parameters: Iterable[Tensor], group: dict[str, Any]) -> None:
        """AdamW in full rank: small tensors together, large ones in parts, for few kernels and small temporaries."""
        together: dict[Any, list[tuple[Any, ...]]] = {}  # by rate, device and dtypes

        def take(lr: float, batch: list[tuple[Any, ...]]) -> None:
            weights, gradients, exp_avgs, exp_avg_sqs, steps = map(list, zip(*batch, strict=True))
            directions = adam_directions(gradients, exp_avgs, exp_avg_sqs, steps, group["betas"], group["eps"])
            descend_together_(weights, directions, lr, lr * group["weight_decay"])

        for p in parameters:
            state, gradient = self.state[p], p.grad
            assert gradient is not None
            step = self._count(state, gradient, group)
            lr = _rate(step, group)
            of_moments, of_weight = self._generators(p, step, group)
            rows = rows_at_a_time(p.numel() // p.size(0), p.device) if p.dim() else 1
            tensors = [local(tensor) for tensor in (p, gradient, state["exp_avg"], state["exp_avg_sq"])]
            for part in zip(*(torch.atleast_1d(t).split(rows) for t in tensors), strict=True):
                weight, gradient, exp_avg, exp_avg_sq = part
                if of_moments is not None or of_weight is not None:
                    direction = adam_direction(gradient, exp_avg, exp_avg_sq, step, group["betas"], group["eps"], of_moments)
                    descend_(weight, direction, lr, lr * group["weight_decay"], of_weight)
                    continue
                batch = together.setdefault((lr, p.device, *(t.dtype for t in part)), [])
                if batch and sum(w.numel() for w, *_ in batch) + weight.numel() > rows_at_a_time(1, p.device):
                    take(lr, batch)
                    batch.clear()
                batch.append((*part, step))
        for (lr, *_), batch in together.items():
            take(lr, batch)

    def _count(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> int:
        """Counts a step of one parameter and returns its number; makes moments, or converts them to the configured dtype."""
        if "step" not in state:
            state["step"] = torch.zeros(())  # a tensor on the CPU, as in torch.optim: sharded checkpoints want tensors
        exact = group["moments_dtype"] == "float32"
        dtype = torch.promote_types(gradient.dtype, torch.float32) if exact else torch.bfloat16
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment not in state:
                state[moment] = torch.zeros_like(gradient, dtype=dtype)
            elif state[moment].dtype != dtype:  # the option has changed
                state[moment] = state[moment].to(dtype)
        state["step"] += 1
        return int(state["step"])

    @staticmethod
    def _renew(state: dict[str, Any], projector: Tensor, side: Side, moments: str) -> None:
        """Switches to a new subspace; ``moments`` says what happens to the moments of the old one."""
        old = state.get("projector")
        state["projector"] = projector
        if old is None or moments == "keep":
            return
        if moments == "reset":
            del state["exp_avg"], state["exp_avg_sq"]
            state["step"].zero_()
            return
        # First moments are linear in the gradient; second ones are moved as if coordinates were independent.
        rotation = (whole_matrices(old).mT @ whole_matrices(projector)).to(state["exp_avg"].dtype)
        for moment, turn in ((state["exp_avg"], rotation), (state["exp_avg_sq"], rotation.square())):
            local(moment).copy_(project(local(moment), turn, side))

    # ------------------------------------------------------------------ parameters

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield p, group

    def _side(self, p: Tensor, group: dict[str, Any]) -> Side | None:
        """Which side of a matrix is projected; None where it trains in full rank."""
        if self._rests(p):
            return "right"
        if group.get("rank") is None or p.dim() not in (2, 3) or p.numel() == 0:
            return None
        m, n = p.shape[-2:]
        proj_type = group["proj_type"]
        smaller: Side = "right" if m >= n else "left"
        larger: Side = "left" if m >= n else "right"
        side: Side = {"std": smaller, "reverse_std": larger, "right": "right", "left": "left"}[proj_type]
        return side if group["rank"] < min(m, n) else None

    def _place(self, p: Tensor, key: str, value: Tensor) -> Tensor:
        """Takes this process's part of a saved state tensor where the weight is sharded and the tensor is not."""
        if not is_sharded(p) or is_sharded(value):
            return value
        side = self._side(p, self._places[p][0])
        if side is None or value.shape == p.shape:
            placements: Sequence[Placement] = p.placements
        else:
            placements = (projector_placements if key == "projector" else projected_placements)(p, side)
        return take_part(value, p.device_mesh, placements)

    def _find_places(self) -> None:
        self._places.clear()
        self._places.update({p: (group, index) for index, (p, group) in enumerate(self._parameters())})

    def _own(self, groups: Iterable[dict[str, Any]]) -> None:
        """Takes over these groups' gradients from any other optimizer."""
        for group in groups:
            for p in group["params"]:
                remove_hook(p)
            if self._progress.in_backward:  # all matrices: one that trains in full rank may rest in a lower one
                matrices = (p for p in group["params"] if p.dim() in (2, 3) and p.numel())
                hook_gradients(matrices, self, GaLoreAdamW._consume_in_backward)

    def _named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.param_groups:
            names = group.get("param_names") or [f"parameter {self._places[p][1]} {tuple(p.shape)}" for p in group["params"]]
            yield from zip(names, group["params"], strict=True)

    def _gradients_of(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        return [gradient for p in parameters if (gradient := self.gradient_of(p)) is not None]

    def _generators(
        self, p: Tensor, step: int, group: dict[str, Any]
    ) -> tuple[torch.Generator | None, torch.Generator | None]:
        """Generators for rounding the moments and the weight; None where nothing is rounded."""
        of_moments = self.state[p]["exp_avg"].dtype == torch.bfloat16
        of_weight = group["stochastic_rounding"] and p.dtype == torch.bfloat16
        if not of_moments and not of_weight:
            return None, None
        generator = torch.Generator(p.device).manual_seed(1_000_003 * self._places[p][1] + step)
        return generator if of_moments else None, generator if of_weight else None


def _rate(step: int, group: dict[str, Any]) -> float:
    """The learning rate of a weight in a step of its state, counted from 1."""
    rate: float = group["lr"] * min(1.0, step / (group["state_warmup_steps"] + 1))
    return rate


def _check(options: dict[str, Any]) -> None:
    """Refuses options of a group that are out of their range.

    Raises:
        ValueError: Names the option.
    """
    valid: dict[str, Callable[[Any], bool]] = {
        "lr": lambda value: value >= 0,
        "betas": lambda value: all(0 <= beta < 1 for beta in value),
        "eps": lambda value: value >= 0,
        "weight_decay": lambda value: value >= 0,
        "moments_dtype": lambda value: value in ("float32", "bfloat16"),
        "moments_at_renewal": lambda value: value in ("keep", "reproject", "reset"),
        "max_grad_norm": lambda value: value is None or value > 0,
        "state_warmup_steps": lambda value: value >= 0,
        "rank": lambda value: value is None or value >= 1,
        "update_proj_gap": lambda value: value >= 1,
        "proj_type": lambda value: value in ("std", "reverse_std", "right", "left"),
        "subspace": lambda value: value in ("randomized", "svd", "random"),
    }
    hints = {"rank": "must be at least 1 (leave it out to train in full rank)"}
    for name, is_valid in valid.items():
        if name in options and not is_valid(options[name]):
            raise ValueError(f"{name}: {options[name]!r} {hints.get(name, 'is out of range')}")
