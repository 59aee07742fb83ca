"""GaLoreAdamW: AdamW whose moments live in a low-rank subspace of each weight's gradient."""

import logging
import math
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ows_lightning.errors import UsageError
from ows_lightning.models.large_tensors import rows_at_a_time
from ows_lightning.optim.gradient_capture import GradientCapture
from ows_lightning.optim.projected_adamw import project, projected_adamw_, without_autocast
from ows_lightning.optim.sharding import clip_, gather_matrices, local, shard_state, total_norm
from ows_lightning.optim.state_dtypes import saved_tensors
from ows_lightning.optim.subspace import Side, SubspaceMethod

log = logging.getLogger(__name__)
ProjType = Literal["std", "reverse_std", "right", "left"]
PROJECTION_DEFAULTS = {"update_proj_gap": 200, "scale": 1.0, "proj_type": "std", "subspace": "randomized"}
_LEAST = {"lr": 0, "eps": 0, "weight_decay": 0, "state_warmup_steps": 0, "update_proj_gap": 1}
_CHOICES: dict[str, tuple[str, ...]] = {
    "moments_dtype": ("float32", "bfloat16"), "moments_at_renewal": ("keep", "reproject", "reset"),
    "proj_type": get_args(ProjType), "subspace": get_args(SubspaceMethod),
}  # fmt: skip


class GaLoreAdamW(GradientCapture):
    """AdamW in which a group with ``rank`` r trains its matrices by gradient low-rank projection.

    With G (m x n) the gradient of a weight W and m >= n::

        Q = top-r right singular vectors of G        every ``update_proj_gap`` steps
        R = G Q                                      (m x r), all that is kept of G
        W <- W - lr * scale * Adam(R) Q^T

    and with the left singular vectors for m < n (GaLore, arXiv 2403.03507, algorithm 2). A leading dimension is a batch: a
    3-D expert weight has one subspace per expert. All else trains by AdamW in full rank: a group without ``rank``, a vector, a
    matrix that ``rank`` does not make smaller, a weight with more than three dimensions. Works in any training loop.

    Weight decay comes after the step, as in galore-torch: W <- (1 - lr * weight_decay) (W - ...). torch's AdamW decays first.

    * ``project_in_backward()`` projects each gradient as soon as backward has produced it: full gradients never add up.
    * ``gradients()`` returns what a step consumes, to be clipped by any rule: ``torch.nn.utils.clip_grad_norm_`` misses what
      was projected in backward. Lightning's clipping acts on it with LayerwiseSampling or CausalLMModule.
    * A step with a NaN or Inf in any gradient is skipped as a whole; a warning names the weight, ``skipped_steps`` counts.
    * ``rest()`` lets weights that would be frozen learn a little, in a random subspace of a small rank.
    * Weights sharded by FSDP2 keep their moments sharded, see ``sharding.py``. For whole weights on several processes,
      ``average_gradients()`` averages what a step consumes: r/n of the bytes of the gradients.
    * All settings are options of the groups, as the learning rate is: copies, pickles and loaded states have them, and changes
      take effect at the next step (``rank`` and ``proj_type`` can't change). Gradients that wait for a step are not copied.

    Args:
        params: Parameters, named parameters or groups, e.g. from ``galore_param_groups``. Keys of a projected group:
            ``rank``, ``update_proj_gap`` (200), ``scale`` (1.0), ``proj_type`` (``std | reverse_std | right | left``),
            ``subspace`` (``randomized | svd | random``; with ``svd`` the updates equal those of galore-torch's GaLoreAdamW).
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled weight decay; acts on W.
        moments_dtype: ``float32`` or ``bfloat16``, which halves the state and rounds stochastically; saved ones are converted.
        moments_at_renewal: What happens to the moments when the subspace is renewed: ``keep`` them as numbers (GaLore),
            ``reproject`` them onto the new subspace, or ``reset`` them.
        stochastic_rounding: Round bfloat16 weights up or down at random, with the right mean, instead of to nearest.
        max_grad_norm: Limit of the joint 2-norm of all gradients that a step consumes, see ``gradients``; None clips nothing.
        state_warmup_steps: A weight's rate rises linearly over this many first steps of its state, while its moments come from
            few gradients. A frozen block's state is freed, so a block warms up each time it is drawn. The paper has 0.

    Raises:
        ValueError: A setting is out of range.
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
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moments_dtype": moments_dtype,
            "moments_at_renewal": moments_at_renewal, "stochastic_rounding": stochastic_rounding,
            "max_grad_norm": max_grad_norm, "state_warmup_steps": state_warmup_steps,
        }  # fmt: skip
        check_options(defaults)
        self._init_unsaved()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; a projected one gets the defaults of the keys that it does not set."""
        if param_group.get("rank") is not None:
            param_group = {**PROJECTION_DEFAULTS, **param_group}
        check_options(param_group)
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            del self.param_groups[-1]
            raise ValueError("params: complex weights are not supported")
        self._index_parameters()
        self._claim_gradients(self.param_groups[-1:])

    def __getstate__(self) -> dict[str, Any]:
        self.merge_updates()  # a copy of the model has all in its weights, also where it is made later than this one
        return {**super().__getstate__(), "progress": (self.projects_in_backward, self._draw_seed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Sets up a copy or an unpickled optimizer, or takes over a loaded state (torch calls it in ``load_state_dict``)."""
        if "projected_gradients" not in vars(self):
            self._init_unsaved()
            self.projects_in_backward, self._draw_seed = state.pop("progress")
            super().__setstate__(state)
            self._claim_gradients(self.param_groups)
        else:
            self._discard_gradients()
            self.resting_projectors.clear()
            super().__setstate__(state)
        for group in self.param_groups:  # the state of torch's AdamW lacks some
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._index_parameters()

    def state_dict(self) -> dict[str, Any]:
        """torch's, and ``draw_seed``, which rounding noise and random subspaces are derived from."""
        return {**super().state_dict(), "draw_seed": self._draw_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; moments keep the dtype in which they were saved (torch casts to the parameter's).

        Raises:
            ValueError: A group has a ``rank`` only here or only in the state, or the state an option that is out of range.
        """
        for number, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            rank, saved_rank = group.get("rank"), saved.get("rank")
            if (rank is None) != (saved_rank is None):
                raise ValueError(f"group {number} has rank {rank}, the loaded state {saved_rank}: it is another optimizer's")
            check_options(saved)
        loaded: dict[str, Any] = {}  # what hooks of yours make of the state
        with self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given)):
            super().load_state_dict(state_dict)
        self._draw_seed = loaded.get("draw_seed", self._draw_seed)
        for p, key, value in saved_tensors(self, loaded):
            if key in ("rest", "step"):
                self.state[p][key] = value.to("cpu", copy=True)  # where reading it waits for no device
            else:
                dtype = p.dtype if key == "projector" else value.dtype  # it may come from a run in another precision
                value = value.to(p.device, dtype, copy=True)
                self.state[p][key] = shard_state(value, p, self._projected_side(p), key == "projector")
        self._make_projectors(self._group_and_index)
        self.merge_updates(p for p in self._group_and_index if p not in self._merge_callbacks)  # of an offloading run

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
        if hasattr(self, "grad_scale") and (self.projects_in_backward or self.grad_scale is not None):
            fault = "GradScaler: it can't unscale gradients that are projected before it sees them"
            hint = "leave out project_in_backward() and call gradients() after unscale_()"
            raise UsageError(f"{fault}; {hint}, or train in bfloat16 without a scaler")
        if not self._replicas_checked:
            self._warn_of_replicas()
        self._project_all()
        if not self._clip_and_check():
            self._discard_gradients()
            return loss
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.projected_gradients:
                    self._step_projected(p, self.projected_gradients.pop(p), group)
                elif p.grad is not None and p.numel():
                    self._step_full_rank(p, group)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Makes GradScaler pass its scale to ``step`` if gradients are not in ``grad``, so that ``step`` can refuse it."""
        return self.projects_in_backward or bool(self.projected_gradients)

    def _clip_and_check(self) -> bool:
        """Clips what the step consumes; False, with a warning, if it is not finite. Only here does it wait for the device."""
        gradients = self._gradients_of(self._group_and_index)
        known_finite, self.known_finite = self.known_finite, False
        clipped = [group for group in self.param_groups if group["max_grad_norm"] is not None]
        if not gradients or (known_finite and not clipped):
            return True
        norm = total_norm(gradients)
        for group in clipped:
            clip_(self._gradients_of(group["params"]), norm, group["max_grad_norm"])
        if known_finite or norm.isfinite():
            return True
        found = ((name, self.gradient_of(p)) for name, p in self._named_parameters())
        names = [name for name, gradient in found if gradient is not None and not local(gradient).isfinite().all()]
        where = ", ".join(names) or "another process"
        self.skipped_steps += 1
        log.warning("Step skipped: the gradient of %s holds NaN or Inf (%d skipped so far)", where, self.skipped_steps)
        return False

    @without_autocast()
    def _step_projected(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        side, state, rests = self._projected_side(p), self.state[p], self.is_resting(p)
        assert side is not None
        if p in self._new_projectors:
            self._renew(state, self._new_projectors.pop(p), side, group["moments_at_renewal"])
        projector: Tensor | None = local(self.resting_projectors[p] if rests else state["projector"])
        settings = self._advance_state(p, gradient, group) | {"side": side, "scale": group.get("scale", 1.0)}
        weight, moments = local(p), (local(state["exp_avg"]), local(state["exp_avg_sq"]))
        if rests:  # decay would shrink all of a weight of which a few directions learn
            settings["weight_decay"] = 0.0
        if rests and p in self._merge_callbacks:  # B <- B - lr * scale * Adam(R)
            if "update" not in state:
                state["update"] = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
            weight, projector, settings["round_weights"] = state["update"], None, False
        projected_adamw_(weight, local(gradient), projector, *moments, **settings)

    def _step_full_rank(self, p: Tensor, group: dict[str, Any]) -> None:
        """AdamW in full rank; large tensors in parts, for small temporaries."""
        state, gradient = self.state[p], p.grad
        assert gradient is not None
        settings = self._advance_state(p, gradient, group)
        rows = rows_at_a_time(p.numel() // p.size(0), p.device) if p.dim() else 1
        tensors = [torch.atleast_1d(local(t)) for t in (p, gradient, state["exp_avg"], state["exp_avg_sq"])]
        for weight, gradient, exp_avg, exp_avg_sq in zip(*(t.split(rows) for t in tensors), strict=True):
            projected_adamw_(weight, gradient, None, exp_avg, exp_avg_sq, **settings)

    def _advance_state(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Makes moments, or converts them to the configured dtype; returns the settings of their coming step."""
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")  # sharded checkpoints want a tensor
        dtype = torch.bfloat16 if group["moments_dtype"] == "bfloat16" else torch.promote_types(gradient.dtype, torch.float32)
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment not in state:
                state[moment] = torch.zeros_like(gradient, dtype=dtype)
            elif state[moment].dtype != dtype:  # the option has changed
                state[moment] = state[moment].to(dtype)
        state["step"] += 1
        step = int(state["step"] - state.get("reset_at", 0))  # read once: of a fake tensor every number is 1
        settings = {"step": step, **{key: group[key] for key in ("betas", "eps", "weight_decay")}}
        settings["lr"] = group["lr"] * min(1.0, step / (group["state_warmup_steps"] + 1))
        settings["round_weights"] = group["stochastic_rounding"] and p.dtype == torch.bfloat16
        if settings["round_weights"] or state["exp_avg"].dtype == torch.bfloat16:
            settings["generator"] = self._rounding_generator(p, state["exp_avg"].device)
        return settings

    @staticmethod
    def _renew(state: dict[str, Any], projector: Tensor, side: Side, moments: str) -> None:
        """Switches to a new subspace; ``moments`` says what happens to the moments of the old one."""
        old, state["projector"] = state.get("projector"), projector
        if old is None or moments == "keep":
            return
        if moments == "reset":
            del state["exp_avg"], state["exp_avg_sq"]
            state["reset_at"] = int(state["step"])  # which goes on: it seeds the next subspace
            return
        # First moments are linear in the gradient; second ones are moved as if coordinates were independent.
        rotation = (gather_matrices(old).mT @ gather_matrices(projector)).to(state["exp_avg"].dtype)
        for moment, factor in ((state["exp_avg"], rotation), (state["exp_avg_sq"], rotation.square())):
            local(moment).copy_(project(local(moment), factor, side))


def check_options(options: dict[str, Any]) -> None:
    """Refuses options of a group that are out of their range by a ValueError that begins with the name of one."""
    for name, value in options.items():
        fault = ""
        if name in _LEAST and not (hasattr(value, "__float__") and value >= _LEAST[name]):  # Adafactor's eps is a pair
            fault = f"must be at least {_LEAST[name]}"
        elif name in ("state_warmup_steps", "update_proj_gap") and not isinstance(value, Integral):
            fault = "must be a whole number"
        elif name in _CHOICES and value not in _CHOICES[name]:
            fault = f"must be {' or '.join(_CHOICES[name])}"
        elif name == "betas" and len(value) != 2:
            fault = "must be two numbers"
        elif name == "betas" and not all(0 <= beta < 1 for beta in value):
            fault = "must be at least 0 and less than 1"
        elif name == "rank" and not (value is None or (isinstance(value, Integral) and int(value) >= 1)):
            fault = "must be at least 1, and whole, or null (None) for full rank"
        elif name == "max_grad_norm" and not (value is None or value > 0):
            fault = "must be more than 0"
        elif name == "scale" and not 0 < (value or 0) < math.inf:
            fault = "must be more than 0, and finite"
        elif name in ("amsgrad", "maximize") and value:  # of torch's AdamW, whose states it loads
            fault = "is not supported"
        if fault:
            raise ValueError(f"{name}: {value!r} {fault}")
