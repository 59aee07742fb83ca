"""CausalLMModule: a LightningModule around a causal LM of transformers."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import transformers
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ows_lightning.callbacks import resume
from ows_lightning.checkpoints.find import last_good
from ows_lightning.data.masking import end_of_turn_id, with_chat_template
from ows_lightning.distributed.loading import empty_model, load_into_shards
from ows_lightning.distributed.requirements import require_layerwise
from ows_lightning.errors import RunError, UsageError
from ows_lightning.metrics.choices import ChoiceAccuracy, row_log_likelihoods
from ows_lightning.metrics.perplexity import TokenPerplexity
from ows_lightning.models.decoder import causal_lm, decoder_layers
from ows_lightning.models.lora import add_lora, lora_config
from ows_lightning.models.loss import logits_of, next_token_loss
from ows_lightning.models.pretrained import checkpoint_activations, load_config, load_model, load_tokenizer, resize_embeddings
from ows_lightning.optim.galore import GaLoreAdamW, ProjType
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.optim.sharding import local, total_norm
from ows_lightning.optim.subspace import Method

log = logging.getLogger(__name__)

DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


class CausalLMModule(LightningModule):
    """Fine-tunes a causal LM: loss over the target tokens of each optimizer step, projected AdamW, warm-up and decay.

    The loss, and with it the gradient, is the mean over all target tokens of an optimizer step, over its micro-batches
    and ranks: what one large batch would give. ``grad_norm``, which ``gradient_clip_val`` bounds, is the norm of what
    the optimizer
    consumes: projected gradients where a weight is projected.

    Args:
        model_name_or_path: Hub name, local directory, ``.gguf`` file, or ``package://PACKAGE/FILE.gguf``.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None is transformers' choice.
        gradient_checkpointing: Recompute activations in backward. Blocks below the lowest active one store nothing either way
            while the embeddings are frozen.
        compile: Compile each decoder block with ``torch.compile``.
        optimizer: From parameter groups to an optimizer.
        rank: Rank of the projected gradients of GaLoreAdamW; None trains in full rank (and is needed for other optimizers).
        update_proj_gap: Optimizer steps between two renewals of a subspace.
        scale: Factor of the projected updates.
        proj_type: Which dimension of a weight is projected.
        subspace: How subspaces are found: ``randomized`` or ``svd``.
        project_embeddings: Project embeddings and LM head, too, where they train.
        lr_scheduler_type: Decay after the warm-up: ``cosine``, ``linear`` or ``constant``.
        warmup_steps: Optimizer steps of warm-up; below 1 a share of all steps.
        lora: Settings of peft's ``LoraConfig``; the base model is frozen then. Needs the extra ``lora``.
        max_new_tokens: Length limit of generated answers.
        max_skipped_steps: Stop the run after so many steps in a row whose gradients held a NaN or Inf; each is skipped.
        trust_remote_code: Run code that the model's repository brings along.

    Raises:
        UsageError: A setting is out of its range, or settings contradict each other.
    """

    # Of the optimizer step that is under way, over its micro-batches and ranks so far; None before its first micro-batch.
    _step_totals: Any  # summed cross entropy, number of target tokens, and of all tokens
    _first_targets: Any  # that of the first micro-batch

    def __init__(
        self,
        model_name_or_path: str,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        optimizer: OptimizerCallable = lambda params: GaLoreAdamW(params, lr=3e-4),
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: ProjType = "std",
        subspace: Method = "randomized",
        project_embeddings: bool = False,
        lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine",
        warmup_steps: float = 0.03,
        lora: dict[str, Any] | None = None,
        max_new_tokens: int = 64,
        max_skipped_steps: int = 10,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if rank is not None and rank < 1:
            raise UsageError(f"model.rank: {rank} must be at least 1, or null to train in full rank")
        if update_proj_gap < 1:
            raise UsageError(f"model.update_proj_gap: {update_proj_gap} must be at least 1")
        if not 0 < scale < float("inf"):
            raise UsageError(f"model.scale: {scale} must be above 0; it multiplies the updates of projected matrices")
        for name, value in (("max_new_tokens", max_new_tokens), ("max_skipped_steps", max_skipped_steps)):
            if value < 1:
                raise UsageError(f"model.{name}: {value} must be at least 1")
        if warmup_steps < 0:
            raise UsageError(f"model.warmup_steps: {warmup_steps} must be at least 0 (below 1 it is a share of all steps)")
        self.save_hyperparameters(ignore=["optimizer"])
        self.make_optimizer: Callable[[Any], Optimizer] = optimizer
        self.model: Any = None  # a transformers model, or peft's around one
        self.val_perplexity, self.val_exact_match = TokenPerplexity(), MeanMetric()
        self.test_perplexity, self.test_exact_match = TokenPerplexity(), MeanMetric()
        self.test_choices = ChoiceAccuracy()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokens_seen, self._time_before = 0, 0.0
        self._skipped_in_a_row = 0
        self._max_steps_before: int | None = None
        self._reset_step()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use; with a plain chat template where it has none of its own."""
        if self._tokenizer is None:
            tokenizer = load_tokenizer(self.hparams["model_name_or_path"], self.hparams["trust_remote_code"])
            self._tokenizer = with_chat_template(tokenizer)
        return self._tokenizer

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model itself, also within a peft model."""
        return cast(PreTrainedModel, causal_lm(self))

    # ------------------------------------------------------------------ set-up

    def check(self) -> PretrainedConfig:
        """Finds all that is wrong with the settings and needs no weights to be found.

        Returns:
            The model's config.

        Raises:
            UsageError: Names the setting, and what to do.
        """
        self.check_optimizer()
        if self.hparams["lora"] is not None:
            lora_config(self.hparams["lora"])
        return load_config(self.hparams["model_name_or_path"], self.hparams["trust_remote_code"])

    def check_optimizer(self) -> Optimizer:
        """Makes the optimizer for two groups of weights of no consequence.

        Raises:
            UsageError: One of its settings is out of range, or it can't project.
        """
        try:
            optimizer = self.make_optimizer([{"params": [nn.Parameter(torch.zeros(2, 2))]} for _ in range(2)])
        except (TypeError, ValueError) as error:
            raise UsageError(f"model.optimizer: {error}") from error
        self._check_projection(optimizer)
        return optimizer

    def configure_model(self) -> None:
        """Loads the weights, once, in the dtype that the Trainer's precision asks for."""
        if self.model is not None:
            return
        precision = self._trainer.precision if self._trainer is not None else "32-true"
        if self.device_mesh is None:
            self.model = self._build(empty=False)
        else:
            mesh, device = self.device_mesh["data_parallel"], self.trainer.strategy.root_device
            self.model = load_into_shards(self._build, self.hparams["model_name_or_path"], mesh, device, precision)
        if self.hparams["gradient_checkpointing"]:
            checkpoint_activations(self.language_model)
        if self.hparams["compile"]:
            # The blocks share their cases: frozen or not, with a gradient from below or not, lengths that are fixed or change.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
            for layer in decoder_layers(self):
                layer.compile()

    def _build(self, empty: bool) -> nn.Module:
        """Makes the model with its weights, or ``empty`` for FSDP2 to fill its shards."""
        precision = self._trainer.precision if self._trainer is not None else "32-true"
        name = self.hparams["model_name_or_path"]
        options: dict[str, Any] = {key: self.hparams[key] for key in ("attn_implementation", "trust_remote_code")}
        options["dtype"] = DTYPES.get(precision, torch.float32)
        model = empty_model(name, len(self.tokenizer), **options) if empty else load_model(name, **options)
        resize_embeddings(model, self.tokenizer)
        _stop_at(model, end_of_turn_id(self.tokenizer))
        return add_lora(model, self.hparams["lora"]) if self.hparams["lora"] is not None else model

    def configure_optimizers(self) -> Any:
        """Returns the optimizer over all trainable parameters, and a schedule by optimizer steps."""
        optimizer = self.make_optimizer(self._param_groups())
        if isinstance(optimizer, GaLoreAdamW):
            require_layerwise(self.trainer.strategy)
            optimizer.project_in_backward()
        self._check_projection(optimizer)
        kept = ("params", "param_names")
        self._options = [{k: v for k, v in group.items() if k not in kept} for group in optimizer.param_groups]
        steps, warmup, kind = (
            self.trainer.estimated_stepping_batches, self.hparams["warmup_steps"], self.hparams["lr_scheduler_type"]
        )  # fmt: skip
        if steps == float("inf"):
            if kind != "constant" or 0 < warmup < 1:
                raise UsageError(
                    "trainer.max_steps: the schedule needs the number of steps; give max_steps or max_epochs, or set "
                    "model.lr_scheduler_type to constant and model.warmup_steps to a number of steps"
                )
            steps = 0  # of no consequence for a constant rate
        steps = int(steps)
        scheduler = transformers.get_scheduler(  # imported when used: it imports peft and bitsandbytes where they are
            "constant_with_warmup" if kind == "constant" else kind,
            optimizer,
            num_warmup_steps=round(warmup * steps) if warmup < 1 else int(warmup),
            num_training_steps=steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _check_projection(self, optimizer: Optimizer) -> None:
        if self.hparams["rank"] is not None and not isinstance(optimizer, GaLoreAdamW):
            raise UsageError(f"model.rank: {type(optimizer).__name__} can't project; set rank to null, or take GaLoreAdamW")

    def _param_groups(self) -> Any:
        names = ("rank", "update_proj_gap", "scale", "proj_type", "subspace", "project_embeddings")
        groups = galore_param_groups(self, **{name: self.hparams[name] for name in names if self.hparams[name] is not None})
        if self.hparams["rank"] is None:
            keep = ("params", "weight_decay")
            groups = [{key: group[key] for key in keep if key in group} for group in groups]
        return groups

    @torch.compiler.set_stance("force_eager")
    def on_fit_start(self) -> None:
        """Makes sure that our chunked loss is this model's own loss, before anything trains."""
        self._start = self._last_step = time.perf_counter()
        ids = torch.arange(4, device=self.device)[None] % self.language_model.config.get_text_config().vocab_size
        training = self.training
        self.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            ours, expected = self._through_forward(_both_logits, ids)
        self.train(training)
        if not torch.allclose(ours.float(), expected.float(), rtol=1e-2, atol=1e-2):
            raise UsageError(
                f"model.model_name_or_path: the loss does not know how {type(self.language_model).__name__} makes its logits"
            )

    def on_train_start(self) -> None:
        """Lets a resumed run have the learning rate, and number of steps, that are configured now."""
        if self.trainer.ckpt_path is not None:
            resume.save_no_step_again(self.trainer)
            resume.apply_changes(self.trainer, self._options, self._max_steps_before)

    # ------------------------------------------------------------------ steps

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds dropout by batch and rank: a resumed run draws what the uninterrupted one would have drawn."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        torch.manual_seed(hash((seed, self.trainer.global_step, batch_idx, self.trainer.global_rank)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of a micro-batch; scaled in ``configure_gradient_clipping`` to be the whole step's mean."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, GaLoreAdamW):
            last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
            optimizer.accumulating = not last
        loss, targets = self._loss(batch)
        tokens = batch["attention_mask"].sum() if "attention_mask" in batch else loss.new_tensor(batch["input_ids"].numel())
        total = torch.stack([loss.detach(), targets.to(loss.dtype), tokens.to(loss.dtype)])
        if self.trainer.world_size > 1:
            dist.all_reduce(total)  # strategy.reduce would hold all processes up with a barrier
        if self._step_totals is None:
            # What the first micro-batch has on average a rank, the same on all; any other fixed number would do.
            self._first_targets = total[1].clamp(min=1)
            self._step_totals = total
        else:
            self._step_totals = self._step_totals + total
        return loss * self.trainer.world_size / self._first_targets

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Makes the gradients of a loss that is not finite NaN, if they are not: on every process the step is skipped then."""
        super().backward(loss * torch.where(loss.isfinite(), 1.0, float("nan")), *args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Makes the gradient that of the step's mean loss, logs its norm, and clips what the optimizer consumes."""
        gradients = self._gradients(optimizer)
        parts = [local(gradient) for gradient in gradients]
        loss, targets, tokens = self._step_totals
        targets = targets.clamp(min=1)
        if self.trainer.accumulate_grad_batches > 1:
            torch._foreach_mul_(parts, self._first_targets * self.trainer.accumulate_grad_batches / targets)
        norm = total_norm(gradients)
        self._skipped_in_a_row = 0 if norm.isfinite() else self._skipped_in_a_row + 1
        if self._skipped_in_a_row:
            if not isinstance(optimizer, GaLoreAdamW):  # which skips, and names the weight, by itself
                log.warning("Step skipped: a gradient holds NaN or Inf (%d in a row)", self._skipped_in_a_row)
                optimizer.zero_grad()
        elif gradient_clip_val:
            if gradient_clip_algorithm == "value":
                torch._foreach_clamp_min_(parts, -gradient_clip_val)
                torch._foreach_clamp_max_(parts, gradient_clip_val)
            else:
                torch._foreach_mul_(parts, (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0))
        self._log_step(loss / targets, norm, int(tokens))
        if isinstance(optimizer, GaLoreAdamW):
            self.log("renewal_s", optimizer.renewal_s)
        self._reset_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends a run whose gradients stay NaN or Inf; its weights are still those of the last good step."""
        if self._skipped_in_a_row >= self.hparams["max_skipped_steps"]:
            folder = getattr(self.trainer.checkpoint_callback, "dirpath", None)
            good = self.trainer.strategy.broadcast(last_good(Path(folder)) if folder else None)
            if folder and good is None:
                good = Path(folder) / f"stopped-step={self.trainer.global_step}.ckpt"
                self.trainer.save_checkpoint(good)
            where = f"the last checkpoint is '{good}'" if good else "checkpoints are switched off"
            raise RunError(
                f"{self._skipped_in_a_row} steps in a row had NaN or Inf in the loss or a gradient and were skipped; {where}; "
                "lower the learning rate, or set trainer.gradient_clip_val"
            )

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Steps, and drops the gradients at once: Lightning would keep full-rank ones through the next forward."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_validation_start(self) -> None:
        """Sums up in float32, whatever dtype the Trainer's precision gave the metrics with the rest of the module."""
        self.val_perplexity.set_dtype(torch.float32)
        self.val_exact_match.set_dtype(torch.float32)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the loss of a held-out batch, or compares generated answers where the batch has a ``reference``."""
        self._evaluate(batch, self.val_perplexity, self.val_exact_match)

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out figures."""
        self._log_evaluation("val", self.val_perplexity, self.val_exact_match)

    def on_test_start(self) -> None:
        """Sums up in float32."""
        self.test_perplexity.set_dtype(torch.float32)
        self.test_exact_match.set_dtype(torch.float32)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As ``validation_step``, on the test data, and likelihoods where the batch has choices."""
        if "right" in batch:
            self.test_choices.update(batch, self._through_forward(row_log_likelihoods, batch))
            return
        self._evaluate(batch, self.test_perplexity, self.test_exact_match)

    def on_test_epoch_end(self) -> None:
        """Logs the figures of the test data."""
        self._log_evaluation("test", self.test_perplexity, self.test_exact_match)
        if self.test_choices.update_count > 0:
            self.log_dict({f"test_{name}": value for name, value in self.test_choices.compute().items()})
            self.test_choices.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Returns a dict a row: what the batch knows of it (``prompt``, ``reference``), and the ``generated`` answer."""
        answers = self.generate(batch)
        facts = {key: value for key, value in batch.items() if not isinstance(value, Tensor)}
        rows = [{**{key: values[i] for key, values in facts.items()}, "generated": answers[i]} for i in range(len(answers))]
        return [row for row in rows if row.get("reference", "") is not None]  # None: it fills up a rank's share

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # its cache is another case for each block: nothing would be left for training
    def generate(self, batch: dict[str, Any]) -> list[str]:
        """Returns the greedy continuation of each left-padded prompt (``input_ids``, ``attention_mask``), as text."""
        prompts = batch["input_ids"]
        model: Any = self.language_model  # transformers types it as a tensor or a module
        generated = model.generate(
            input_ids=prompts,
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.hparams["max_new_tokens"],
            do_sample=False,
            synced_gpus=self.device_mesh is not None,  # each forward pass gathers weights: all processes have to take part
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(generated[:, prompts.size(1) :], skip_special_tokens=True)

    # ------------------------------------------------------------------ within a step

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._through_forward(next_token_loss, batch)

    def _through_forward(self, method: Callable[..., Any], *args: Any) -> Any:
        """Runs ``method(language_model, *args)`` within the model's ``__call__``, whose hooks sharding depends on."""
        model = self.model

        def forward(_: nn.Module, *args: Any) -> Any:
            del model.forward  # the class's own again, for calls from within
            return method(self.language_model, *args)

        model.forward = MethodType(forward, model)
        return model(*args)

    @staticmethod
    def _gradients(optimizer: Optimizer) -> list[Tensor]:
        if isinstance(optimizer, GaLoreAdamW):
            return optimizer.gradients()
        return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _reset_step(self) -> None:
        self._step_totals, self._first_targets = None, None

    def _log_step(self, loss: Tensor, norm: Tensor, tokens: int) -> None:
        now = time.perf_counter()
        self._tokens_seen += tokens
        self.log_dict({"train_loss": loss, "tokens_per_second": tokens / (now - self._last_step)}, prog_bar=True)
        self.log_dict(
            {
                "grad_norm": norm,
                "peak_memory_mb": _peak_memory_mb(self.device),
                "tokens": float(self._tokens_seen),
                "time_s": self._time_before + now - self._start,
            }
        )
        self._last_step = now

    def _evaluate(self, batch: dict[str, Any], perplexity: TokenPerplexity, exact_match: MeanMetric) -> None:
        if "reference" not in batch:
            perplexity.update(*self._loss(batch))
            return
        answers = self.generate(batch)
        pairs = zip(answers, batch["reference"], strict=True)
        hits = [answer.strip() == right.strip() for answer, right in pairs if right is not None]  # None: as in predict_step
        exact_match.update(torch.tensor(hits, dtype=torch.float32, device=self.device))

    def _log_evaluation(self, stage: str, perplexity: TokenPerplexity, exact_match: MeanMetric) -> dict[str, float]:
        value = perplexity.compute()
        figures = {f"{stage}_loss": value.log().item(), f"{stage}_perplexity": value.item()}
        if exact_match.update_count > 0:
            figures[f"{stage}_exact_match"] = exact_match.compute().item()
        self.log_dict(figures, prog_bar=True)
        with torch.inference_mode(False):  # a state made in inference mode could not be updated by a later fit
            perplexity.reset()
            exact_match.reset()
        return figures

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the curves go on from, and the settings that have to be the same when the run is resumed."""
        checkpoint["settings"] = resume.lasting_settings(self, self.trainer)
        checkpoint["progress"] = {
            "tokens": self._tokens_seen,
            "time_s": self._time_before + time.perf_counter() - self._start,
            "max_steps": self.trainer.max_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on from where the curves ended.

        Raises:
            UsageError: A run is resumed with settings that it can't change, or the checkpoint is of another model.
        """
        if self._trainer is not None:
            now = resume.lasting_settings(self, self.trainer)
            resume.check_settings(checkpoint.get("settings"), now, resumes=self.trainer.training)
        progress = checkpoint.get("progress", {})
        self._tokens_seen, self._time_before = progress.get("tokens", 0), progress.get("time_s", 0.0)
        self._max_steps_before = progress.get("max_steps")


def _stop_at(model: PreTrainedModel, token: int) -> None:
    """Ends generation at a token, too, here and where the exported model is used."""
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if token not in stops:
        model.generation_config.eos_token_id = [*stops, token]


def _both_logits(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    return logits_of(model, model.base_model(**inputs).last_hidden_state), model.forward(**inputs).logits


def _peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far, in MB: allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
