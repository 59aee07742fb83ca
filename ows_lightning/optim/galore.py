"""GaLoreAdamW: AdamW whose moments live in a low-rank subspace of each weight's gradient."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement
from torch.optim import Optimizer

from ows_lightning.models.row_chunks import rows_at_a_time
from ows_lightning.optim.projection import adam_direction, descend_, project, project_back_
from ows_lightning.optim.sharding import (
    agree,
    average_,
    local,
    place_projected,
    place_projector,
    projected_placements,
    projector_placements,
    take_part,
    total_norm,
    whole_matrices,
)
from ows_lightning.optim.subspace import Side, leading_singular_vectors

log = logging.getLogger(__name__)

ProjType = Literal["std", "reverse_std", "right", "left"]

PROJECTION_DEFAULTS = {"update_proj_gap": 200, "scale": 1.0, "proj_type": "std", "subspace": "randomized"}


def _to_host(gradient: Tensor) -> Tensor:
    """Moves a gradient to host memory; a GPU's to pinned memory, without waiting for it."""
    if not gradient.is_cuda:
        return gradient.to("cpu")
    return torch.empty_like(gradient, device="cpu", pin_memory=True).copy_(gradient, non_blocking=True)


class GaLoreAdamW(Optimizer):
    """AdamW in which a group with ``rank`` r trains its matrices by gradient low-rank projection.

    With G (m x n) the gradient of a weight W and m >= n::

        Q = top-r right singular vectors of G        every ``update_proj_gap`` steps
        R = G Q                                      (m x r), all that is kept of G
        W <- W - lr * scale * Adam(R) Q^T

    and with the left singular vectors for m < n (GaLore, arXiv 2403.03507, algorithm 2). Leading dimensions are a batch: a
    3-D expert weight has one subspace an expert. A group without ``rank``, a vector, and a matrix that ``rank`` does not make
    smaller train by AdamW in full rank. Works in any training loop; four things are worth knowing:

    * ``project_in_backward()`` projects each gradient as soon as backward has produced it: full gradients never add up.
    * What a step consumes is ``gradients()``: projected ones where there is a rank. Clip those, by any rule.
    * A step with a NaN or Inf in any gradient is skipped as a whole: weights, moments and subspaces stay as they were.
    * Weights sharded by FSDP2 keep their moments sharded, see ``sharding.py``. For whole weights on several processes,
      ``average_gradients()`` averages what a step consumes: r/n of the bytes of the gradients.

    Args:
        params: Parameters, named parameters or groups, e.g. from ``galore_param_groups``. Keys of a projected group:
            ``rank``, ``update_proj_gap`` (200), ``scale`` (1.0), ``proj_type`` (``std | reverse_std | right | left``),
            ``subspace`` (``randomized | svd``; with ``svd`` the updates equal those of galore-torch's GaLoreAdamW).
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay; acts on W.
        moments_dtype: ``float32`` or ``bfloat16``, which halves the state; moments are then rounded stochastically.
        moments_at_renewal: What becomes of the moments when the subspace is renewed: ``keep`` them as numbers (GaLore),
            ``reproject`` them onto the new subspace, or ``reset`` them.
        stochastic_rounding: Round bfloat16 weights up or down at random, with the right mean, instead of to nearest.

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
    ) -> None:
        for name, value, valid in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("moments_dtype", moments_dtype, moments_dtype in ("float32", "bfloat16")),
            ("moments_at_renewal", moments_at_renewal, moments_at_renewal in ("keep", "reproject", "reset")),
        ):
            if not valid:
                raise ValueError(f"{name}: {value!r} is out of range")
        self.moments_dtype = getattr(torch, moments_dtype)
        self.moments_at_renewal = moments_at_renewal
        self.stochastic_rounding = stochastic_rounding
        self.accumulating = False  # True while backward runs for a micro-batch that is not the last of its step
        self.skipped_steps = 0
        self.renewal_s = 0.0  # seconds spent on finding subspaces, so far
        self._discard_gradients()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; a projected one gets the defaults of the keys that it does not set."""
        rank = param_group.get("rank")
        if rank is not None:
            if rank < 1:
                raise ValueError(f"rank: {rank!r} must be at least 1 (leave it out to train in full rank)")
            param_group = {**PROJECTION_DEFAULTS, **param_group}
            if param_group["update_proj_gap"] < 1:
                raise ValueError(f"update_proj_gap: {param_group['update_proj_gap']!r} must be at least 1")
            if param_group["proj_type"] not in ("std", "reverse_std", "right", "left"):
                raise ValueError(f"proj_type: {param_group['proj_type']!r} is none of std, reverse_std, right, left")
            if param_group["subspace"] not in ("randomized", "svd"):
                raise ValueError(f"subspace: {param_group['subspace']!r} is neither randomized nor svd")
        super().add_param_group(param_group)
        self._find_places()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_places()  # loading a state replaces the groups
        self._discard_gradients()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; every tensor keeps the dtype in which it was saved (torch casts to the parameter's)."""
        super().load_state_dict(state_dict)
        saved_ids = (i for group in state_dict["param_groups"] for i in group["params"])
        for saved_id, (p, _) in zip(saved_ids, self._parameters(), strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor) and key != "step":
                    self.state[p][key] = self._place(p, key, value.detach().to(p.device, copy=True))

    # ------------------------------------------------------------------ gradients

    def project_in_backward(self) -> None:
        """From now on a projected matrix's gradient is projected within backward, and freed at once.

        Several backward passes before a step add up their projected gradients, as ``grad`` would add up full ones. The
        subspace is found from the whole step's gradient if ``accumulating`` is True during all backward passes but the last:
        in a step that renews a subspace, the full gradient then adds up in host memory (never on the accelerator). Where
        ``accumulating`` is left False, the subspace comes from the step's first backward pass.
        """
        for p, group in self._parameters():
            if self._side(p, group) is not None:
                p.register_post_accumulate_grad_hook(self._consume_gradient)

    def gradients(self) -> list[Tensor]:
        """Returns what the next step consumes, to be scaled or clipped in place: R of projected matrices, else ``grad``.

        Their joint 2-norm is this optimizer's gradient norm: that of the gradients' parts within the subspaces, which is at
        most that of the full gradients.
        """
        self._consume_gradients()
        return list(self._named_gradients().values())

    @torch.no_grad()
    def average_gradients(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Averages over processes, each with all weights, what the next step consumes; call it before ``gradients()``.

        Keep ``accumulating`` True during all backward passes before it, the last one included: the full gradients of a step
        that renews subspaces wait in host memory, and are averaged here, one at a time, before a subspace is taken.
        """
        self._consume_gradients()
        # A process without a gradient, e.g. of an expert that saw no token, takes part with zeros.
        has_gradient = [p.grad is not None or p in self._projected or p in self._hosted for p in self._places]
        anywhere = agree(has_gradient, next(iter(self._places)).device, process_group)
        for p, here, there in zip(self._places, has_gradient, anywhere, strict=True):
            if there and not here:
                p.grad = torch.zeros_like(p)
        self._consume_gradients()
        accumulating, self.accumulating = self.accumulating, False
        for p in list(self._hosted):
            p.grad = self._hosted.pop(p).to(p.device, non_blocking=True)
            average_([p.grad], process_group)
            self._consume_gradient(p)
        self.accumulating = accumulating
        average_(list(self._named_gradients().values()), process_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients, projected ones included."""
        super().zero_grad(set_to_none)
        self._discard_gradients()

    def _discard_gradients(self) -> None:
        self._projected: dict[Tensor, Tensor] = {}  # R of the coming step
        self._renewed: dict[Tensor, Tensor] = {}  # projectors that the coming step takes into use
        self._hosted: dict[Tensor, Tensor] = {}  # full gradients of a step that renews, in host memory

    def _consume_gradients(self) -> None:
        for p, group in self._parameters():
            if p.grad is not None and self._side(p, group) is not None:
                self._consume_gradient(p)

    @torch.no_grad()
    def _consume_gradient(self, p: Tensor) -> None:
        """Turns ``p.grad`` into its projection; also the hook that runs within backward."""
        group, index = self._places[p]
        gradient, p.grad = p.grad, None
        assert gradient is not None
        side = self._side(p, group)
        assert side is not None
        if self._renewal_is_due(p, group) and p not in self._renewed:
            if p in self._hosted:
                local(gradient).add_(self._hosted.pop(p).to(p.device, non_blocking=True))
            if self.accumulating:
                self._hosted[p] = _to_host(local(gradient))
                return
            matrices = whole_matrices(gradient)
            if not torch.linalg.vector_norm(matrices).isfinite():
                self._projected[p] = matrices.new_full((), float("nan"))  # found by step(), which skips
                return
            start, step = time.perf_counter(), int(self.state[p].get("step", 0))
            vectors = leading_singular_vectors(matrices, group["rank"], side, group["subspace"], seed=index + step)
            self._renewed[p] = place_projector(vectors, p, side)
            if gradient.is_cuda:
                torch.cuda.synchronize(gradient.device)  # what was launched is not yet done
            self.renewal_s += time.perf_counter() - start
        projector = self._renewed[p] if p in self._renewed else self.state[p]["projector"]
        projected = place_projected(project(local(gradient), local(projector), side), p, side)
        self._projected[p] = projected if p not in self._projected else self._projected[p] + projected

    def _renewal_is_due(self, p: Tensor, group: dict[str, Any]) -> bool:
        state = self.state.get(p, {})
        return "projector" not in state or int(state["step"]) % group["update_proj_gap"] == 0

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one optimizer step, or skips it with a warning if any gradient holds a NaN or Inf."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._consume_gradients()
        if not self._gradients_are_finite():
            self._discard_gradients()
            return loss
        for p, group in self._parameters():
            if p in self._projected:
                self._step_projected(p, self._projected.pop(p), group)
            elif p.grad is not None:
                self._step_full_rank(p, p.grad, group)
        return loss

    def _step_projected(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        side, state = self._side(p, group), self.state[p]
        assert side is not None
        if p in self._renewed:
            self._renew(state, self._renewed.pop(p), side)
        step = self._count(state, gradient)
        exp_avg, exp_avg_sq = local(state["exp_avg"]), local(state["exp_avg_sq"])
        of_moments, of_weight = self._generators(p, step)
        direction = adam_direction(local(gradient), exp_avg, exp_avg_sq, step, group["betas"], group["eps"], of_moments)
        lr, decay = group["lr"] * group["scale"], group["lr"] * group["weight_decay"]
        project_back_(local(p), direction, local(state["projector"]), side, lr, decay, of_weight)

    def _step_full_rank(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        step = self._count(state, gradient)
        (of_moments, of_weight), decay = self._generators(p, step), group["lr"] * group["weight_decay"]
        rows = rows_at_a_time(p.numel() // p.size(0), p.device) if p.dim() else 1
        tensors = [local(tensor) for tensor in (p, gradient, state["exp_avg"], state["exp_avg_sq"])]
        for weight, part, exp_avg, exp_avg_sq in zip(*(torch.atleast_1d(t).split(rows) for t in tensors), strict=True):
            direction = adam_direction(part, exp_avg, exp_avg_sq, step, group["betas"], group["eps"], of_moments)
            descend_(weight, direction, group["lr"], decay, of_weight)

    def _count(self, state: dict[str, Any], gradient: Tensor) -> int:
        """Returns the number of the step that begins for one parameter; the first one allocates its moments."""
        if "step" not in state:
            state["step"] = torch.zeros(())  # a tensor on the CPU, as in torch.optim: sharded checkpoints want tensors
        if "exp_avg" not in state:
            dtype = (
                torch.promote_types(gradient.dtype, torch.float32) if self.moments_dtype == torch.float32 else torch.bfloat16
            )
            state["exp_avg"] = torch.zeros_like(gradient, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(gradient, dtype=dtype)
        state["step"] += 1
        return int(state["step"])

    def _renew(self, state: dict[str, Any], projector: Tensor, side: Side) -> None:
        """Takes a new subspace into use; ``moments_at_renewal`` says what becomes of moments from the old one."""
        old = state.get("projector")
        state["projector"] = projector
        if old is None or self.moments_at_renewal == "keep":
            return
        if self.moments_at_renewal == "reset":
            del state["exp_avg"], state["exp_avg_sq"]
            state["step"].zero_()
            return
        # First moments are linear in the gradient; second ones are moved as if coordinates were independent.
        rotation = (whole_matrices(old).mT @ whole_matrices(projector)).to(state["exp_avg"].dtype)
        for moment, turn in ((state["exp_avg"], rotation), (state["exp_avg_sq"], rotation.square())):
            local(moment).copy_(project(local(moment), turn, side))

    def _gradients_are_finite(self) -> bool:
        gradients = self._named_gradients()
        if not gradients or total_norm(gradients.values()).isfinite():
            return True
        names = [name for name, gradient in gradients.items() if not local(gradient).isfinite().all()]
        self.skipped_steps += 1
        log.warning(
            "Step skipped: the gradient of %s holds NaN or Inf (%d skipped so far)",
            ", ".join(names) or "another process",
            self.skipped_steps,
        )
        return False

    # ------------------------------------------------------------------ parameters

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield p, group

    def _side(self, p: Tensor, group: dict[str, Any]) -> Side | None:
        """Which side of a matrix is projected; None where it trains in full rank."""
        if group.get("rank") is None or p.dim() < 2:
            return None
        m, n = p.shape[-2:]
        proj_type = group["proj_type"]
        smaller: Side = "right" if m >= n else "left"
        larger: Side = "left" if m >= n else "right"
        side: Side = {"std": smaller, "reverse_std": larger, "right": "right", "left": "left"}[proj_type]
        return side if group["rank"] < (n if side == "right" else m) else None

    def _place(self, p: Tensor, key: str, value: Tensor) -> Tensor:
        """Takes this process's part of a saved state tensor where the weight is sharded and the tensor is not."""
        if not isinstance(p, DTensor) or isinstance(value, DTensor):
            return value
        side = self._side(p, self._places[p][0])
        if side is None or value.shape == p.shape:
            placements: Sequence[Placement] = p.placements
        else:
            placements = (projector_placements if key == "projector" else projected_placements)(p, side)
        return take_part(value, p.device_mesh, placements)

    def _find_places(self) -> None:
        self._places = {p: (group, index) for index, (p, group) in enumerate(self._parameters())}

    def _named_gradients(self) -> dict[str, Tensor]:
        named = {}
        for group in self.param_groups:
            names = group.get("param_names") or [f"parameter {self._places[p][1]} {tuple(p.shape)}" for p in group["params"]]
            for name, p in zip(names, group["params"], strict=True):
                gradient = self._projected.get(p, p.grad)
                if gradient is not None:
                    named[name] = gradient
        return named

    def _generators(self, p: Tensor, step: int) -> tuple[torch.Generator | None, torch.Generator | None]:
        """What rounds the moments, and the weight, stochastically; None where nothing is to be rounded."""
        of_moments = self.state[p]["exp_avg"].dtype == torch.bfloat16
        of_weight = self.stochastic_rounding and p.dtype == torch.bfloat16
        if not of_moments and not of_weight:
            return None, None
        generator = torch.Generator(p.device).manual_seed(1_000_003 * self._places[p][1] + step)
        return generator if of_moments else None, generator if of_weight else None
