"""One module owns forward: a causal LM with its loss, its scores and its answers."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ows_lightning.models.decoder import causal_lm
from ows_lightning.models.loss import last_hidden_state, logits_of, next_token_loss, row_log_likelihoods


class LossParts(NamedTuple):
    """A loss in parts that can be added up over batches, two scalars.

    Attributes:
        total: Summed cross entropy over the target tokens (nats), float32, with a graph while gradients are enabled.
        targets: Number of target tokens, int64.
    """

    total: Tensor
    targets: Tensor

    @property
    def loss(self) -> Tensor:
        """The mean over the target tokens; 0 without any."""
        return self.total / self.targets.clamp(min=1)


class CausalLM(nn.Module):
    """A causal LM of transformers, or a peft model around one, whose forward is the loss.

    All that runs the model goes through this module: ``forward``, ``score``, ``generate`` and ``agrees``. So it can be the
    root of sharding (see ``shard_model``), whose hooks gather the weights before any of them.

    Args:
        model: The model; its parameters and buffers are shared, not copied.
    """

    forward_methods = ("score", "generate", "agrees")
    """What needs the weights beside ``forward``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model itself, also within a peft model."""
        return cast(PreTrainedModel, causal_lm(self.model))

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        """Returns the loss of a batch, or what the transformers model returns if there are no labels.

        Args:
            labels: Shape (B, L), int64, not shifted, -100 where there is no target.
            **inputs: ``input_ids`` (B, L), int64, and what else the model's forward takes.

        Returns:
            ``LossParts``; without labels the model's own output, with logits of shape (B, L, vocabulary).
        """
        if labels is None:
            return self.language_model(**inputs)
        return LossParts(*next_token_loss(self.language_model, {**inputs, "labels": labels}))

    def score(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns each row's summed log-likelihood, see ``row_log_likelihoods``."""
        return row_log_likelihoods(self.language_model, batch)

    @torch.no_grad()
    def generate(self, **inputs: Any) -> Tensor:
        """Returns what transformers' ``generate`` returns: token ids of shape (B, L + new), prompts included."""
        model: Any = self.language_model  # transformers types it as a tensor or a module
        generated: Tensor = model.generate(**inputs)
        return generated

    @torch.no_grad()
    def agrees(self, input_ids: Tensor) -> bool:
        """Whether our logits, of which the loss is made, are the model's own on these tokens (B, L), to one in a hundred."""
        model = self.language_model
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        expected = model(**inputs, use_cache=False).logits
        try:
            ours = logits_of(model, last_hidden_state(model, inputs))
        except RuntimeError:  # something between decoder and head changes the width
            return False
        return torch.allclose(ours.float(), expected.float(), rtol=1e-2, atol=1e-2)


def run_causal_lm(model: nn.Module, **inputs: Any) -> Any:
    """Runs the causal LM in a module, without labels, through the module that owns its forward if there is one.

    Args:
        model: A causal LM, or any module that contains one, sharded or not.
        **inputs: What the transformers model takes.

    Returns:
        What the transformers model returns.
    """
    owner = next((module for module in model.modules() if isinstance(module, CausalLM)), None)
    return causal_lm(model)(**inputs) if owner is None else owner(**inputs)
