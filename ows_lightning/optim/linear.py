"""Linear layers whose gradient is projected without being computed: R = dY^T (X Q), where G = dY^T X never exists.

Where Q is known before the forward pass, as in a block at rest, X Q (tokens x r) is kept for backward instead of X.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ows_lightning.compat import version_counter
from ows_lightning.optim.hooks import gradient_consumer

if TYPE_CHECKING:
    from ows_lightning.optim.gradient_capture import GradientCapture


class ProjectedLinear(nn.Linear):
    """An ``nn.Linear`` that offers its weight's gradient as factors to the optimizer that projects it within backward.

    Where nobody does, it computes what ``nn.Linear`` does, and so it does in mixed precision and in compiled code.
    """

    update: tuple[Tensor, Tensor] | None = None  # B (m, r) and Q (n, r) of a weight that computes as W + B Q^T; None: as W

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input`` (..., n) times the transposed weight, plus the bias: (..., m)."""
        bias, update = self.bias, self.update
        weight: Tensor = self.weight if update is None else self._parameters["weight"]  # type: ignore[assignment]
        as_plain_linear = not (weight.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling()
        as_plain_linear = as_plain_linear or torch.is_autocast_enabled(input.device.type)
        consumer = None if as_plain_linear else gradient_consumer(weight)  # the optimizer that takes the gradient as factors
        projector = None if consumer is None else consumer.resting_projector(weight)
        projected: Tensor | None = None
        if projector is not None and projector.dtype == input.dtype:
            projected = (input.detach() if update is None else input) @ projector
        if update is not None:
            learned = F.linear(input @ update[1] if projected is None else projected, update[0].to(input.dtype))
        if consumer is None:
            output: Tensor = F.linear(input, weight, bias)
        else:  # saved first: checkpointing stops recomputing as soon as all that backward needs is saved
            rows = input.reshape(-1, input.size(-1))  # for 2-D input Y is no view, so that a model may write into it
            keeps = rows if projected is None else projected.view(-1, projected.size(-1))
            kept = _SaveInput.apply(keeps.detach(), weight, None if projected is None else consumer)
            output = _LinearWithoutWeightGrad.apply(rows, weight.detach(), bias, kept).view(*input.shape[:-1], weight.size(0))
        return output if update is None else output.add_(learned)

    def __getattr__(self, name: str) -> Any:
        """With an update, ``weight`` reads as W + B Q^T, as blocks like Mamba's need; W is in ``_parameters``."""
        value: Any = super().__getattr__(name)
        if name != "weight" or self.update is None:
            return value
        return value + self.update[0].to(value.dtype) @ self.update[1].mT


def set_updates(block: nn.Module, updates: Mapping[Tensor, tuple[Tensor, Tensor]]) -> dict[ProjectedLinear, Tensor]:
    """Makes a block's ProjectedLinear layers compute Y = X W^T + (X Q) B^T with these weights' B and Q; returns those."""
    updated = {m: m.weight for m in block.modules() if type(m) is ProjectedLinear and m.weight in updates}
    for layer, weight in updated.items():
        layer.update = updates[weight]
    return updated


def to_projected_linear(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Makes linear layers ProjectedLinear, in place; returns those. Subclasses of ``nn.Linear`` stay what they are."""
    layers = [module for module in modules if type(module) in (nn.Linear, ProjectedLinear)]
    for module in layers:
        module.__class__ = ProjectedLinear
    return layers  # type: ignore[return-value]


def to_plain_linear(modules: Iterable[nn.Linear]) -> None:
    """Makes ProjectedLinear layers linear layers again, in place."""
    for module in modules:
        if type(module) is ProjectedLinear:
            module.update = None  # that of an interrupted pass
            module.__class__ = nn.Linear  # type: ignore[assignment]


class _LinearWithoutWeightGrad(torch.autograd.Function):
    """Y = X W^T + b, and the gradients of X and b; in backward dY also goes to the node that returned ``kept``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor) -> Tensor:
        ctx.weight, ctx.version = weight, version_counter(weight)  # if saved for backward, Y would be recomputed first
        return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor]:
        if version_counter(ctx.weight) != ctx.version:
            raise RuntimeError("the weight of a linear layer was modified in place between forward and backward")
        of_input, _, of_bias, _ = ctx.needs_input_grad
        return gradient @ ctx.weight if of_input else None, None, gradient.sum(0) if of_bias else None, gradient


class _SaveInput(torch.autograd.Function):
    """Saves X, and offers dY and X to the optimizer in backward; or saves X Q, where Q is known, and hands over dY^T (X Q).

    Its result has Y's shape and no values: it only connects the graph.
    """

    @staticmethod
    def forward(ctx: Any, kept: Tensor, weight: Tensor, consumer: GradientCapture | None) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.parameter, ctx.consumer = weight, consumer
        return kept.new_empty(()).expand(kept.size(0), weight.size(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, None]:
        (kept,), weight = ctx.saved_tensors, ctx.parameter
        if ctx.consumer is not None:
            ctx.consumer.accumulate_projected(weight, gradient.mT @ kept)
            return None, None, None
        consumer = gradient_consumer(weight)
        consumed = consumer is not None and consumer.accumulate_factors(weight, gradient, kept)
        return None, None if consumed else gradient.mT @ kept, None
