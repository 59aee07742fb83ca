"""Next-token loss that never holds the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK = 1 << 23  # logits held at a time (32 MB in float32); below it, speed suffers before memory gains
SLICE = 1 << 20  # of those, elements in float32 at a time: they fit a CPU's cache


def next_token_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the summed cross entropy of a batch, and over how many target tokens.

    Only positions that have a target reach the LM head, and those in chunks.

    Args:
        model: A causal LM of transformers.
        batch: ``input_ids`` and ``labels`` of shape (B, L), int64, labels not shifted and -100 where there is no
            target; what else the model's forward takes (``attention_mask``, ``position_ids``) as it is.

    Returns:
        Two scalars: the sum in float32, with a graph, and the number of targets, int64.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    targets = batch["labels"][:, 1:]
    has_target = targets != -100
    targets = targets[has_target]
    return summed_cross_entropy(model, hidden[has_target], targets), torch.tensor(targets.numel(), device=targets.device)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Returns the logits (..., vocabulary) of last hidden states (..., hidden), scaled or capped as the config says."""
    logits = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


def summed_cross_entropy(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed cross entropy of a model's logits, of which a chunk exists at a time; its gradient, too.

    Args:
        model: A causal LM of transformers.
        hidden: Last hidden states of shape (N, hidden).
        targets: Shape (N,), int64.

    Returns:
        A scalar in float32, with a graph.
    """
    rows = max(1, CHUNK // model.config.get_text_config().vocab_size)
    if not torch.is_grad_enabled():
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.stack([F.cross_entropy(logits_of(model, h).float(), t, reduction="sum") for h, t in chunks]).sum()
    head = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    return _Chunked.apply(partial(logits_of, model), rows, targets, hidden, *head)


def _cross_entropy_into_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed cross entropy and replaces the logits by its gradient, softmax minus one-hot; float32 within."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    rows = max(1, SLICE // logits.size(-1))
    for part, target in zip(logits.split(rows), targets.unsqueeze(-1).split(rows), strict=True):
        exact = part.float()
        chosen, largest = exact.gather(-1, target), exact.amax(-1, keepdim=True)
        gradient = exact.sub_(largest).exp_()
        norm = gradient.sum(-1, keepdim=True)
        total += (norm.log() + largest - chosen).sum()
        gradient.div_(norm)
        part.copy_(gradient.scatter_add_(-1, target, -torch.ones_like(target, dtype=exact.dtype)))
    return total


class _Chunked(torch.autograd.Function):
    """A sum over rows whose gradients are taken chunk by chunk within forward, so that nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any, to_logits: Callable[[Tensor], Tensor], rows: int, targets: Tensor, hidden: Tensor, *head: nn.Parameter
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_hidden = ctx.needs_input_grad[3]
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        head_gradients: Sequence[Tensor | None] = [None] * len(head)
        for start in range(0, max(1, len(targets)), rows):  # without targets, gradients are zero, but there
            chunk = hidden[start : start + rows].detach().requires_grad_(wants_hidden)
            wanted = [chunk] * wants_hidden + list(head)
            with torch.enable_grad():
                logits = to_logits(chunk)
            slope = logits.detach()
            total += _cross_entropy_into_gradient_(slope, targets[start : start + rows])
            gradients = list(torch.autograd.grad(logits, wanted, slope)) if wanted else []
            if hidden_gradient is not None:
                hidden_gradient[start : start + rows] = gradients.pop(0)
            head_gradients = [
                new if old is None else old.add_(new) for old, new in zip(head_gradients, gradients, strict=True)
            ]
            del gradients  # or it would be there beside the next chunk's: a third tensor of the head's size
        ctx.save_for_backward(hidden_gradient, *head_gradients)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place: they are used once, and a head's gradient is as large as the head.
        return None, None, None, *(g if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.saved_tensors)
