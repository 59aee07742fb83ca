"""What an optimizer step consumes: the gradients of matrices, projected within backward if asked, and all others."""

import logging
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.large_tensors import rows_at_a_time
from ows_lightning.optim import sharding
from ows_lightning.optim.hooks import gradient_consumer, hook_gradient, remove_hook
from ows_lightning.optim.linear import to_plain_linear, to_projected_linear
from ows_lightning.optim.projected_adamw import project, project_factors, without_autocast
from ows_lightning.optim.resting import RestingWeights
from ows_lightning.optim.sharding import local
from ows_lightning.optim.subspace import Side, Sketch, derived_seed, find_subspace, singular_vectors

log = logging.getLogger(__name__)


class GradientCapture(RestingWeights):
    """An optimizer that stores only the projected gradient R = G Q of each projected matrix, in place of ``grad``."""

    def _init_unsaved(self) -> None:
        super()._init_unsaved()
        self.accumulating = False  # set it True while backward runs for a micro-batch that is not the last of its step
        self.known_finite = False  # set it True where the norm of ``gradients()`` is known to be finite: no step waits for it
        self.projects_in_backward = False
        self.skipped_steps = 0  # so far, for a NaN or Inf
        self._replicas_checked = False  # average_gradients() was called, or its absence was warned of
        self._renewal_s = 0.0
        self._renewal_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._projected_linears: weakref.WeakSet[nn.Linear] = weakref.WeakSet()
        self.projected_gradients: dict[Tensor, Tensor] = {}  # R of the coming step, by weight
        self.offloaded_gradients: dict[Tensor, Tensor] = {}  # full ones, in host memory, of a step that renews their subspaces
        self._new_projectors: dict[Tensor, Tensor] = {}  # that the coming step switches to
        # By weight, a subspace that is not yet rotated onto singular vectors, R in it, and whether processes average it.
        self.sketches: dict[Tensor, tuple[Sketch, Tensor, bool]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; Lightning's wrapper, a subclass, passes the wrapped optimizer's own on to it."""
        inner = vars(self).get("_optimizer", self)
        is_inner = name in vars(inner) and name not in vars(self) and not hasattr(type(self), name)
        object.__setattr__(inner if is_inner else self, name, value)

    @property
    def renewal_s(self) -> float:
        """Seconds spent on finding subspaces so far. On a GPU, reading it waits for those that are being found."""
        self._add_up_renewals(wait=True)
        return self._renewal_s

    def _add_up_renewals(self, wait: bool) -> None:
        while self._renewal_events and (wait or self._renewal_events[0][1].query()):
            begin, end = self._renewal_events.pop(0)
            end.synchronize()
            self._renewal_s += begin.elapsed_time(end) / 1000

    @contextmanager
    def _time_renewal(self, device: torch.device) -> Iterator[None]:
        """Measures how long subspaces take to find: by the clock on a CPU, on a GPU by events, which wait for nothing."""
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(torch.cuda.current_stream(device))
            yield
            end.record(torch.cuda.current_stream(device))
            self._renewal_events.append((begin, end))
            self._add_up_renewals(wait=False)  # those that are over: maybe nobody ever reads the time
        else:
            start = time.perf_counter()
            yield
            self._renewal_s += time.perf_counter() - start

    def project_in_backward(self, enabled: bool = True, model: nn.Module | None = None) -> None:
        """From now on a projected matrix's gradient is projected within backward, and freed at once.

        Several backward passes before a step add up their projected gradients, which only this optimizer's ``zero_grad()``
        drops. Set ``accumulating`` to True for all passes of a step but its last, and a new subspace is found from the whole
        step's gradient, which adds up in host memory until then; otherwise it is found from the step's first pass.

        A weight's gradient goes to the newest optimizer that holds it, and to ``grad`` again once that one is deleted. A
        loss scaler (``torch.amp.GradScaler``) would find no gradient to unscale: its step is refused.

        With ``model``, the linear layers of its blocks hand over their gradients as factors, and R = dY^T (X Q) is all that
        is computed of them, but where a subspace is renewed or a hook of yours looks at the gradient. These layers
        are ``ProjectedLinear`` until projection in backward ends; ``torch.autograd.grad`` does not know their weights.

        Args:
            enabled: False leaves the gradients of later backward passes to ``grad`` again.
            model: A module that contains the causal LM whose weights this optimizer holds.
        """
        self.projects_in_backward = enabled
        self._claim_gradients(self.param_groups)
        if not enabled:
            to_plain_linear(layer for layer in self._projected_linears if gradient_consumer(layer.weight) is None)
            self._projected_linears.clear()
        elif model is not None:
            self._projected_linears.update(to_projected_linear(decoder_layers(model).modules()))

    def gradients(self) -> list[Tensor]:
        """Returns what the next step consumes, to be scaled or clipped in place: R of projected matrices, else ``grad``.

        Their joint 2-norm is this optimizer's gradient norm: that of the gradients' parts within the subspaces, which is at
        most that of the full gradients. Call it after the step's last backward pass.

        Returns:
            For each parameter with a gradient, in the groups' order: R, of shape (..., m, r) or (..., r, n), of a projected
            matrix, else ``grad``, of the parameter's shape.
        """
        self._project_all()
        return self._gradients_of(self._group_and_index)

    def gradient_of(self, p: Tensor) -> Tensor | None:
        """What the next step consumes of one parameter, of a shape as in ``gradients()``; call that one first."""
        return self.projected_gradients.get(p, p.grad)

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
        norm = sharding.total_norm(gradients)
        sharding.clip_(gradients, norm, value, algorithm)
        return norm

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Averages over all processes, each with all weights, what the next step consumes; call it before ``gradients()``.

        With ``project_in_backward()``, set ``ddp_averaging`` before training: the full gradients of a step that renews
        subspaces wait in host memory then, and are averaged here, one at a time, before a subspace is taken.
        """
        # A process without a gradient, e.g. of an expert that saw no token, takes part with zeros.
        trained = [p for p in self._group_and_index if p.requires_grad]
        has_gradient = [p.grad is not None or p in self.projected_gradients or p in self.offloaded_gradients for p in trained]
        sharding.zero_missing_gradients(trained, has_gradient)
        self._project_all(renew=False)
        for p in [p for p in self._group_and_index if p in self.offloaded_gradients]:  # in one order on all processes
            p.grad = self.offloaded_gradients.pop(p).to(p.device, non_blocking=p.is_cuda)
            sharding.average_([p.grad])
            self._project(p, averaged=True)
        self._rotate_sketches()
        sharding.average_(self._gradients_of(self._group_and_index))
        self._replicas_checked = True

    def _warn_of_replicas(self) -> None:
        """Warns, once, where processes that each hold all weights step without ``average_gradients()``: they drift apart."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and self.projects_in_backward and not any(map(sharding.is_sharded, self._group_and_index)):
            why = "unless you average gradients() yourself, weights drift apart: DDP sees none that is projected in backward"
            hint = "Call it before each step, or take the strategy ddp_layerwise"
            log.warning("No average_gradients() came before this step of one of several processes; %s. %s", why, hint)
        self._replicas_checked = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients, also projected ones."""
        super().zero_grad(set_to_none)
        self._discard_gradients()
        self.known_finite = False

    def _discard_gradients(self, p: Tensor | None = None) -> None:
        """Drops what waits for a step, of one parameter or of all."""
        waiting: dict[Tensor, Any]
        for waiting in (self.projected_gradients, self.offloaded_gradients, self._new_projectors, self.sketches):
            if p is None:
                waiting.clear()
            else:
                waiting.pop(p, None)

    def _projected_side(self, p: Tensor) -> Side | None:
        """Which side of a matrix is projected; None where it trains in full rank."""
        if self.is_resting(p):
            return "right"
        group, _ = self._group_and_index[p]
        if group.get("rank") is None or p.dim() not in (2, 3) or p.numel() == 0 or group["rank"] >= min(p.shape[-2:]):
            return None
        tall = p.size(-2) >= p.size(-1)
        right = {"std": tall, "reverse_std": not tall, "right": True, "left": False}[group["proj_type"]]
        return "right" if right else "left"

    def _projector(self, p: Tensor) -> Tensor | None:
        """The projector of the coming step; None if it has to be found."""
        if p in self.sketches:
            self._rotate_sketches()
        if p in self._new_projectors:
            return self._new_projectors[p]
        if self.is_resting(p):
            return self.resting_projector(p)
        (group, _), state = self._group_and_index[p], self.state.get(p, {})
        due = "projector" not in state or int(state["step"]) % group["update_proj_gap"] == 0
        return None if due else state["projector"]

    def _new_subspace(self, p: Tensor, matrices: Tensor, side: Side) -> Tensor | Sketch:
        """Finds a projector, or a sketch of one, from a gradient (..., m, n)."""
        group, index = self._group_and_index[p]
        seed = index + int(self.state[p].get("step", 0))
        if group["subspace"] == "random":  # another one whenever a block becomes active, too
            seed = derived_seed(self._draw_seed, seed)
        return find_subspace(matrices, group["rank"], side, group["subspace"], seed=seed)

    def _project_all(self, renew: bool = True) -> None:
        """Projects all gradients; without ``renew``, those in host memory that need a new subspace stay there."""
        for p in self._group_and_index:
            if not p.requires_grad:  # frozen since backward; its ``grad`` is None then, too
                self._discard_gradients(p)
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients; give the embedding sparse=False")
            if p.grad is not None or (renew and p in self.offloaded_gradients):
                self._project(p, renew)
        self._rotate_sketches()

    def project_gradient(self, p: Tensor) -> None:
        """Projects ``p.grad`` within backward; there is none if `accumulate_factors` has taken the gradient."""
        if p.grad is not None:
            self._project(p, renew=not (self.accumulating or self.ddp_averaging))
        if p.grad is not None and sharding.is_sharded(p) and (p.dim() == 1 or self._group_and_index[p][0].get("rank")):
            p.grad = p.grad.clone()  # FSDP2's is a view of its whole block's, which would stay until the step

    @torch.no_grad()
    @without_autocast()
    def _project(self, p: Tensor, renew: bool = True, averaged: bool = False) -> None:
        """Projects ``p.grad`` of a projected matrix; moves it to host memory if a new subspace is due and ``renew`` is False.

        If the gradient was ``averaged`` over processes, all take the first one's new subspace.
        """
        if (side := self._projected_side(p)) is None:
            return
        gradient, p.grad = torch.zeros_like(p) if p.grad is None else p.grad, None
        if (projector := self._projector(p)) is not None:
            self.accumulate_projected(p, sharding.reduce_projected(project(local(gradient), local(projector), side), p, side))
            return
        in_host = self.offloaded_gradients.pop(p, None)
        if in_host is not None:
            _add_from_host(local(gradient), in_host)
        if not renew:
            self.offloaded_gradients[p] = _to_host(local(gradient), in_host)
            return
        with self._time_renewal(p.device):
            matrices = sharding.gather_matrices(gradient)
            # Decompositions fail on NaN, Inf and overflows. The projection is made NaN below, so that step() skips.
            finite = sharding.total_norm([matrices]).isfinite()
            matrices.masked_fill_(~finite, 0.0)
            found = self._new_subspace(p, matrices, side)
            # Each process keeps its own sketch: `_rotate_sketches` broadcasts the singular vectors, which every basis spans.
            basis, shared = (found.basis, False) if isinstance(found, Sketch) else (found, averaged)
            projector = sharding.distribute_projector(basis, p, side, shared)
        projected = project(local(gradient), local(projector), side) * torch.where(finite, 1.0, float("nan"))
        if isinstance(found, Sketch):
            self.sketches[p] = found, projected, averaged
        else:
            self._new_projectors[p] = projector
            self.accumulate_projected(p, sharding.reduce_projected(projected, p, side))

    @torch.no_grad()
    @without_autocast()
    def _rotate_sketches(self) -> None:
        """Rotates each new basis B to the singular vectors Q, and R with it: G Q = (G B) (B^T Q), since B spans Q.

        It waits for the device, once for all of a step's; G itself is long gone.
        """
        if not self.sketches:
            return
        waiting = list(self.sketches.items())
        self.sketches.clear()
        with self._time_renewal(waiting[0][0].device):
            rotated = singular_vectors([sketch for _, (sketch, *_) in waiting])
            for (p, (sketch, projected, averaged)), exact in zip(waiting, rotated, strict=True):
                side, vectors = self._projected_side(p), exact.to(sketch.basis.dtype)
                assert side is not None
                self._new_projectors[p] = sharding.distribute_projector(vectors, p, side, averaged)  # rank 0's on all
                rotation = (sketch.basis.mT @ vectors).to(projected.dtype)  # which autocast may have taken
                self.accumulate_projected(p, sharding.reduce_projected(project(projected, rotation, side), p, side))

    @torch.no_grad()
    def accumulate_factors(self, p: Tensor, output_gradient: Tensor, inputs: Tensor) -> bool:
        """Takes the gradient of a linear layer's weight (m, n) as dY (tokens, m) and X (tokens, n), within backward.

        Returns False where the gradient itself is needed: a subspace has to be found, or the factors are no shorter.
        """
        side, (m, n) = self._projected_side(p), p.shape
        projector = None if side is None else self._projector(p)
        if side is None or projector is None or projector.size(-1) * (m + n) > m * n:
            return False
        if not projector.dtype == output_gradient.dtype == inputs.dtype:
            return False
        self.accumulate_projected(p, project_factors(output_gradient, inputs, projector, side))
        return True

    def accumulate_projected(self, p: Tensor, projected: Tensor) -> None:
        """Takes R, of the shape that ``gradients()`` returns, of a weight whose projector is known; several add up."""
        before = self.projected_gradients.get(p)
        self.projected_gradients[p] = projected if before is None else before + projected

    def _claim_gradients(self, groups: Iterable[dict[str, Any]]) -> None:
        """Hooks these groups' matrices and shards, in place of any other optimizer; or, if not projecting, unhooks them."""
        for p in (p for group in groups for p in group["params"]):
            remove_hook(p, owner=None if self.projects_in_backward else self)
            matters = p.dim() in (2, 3) or sharding.is_sharded(p)  # a matrix in full rank may rest in a lower one
            if self.projects_in_backward and matters and p.numel():
                hook_gradient(p, self)

    def _named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.param_groups:
            unnamed = [f"parameter {self._group_and_index[p][1]} {tuple(p.shape)}" for p in group["params"]]
            yield from zip(group.get("param_names") or unnamed, group["params"], strict=True)

    def _gradients_of(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        return [gradient for p in parameters if (gradient := self.gradient_of(p)) is not None]


def _add_from_host(gradient: Tensor, offloaded: Tensor) -> None:
    """Adds what ``_to_host`` took, in parts: the device has no room for a second gradient."""
    # Flat parts, of tensors of one layout without gaps: others CUDA copies on the host at once, maybe before they arrive.
    if gradient.stride() != offloaded.stride():  # zeros, of a weight with gaps
        gradient.add_(offloaded.to(gradient.device))
        return
    size = rows_at_a_time(1, gradient.device)
    parts = (t.as_strided((t.numel(),), (1,)).split(size) for t in (gradient, offloaded))
    for part, in_host in zip(*parts, strict=True):
        part.add_(in_host.to(part.device, non_blocking=part.is_cuda))


def _to_host(gradient: Tensor, memory: Tensor | None) -> Tensor:
    """Copies a gradient of any shape to host memory, given or new; from a GPU to pinned memory, without waiting for it."""
    if not gradient.is_cuda:
        return gradient.to("cpu")
    if memory is None:
        memory = torch.empty_like(gradient, device="cpu", pin_memory=True)
    return memory.copy_(gradient, non_blocking=True)
