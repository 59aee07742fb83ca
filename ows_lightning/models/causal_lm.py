"""CausalLM: a causal LM whose forward returns the loss, with the likelihoods and the answers that evaluation needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from ows_lightning.compat import persistent_buffer_names
from ows_lightning.errors import UsageError
from ows_lightning.models import loss
from ows_lightning.models.decoder import language_model_of


class CausalLM(nn.Module):
    """A causal LM of transformers, or a peft model around one, whose forward is the loss.

    All that runs the model goes through this module: ``forward`` and ``forward_methods``. So it can be the root of sharding
    (see ``shard_model``), whose hooks gather the weights before any of them.
    """

    # what needs the weights beside ``forward``
    forward_methods = ("loss_and_predictions", "log_likelihoods", "generate", "check_logits")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model itself, also within a peft model."""
        return cast(PreTrainedModel, language_model_of(self.model))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLM":
        """Converts and moves weights as any module does, but computed buffers, RoPE's frequencies, keep their dtype.

        Nor are weights rounded that transformers or peft keep in float32 in a half-precision model, as ``bf16-true`` would.
        """
        named = [(persistent_buffer_names(m), m.named_buffers(recurse=False)) for m in self.modules()]
        computed = {id(buffer) for persistent, buffers in named for name, buffer in buffers if name not in persistent}
        in_half = self.language_model.dtype in (torch.bfloat16, torch.float16)

        def convert(tensor: Tensor) -> Tensor:
            kept = id(tensor) in computed or (in_half and tensor.dtype == torch.float32)
            return tensor.to(fn(tensor).device) if kept else fn(tensor)

        return super()._apply(convert, recurse)

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        """Returns a batch's ``LossParts``; without labels the model's own output, with logits of shape (B, L, vocabulary).

        The labels (B, L), int64, are not shifted, and -100 where there is no target; the inputs are what the model takes.
        """
        if labels is None:
            return self.language_model(**inputs)
        return loss.next_token_loss(self.language_model, {**inputs, "labels": labels})

    def loss_and_predictions(self, batch: dict[str, Tensor]) -> tuple[loss.LossParts, Tensor]:
        """Returns the loss of a batch, without a graph, and the likeliest token at each target."""
        return loss.loss_and_predictions(self.language_model, batch)

    def log_likelihoods(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the summed log-likelihood (nats) of each row's target tokens, (B,), float32; the batch is not packed."""
        model, targets = self.language_model, batch["labels"][:, 1:]
        hidden = loss.last_hidden_state(model, {key: batch[key] for key in ("input_ids", "attention_mask")})[:, :-1]
        has_target = targets != loss.IGNORE_INDEX
        likelihoods = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        likelihoods[has_target] = -loss.target_losses(model, hidden[has_target], targets[has_target])
        return likelihoods.sum(1)

    @torch.no_grad()
    def generate(self, **inputs: Any) -> Tensor:
        """Generates greedily, and returns token ids of shape (B, L + new), prompts included; takes what transformers' does."""
        model: Any = self.language_model  # transformers types it as a tensor or a module
        return model.generate(do_sample=False, temperature=None, top_p=None, top_k=None, **inputs)

    @torch.no_grad()
    def check_logits(self, input_ids: Tensor) -> None:
        """Raises a UsageError if our logits, of which the loss is made, are not the model's own on these tokens (B, L)."""
        model, name = self.language_model, type(self.language_model).__name__
        config = model.config.get_text_config()
        ids = input_ids % config.vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with eval_mode(self):
            try:
                expected = model(**inputs, use_cache=False).logits
            except (ValueError, TypeError, AttributeError) as error:  # e.g. a draft model, which wants another model's states
                raise UsageError(f"model.model_name_or_path: {name} does not run on text alone ({error})") from error
            try:
                ours = loss.logits_of(model, loss.last_hidden_state(model, inputs))
            except (RuntimeError, TypeError, AttributeError):  # the head takes something else than the decoder's last states
                ours = torch.full_like(expected, float("nan"))
        if not torch.allclose(ours.float(), expected.float(), rtol=1e-2, atol=1e-2):
            raise UsageError(f"model.model_name_or_path: the loss does not know how {name} makes its logits")
        if getattr(config, "output_router_logits", False):
            rank_zero_warn(f"{name}'s loss for balancing its experts (output_router_logits) is left out of training")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets eval mode; afterwards every module is in its own mode again, as a user or Lightning set it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def run_causal_lm(model: nn.Module, **inputs: Any) -> Any:
    """Runs the causal LM in a module, sharded or not, without labels; through the ``CausalLM`` around it if there is one."""
    owner = next((module for module in model.modules() if isinstance(module, CausalLM)), None)
    return language_model_of(model)(**inputs) if owner is None else owner(**inputs)
