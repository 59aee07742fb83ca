"""Next-token loss that never holds the logits of a whole batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ows_lightning.compat import known_mask_checks
from ows_lightning.models.decoder import backbone
from ows_lightning.models.large_tensors import rows_at_a_time

IGNORE_INDEX = -100  # a label that is no target, as in transformers
CPU_CHUNK_BYTES = 1 << 25  # bytes of logits that a CPU holds at a time; below it, speed suffers before memory gains
# A GPU reads the head twice for each chunk, and reads and writes its gradient; products of 1,024 rows take longer than that.
GPU_CHUNK_ROWS, GPU_CHUNK_BYTES = 1024, 1 << 28


class LossParts(NamedTuple):
    """A loss in parts that can be added up over batches, two scalars."""

    total: Tensor  # cross entropy summed over the target tokens (nats), float32, with a graph while gradients are enabled
    num_targets: Tensor  # target tokens, int64

    @property
    def loss(self) -> Tensor:
        """The mean over the target tokens; 0 without any."""
        return self.total / self.num_targets.clamp(min=1)


def next_token_loss(model: PreTrainedModel, batch: dict[str, Any], chunk_device: torch.device | None = None) -> LossParts:
    """Returns the summed cross entropy of a batch, and over how many target tokens.

    Only positions that have a target reach the LM head, in chunks of the size for ``chunk_device``, or for the batch's device.
    The batch has ``input_ids`` and ``labels`` (B, L), int64, labels not shifted and -100 where there is no target, and what
    else the model's forward takes; pass it through `precompute_on_host` to wait for no device.
    """
    hidden, targets = _hidden_and_targets(model, batch)
    number = torch.full((), targets.numel(), device=targets.device)
    return LossParts(summed_cross_entropy(model, hidden, targets, chunk_device), number)


@torch.no_grad()
def loss_and_predictions(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[LossParts, Tensor]:
    """Returns what `next_token_loss` does, without a graph, and the likeliest token at each target, (N,), row by row."""
    hidden, targets = _hidden_and_targets(model, batch)
    total, likeliest = torch.zeros((), dtype=torch.float32, device=hidden.device), torch.empty_like(targets)
    rows = _rows_per_chunk(model, hidden)
    for h, t, into in zip(hidden.split(rows), targets.split(rows), likeliest.split(rows), strict=True):
        logits = logits_of(model, h)
        total += _cross_entropy(logits, t).sum()
        into.copy_(logits.argmax(-1))
        del logits  # before the next ones are made
    return LossParts(total, torch.full((), targets.numel(), device=targets.device)), likeliest


def precompute_on_host(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns a batch in host memory with what a step would otherwise have to read back from a GPU.

    They are ``targets_at`` (N,), int64, the targets' positions in ``labels.flatten()``; ``padded``, whether a mask hides
    anything; and ``packed``, whether positions are other than those of any row.
    """
    labels, mask, positions = batch["labels"], batch.get("attention_mask"), batch.get("position_ids")
    padded = mask is not None and not bool(mask.all())
    packed = positions is not None and not bool((positions == torch.arange(labels.size(1), device=positions.device)).all())
    at = _positions_of_targets(labels)
    at = at.pin_memory() if labels.is_pinned() else at  # else copying it waits for the GPU
    return {**batch, "targets_at": at, "padded": padded, "packed": packed}


def token_mask(batch: Mapping[str, Any]) -> Tensor:
    """Where a batch has tokens and no padding, (B, L). In packed rows each place of the padding has position 0."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None or positions is None:
        return torch.ones_like(batch["input_ids"]) if mask is None else mask
    return (positions > 0) | (F.pad(positions[..., 1:], (0, 1)) == 1)


def _positions_of_targets(labels: Tensor) -> Tensor:
    row, column = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return row * labels.size(1) + column + 1


def _hidden_and_targets(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The last hidden states that targets are predicted from, (N, hidden), and these, (N,)."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "targets_at", "padded", "packed")}
    if (at := batch.get("targets_at")) is None:
        at = _positions_of_targets(batch["labels"])  # before the model runs: a GPU is waited for here
        hidden = last_hidden_state(model, inputs)
    else:
        for needed, key in (("padded", "attention_mask"), ("packed", "position_ids")):
            if not batch[needed]:  # without it the model does the same
                inputs.pop(key, None)
        with known_mask_checks(batch["padded"], batch["packed"]):
            hidden = last_hidden_state(model, inputs)
    return hidden.flatten(0, 1)[at - 1], batch["labels"].flatten()[at]


def last_hidden_state(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Returns what the LM head of a causal LM gets, shape (B, L, hidden), from what the model takes."""
    return backbone(model)(**inputs, use_cache=False).last_hidden_state


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Returns the logits (..., vocabulary) of last hidden states (..., hidden), scaled or capped as the config says."""
    return _scaled(model.config.get_text_config(), model.get_output_embeddings()(hidden))


def _scaled(config: PretrainedConfig, logits: Tensor) -> Tensor:
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


def summed_cross_entropy(
    model: PreTrainedModel, hidden: Tensor, targets: Tensor, chunk_device: torch.device | None = None
) -> Tensor:
    """Returns the summed cross entropy of states (N, hidden) and targets (N,), by chunks of a size for ``chunk_device``."""
    if not torch.is_grad_enabled():
        return target_losses(model, hidden, targets).sum()
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    rows = _rows_per_chunk(model, hidden, chunk_device)
    trained = [p for p in head.parameters() if p.requires_grad]
    return _ChunkedCrossEntropy.apply(head, partial(_scaled, config), rows, targets, hidden, *trained)


def target_losses(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross entropy of each target, (N,), float32, as `summed_cross_entropy` takes them."""
    rows = _rows_per_chunk(model, hidden)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([_cross_entropy(logits_of(model, h), t) for h, t in chunks])


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of each target, (N,), in float32, in which few of the logits are held at a time."""
    rows = rows_at_a_time(logits.size(-1), logits.device)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.cross_entropy(part.float(), target, reduction="none") for part, target in parts])


def _rows_per_chunk(model: PreTrainedModel, hidden: Tensor, chunk_device: torch.device | None = None) -> int:
    row = model.config.get_text_config().vocab_size * hidden.element_size()
    on_cpu = (chunk_device or hidden.device).type == "cpu"
    return max(1, CPU_CHUNK_BYTES // row, 0 if on_cpu else min(GPU_CHUNK_ROWS, GPU_CHUNK_BYTES // row))


def _cross_entropy_into_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed cross entropy and replaces the logits by its gradient, softmax minus one-hot; float32 within."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    rows = rows_at_a_time(logits.size(-1), logits.device)
    starts = torch.arange(len(targets), device=logits.device) * logits.size(-1)
    for part, target in zip(logits.split(rows), targets.unsqueeze(-1).split(rows), strict=True):
        exact = part.float()
        behind = exact.amax(-1, keepdim=True) - exact.gather(-1, target)
        gradient = exact.softmax(-1)
        total += (behind - gradient.amax(-1, keepdim=True).log()).sum()  # the target's own probability may be rounded to 0
        # Flat: in two dimensions CUDA's deterministic algorithm waits for the device.
        gradient.view(-1).index_add_(0, starts[: len(target)] + target.squeeze(-1), -torch.ones_like(exact[:, 0]))
        part.copy_(gradient)
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """A sum over rows whose gradients are taken chunk by chunk within forward, so that nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, scaled: Callable[[Tensor], Tensor], rows: int, targets: Tensor, hidden: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        head_gradients: dict[Tensor | None, Tensor] = {p: torch.zeros_like(p) for p in parameters}
        multiplied = _plain_head_weight(head, hidden)
        others = [p for p in parameters if p is not multiplied]
        into = hidden if hidden_gradient is None else hidden_gradient
        for part, target, gradient_part in zip(hidden.split(rows), targets.split(rows), into.split(rows), strict=True):
            chunk = part.detach().requires_grad_(hidden.requires_grad)
            with torch.enable_grad():
                product = head(chunk)
                logits = scaled(product)
            slope = logits.detach()
            total += _cross_entropy_into_gradient_(slope, target)
            if not logits.requires_grad:
                continue
            wanted = [product, *([chunk] if chunk.requires_grad else []), *others]
            product_gradient, *gradients = torch.autograd.grad(logits, wanted, slope)
            if hidden_gradient is not None:
                gradient_part.copy_(gradients.pop(0))
            if multiplied in head_gradients:  # added where it belongs, in half the time of what autograd would return
                head_gradients[multiplied].addmm_(product_gradient.mT, chunk.detach())
            for p, gradient in zip(others, gradients, strict=True):
                head_gradients[p].add_(gradient)
        ctx.gradients = [hidden_gradient, *head_gradients.values()]
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place: this gradient is as large as the head, and autograd can add to a tensor that has no other owner.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or torch.is_grad_enabled():
            raise RuntimeError("this loss has one backward pass, without create_graph; compute it again, or the model's own")
        return None, None, None, None, *(g if g is None else g.mul_(scale.to(g.dtype)) for g in gradients)


def _plain_head_weight(head: nn.Module, hidden: Tensor) -> Tensor | None:
    """The weight of a head that multiplies hidden states with it as they are, without an adapter or a cast; else None."""
    if type(head) is not nn.Linear or head.weight.dtype != hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
        return None
    return head.weight
