"""Linear layers whose gradient is projected without being computed: R = dY^T (X Q), where G = dY^T X never exists.

Where Q is known before the forward pass, as in a block at rest, X Q (tokens x r) is kept for backward instead of X.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ows_lightning.optim.hooks import sole_consumer


class Consumer(Protocol):
    """Who may take a weight's gradient as its two factors, or projected."""

    def resting_projector(self, p: Tensor) -> Tensor | None:
        """Returns Q (n, r) of a weight that trains at rest: R = dY^T (X Q) is all that is needed of its gradient."""
        ...

    def consume_projected(self, p: Tensor, projected: Tensor) -> None:
        """Takes R (m, r) of such a weight."""
        ...

    def consume_factors(self, p: Tensor, output_gradient: Tensor, inputs: Tensor) -> bool:
        """Takes dY (tokens, m) and X (tokens, n) in place of G = dY^T X (m, n); False if G itself is needed."""
        ...


class ProjectedLinear(nn.Linear):
    """An ``nn.Linear`` that offers its weight's gradient as factors to the optimizer that projects it within backward.

    Where nobody does, it computes what ``nn.Linear`` does, and so it does in mixed precision and in compiled code.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input`` (..., n) times the transposed weight, plus the bias: (..., m)."""
        if self.weight.requires_grad and torch.is_grad_enabled() and not _casts_or_compiles(input):
            output: Tensor = _Linear.apply(input, self.weight, self.bias)
            return output
        return F.linear(input, self.weight, self.bias)


def offer_factors(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Makes linear layers ProjectedLinear, in place; returns those. Subclasses of ``nn.Linear`` stay what they are."""
    offered = [module for module in modules if type(module) is nn.Linear]
    for module in offered:
        module.__class__ = ProjectedLinear
    return offered


def offer_gradients(modules: Iterable[nn.Linear]) -> None:
    """Makes ProjectedLinear layers linear layers again, in place."""
    for module in modules:
        if type(module) is ProjectedLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _casts_or_compiles(input: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(input.device.type)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        consumer: Consumer | None = sole_consumer(weight)
        projector = None if consumer is None else consumer.resting_projector(weight)
        if projector is not None and projector.dtype == input.dtype:
            ctx.resting_with, kept = consumer, input @ projector
        else:
            ctx.resting_with, kept = None, input
        ctx.save_for_backward(kept, weight)
        ctx.parameter = weight  # what is saved comes back as another object, which no optimizer knows
        return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.size(-1))
        weight_gradient = None
        if of_weight:
            inputs = input.reshape(-1, input.size(-1))
            consumer: Consumer | None = sole_consumer(ctx.parameter)
            if ctx.resting_with is not None:
                ctx.resting_with.consume_projected(ctx.parameter, rows.mT @ inputs)
            elif consumer is None or not consumer.consume_factors(ctx.parameter, rows, inputs):
                weight_gradient = rows.mT @ inputs
        return gradient @ weight if of_input else None, weight_gradient, rows.sum(0) if of_bias else None
