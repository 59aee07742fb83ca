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

from ows_lightning.optim.hooks import only_hook_owner

if TYPE_CHECKING:
    from ows_lightning.optim.gradient_capture import GradientCapture


class ProjectedLinear(nn.Linear):
    """An ``nn.Linear`` that offers its weight's gradient as factors to the optimizer that projects it within backward.

    Where nobody does, it computes what ``nn.Linear`` does, and so it does in mixed precision and in compiled code.
    """

    update: tuple[Tensor, Tensor] | None = None  # B (m, r) and Q (n, r) of a weight that computes as W + B Q^T; None: as W

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input`` (..., n) times the transposed weight, plus the bias: (..., m)."""
        weight, bias, update = self.weight, self.bias, self.update
        plain = not weight.requires_grad or not torch.is_grad_enabled()
        plain = plain or torch.compiler.is_compiling() or torch.is_autocast_enabled(input.device.type)
        consumer = None if plain else only_hook_owner(weight)
        projector = None if consumer is None else consumer.resting_projector(weight)
        output: Tensor
        if projector is None or projector.dtype != input.dtype:
            learned = None if update is None else F.linear(input @ update[1], update[0].to(input.dtype))
            output = F.linear(input, weight, bias) if plain else _FactoredLinear.apply(input, weight, bias)
            return output if learned is None else output.add_(learned)
        projected = (input.detach() if update is None else input) @ projector
        kept = _SaveProjectedInput.apply(projected.detach(), weight, consumer)
        learned = None if update is None else F.linear(projected, update[0].to(input.dtype))
        output = F.linear(input, weight.detach(), bias)
        return _DuplicateGradient.apply(output if learned is None else output.add_(learned), kept)


def set_updates(block: nn.Module, updates: Mapping[Tensor, tuple[Tensor, Tensor]]) -> list[ProjectedLinear]:
    """Makes a block's ProjectedLinear layers compute Y = X W^T + (X Q) B^T with these weights' B and Q; returns them."""
    layers = [module for module in block.modules() if type(module) is ProjectedLinear and module.weight in updates]
    for layer in layers:
        layer.update = updates[layer.weight]
    return layers


def to_projected_linear(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Makes linear layers ProjectedLinear, in place; returns those. Subclasses of ``nn.Linear`` stay what they are."""
    plain = [module for module in modules if type(module) is nn.Linear]
    for module in plain:
        module.__class__ = ProjectedLinear
    return plain


def to_plain_linear(modules: Iterable[nn.Linear]) -> None:
    """Makes ProjectedLinear layers linear layers again, in place."""
    for module in modules:
        if type(module) is ProjectedLinear:
            module.update = None  # that of an interrupted pass
            module.__class__ = nn.Linear  # type: ignore[assignment]


class _FactoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
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
            consumer = only_hook_owner(ctx.parameter)
            if consumer is None or not consumer.consume_factors(ctx.parameter, rows, inputs):
                weight_gradient = rows.mT @ inputs
        return gradient @ weight if of_input else None, weight_gradient, rows.sum(0) if of_bias else None


class _SaveProjectedInput(torch.autograd.Function):
    """Keeps X Q for backward, and takes R = dY^T (X Q) there. What it returns stands for Y, without values.

    X Q is kept before X W^T is computed: a checkpointed block is recomputed only until backward has all that it needs.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, weight: Tensor, consumer: GradientCapture) -> Tensor:
        ctx.save_for_backward(projected)
        ctx.parameter, ctx.consumer = weight, consumer
        return projected.new_zeros(()).expand(*projected.shape[:-1], weight.size(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (projected,) = ctx.saved_tensors
        rows, inputs = gradient.reshape(-1, gradient.size(-1)), projected.reshape(-1, projected.size(-1))
        ctx.consumer.consume_projected(ctx.parameter, rows.mT @ inputs)
        return None, None, None


class _DuplicateGradient(torch.autograd.Function):
    """Returns Y; in backward its gradient also goes to the node of `_SaveProjectedInput`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, kept: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient
