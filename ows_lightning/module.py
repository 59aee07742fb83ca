"""CausalLMModule: a LightningModule around a causal LM of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import transformers
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ows_lightning.checkpoints.settings import check_settings, lasting_settings
from ows_lightning.data.masking import end_of_turn_id, with_chat_template
from ows_lightning.distributed.loading import empty_model, load_into_shards
from ows_lightning.errors import UsageError
from ows_lightning.metrics.choices import ChoiceAccuracy
from ows_lightning.metrics.held_out import HeldOutFigures
from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.lora import add_lora, lora_config
from ows_lightning.models.positions import exceeded_positions
from ows_lightning.models.pretrained import (
    checkpoint_activations,
    load_config,
    load_model,
    load_tokenizer,
    resize_embeddings,
    stop_at,
)  # fmt: skip
from ows_lightning.optim.galore import GaLoreAdamW, ProjType
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.optim.subspace import Method
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.requirements import require_layerwise
from ows_lightning.sampling.scores import architecture_of
from ows_lightning.step import Step, StepFigures
from ows_lightning.streaming.requirements import check_window, require_waiting
from ows_lightning.streaming.window import Window

DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


def default_optimizer(params: Any) -> Optimizer:
    """Returns GaLoreAdamW with a learning rate of 3e-4."""
    return GaLoreAdamW(params, lr=3e-4)


class CausalLMModule(LightningModule):
    """Fine-tunes a causal LM: loss over the target tokens of each optimizer step, projected AdamW, warm-up and decay.

    The loss, and with it the gradient, is the mean over all target tokens of an optimizer step, over its micro-batches
    and ranks: what one large batch would give. ``grad_norm``, which ``gradient_clip_val`` bounds, is the norm of what
    the optimizer consumes: projected gradients where a weight is projected. Called as ``module(**batch)`` it returns the
    batch's loss, see ``CausalLM``. It can be fitted again, by any Trainer.

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
        frozen_in: Where frozen blocks wait: ``device``, or ``host`` memory, from where they pass through a window on the
            device. No bit of what is computed changes. For one device, with sampling or LoRA.
        frozen_dtype: None: frozen blocks wait as they are.
        window_blocks: Blocks that the window holds, 2 or 3.
        max_new_tokens: Length limit of generated answers.
        max_skipped_steps: Stop the run after so many steps in a row whose gradients held a NaN or Inf; each is skipped. By the
            callback ``StopOnNaN``, which ``OWSTrainer`` brings along.
        trust_remote_code: Run code that the model's repository brings along.

    Raises:
        UsageError: A setting is out of its range, or settings contradict each other.
    """

    def __init__(
        self,
        model_name_or_path: str,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        optimizer: OptimizerCallable = default_optimizer,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: ProjType = "std",
        subspace: Method = "randomized",
        project_embeddings: bool = False,
        lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine",
        warmup_steps: float = 0.03,
        lora: dict[str, Any] | None = None,
        frozen_in: Literal["device", "host", "disk"] = "device",
        frozen_dtype: Literal["int8"] | None = None,
        window_blocks: int = 2,
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
        check_window(frozen_in, frozen_dtype, window_blocks)
        self.save_hyperparameters(ignore=["optimizer"])
        self.make_optimizer: Callable[[Any], Optimizer] = optimizer
        self.causal_lm: CausalLM | None = None
        self.window: Window | None = None  # that frozen blocks pass through
        self.val_figures, self.test_figures, self.test_choices = HeldOutFigures(), HeldOutFigures(), ChoiceAccuracy()
        self.last_step: StepFigures | None = None  # of the latest optimizer step
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use; with a plain chat template where it has none of its own."""
        if self._tokenizer is None:
            tokenizer = load_tokenizer(self.hparams["model_name_or_path"], self.hparams["trust_remote_code"])
            self._tokenizer = with_chat_template(tokenizer)
        return self._tokenizer

    @property
    def model(self) -> Any:
        """The transformers model, or peft's around one; None before ``configure_model``."""
        return None if self.causal_lm is None else self.causal_lm.model

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model itself, also within a peft model."""
        return self._lm.language_model

    @property
    def _lm(self) -> CausalLM:
        self.configure_model()
        assert self.causal_lm is not None
        return self.causal_lm

    def forward(self, **batch: Any) -> Any:
        """Returns the loss of a batch as ``LossParts``, or the model's own output where there are no ``labels``."""
        return self._lm(**batch)

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

    def exceeded_positions(self, length: int) -> int | None:
        """The most tokens that the model has positions for, where `length` are more; from its config, without weights."""
        options = self.hparams["model_name_or_path"], self.hparams["trust_remote_code"]
        return exceeded_positions(load_config(*options), length, options[1])

    def check_optimizer(self) -> Optimizer:
        """Makes the optimizer once for two small weights, to see whether it can be made.

        Raises:
            UsageError: One of its settings is out of range, or it can't project.
        """
        try:
            optimizer = self.make_optimizer([{"params": [nn.Parameter(torch.zeros(2, 2))]} for _ in range(2)])
        except (TypeError, ValueError) as error:
            raise UsageError(f"model.optimizer: {error}") from error
        self._check_projection(optimizer)
        return optimizer

    def setup(self, stage: str) -> None:
        """Starts afresh: of an earlier run the weights remain."""
        if stage == "fit":
            some_are_frozen = self.hparams["lora"] is not None or self._sampling is not None
            strategy = "fsdp2" if self.device_mesh is not None else "auto"
            require_waiting(self.hparams["frozen_in"], some_are_frozen, self.trainer.world_size, strategy)
            self._step = Step(self.trainer.accumulate_grad_batches, self.trainer.world_size)
            self.last_step = None

    def configure_model(self) -> None:
        """Loads the weights, once, in the dtype that the Trainer's precision asks for."""
        if self.causal_lm is not None:
            return
        if self.device_mesh is None:
            self.causal_lm = CausalLM(self.build())
        else:
            mesh, device = self.device_mesh["data_parallel"], self.trainer.strategy.root_device
            name = self.hparams["model_name_or_path"]
            self.causal_lm = load_into_shards(self.build, name, mesh, device, self._precision)
        if self.hparams["gradient_checkpointing"]:
            checkpoint_activations(self.language_model)
        if self.hparams["compile"]:
            # The blocks share their cases: frozen or not, with a gradient from below or not, lengths that are fixed or change.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
            for layer in decoder_layers(self):
                layer.compile()
        if self.hparams["frozen_in"] == "host":
            layers, slots = decoder_layers(self), self.hparams["window_blocks"]
            self.window = Window(layers, slots, frozen_only=self.hparams["lora"] is not None)

    def build(self, empty: bool = False) -> nn.Module:
        """Makes the model with its weights, or ``empty``: with weights on the meta device, for others to fill."""
        name = self.hparams["model_name_or_path"]
        options: dict[str, Any] = {key: self.hparams[key] for key in ("attn_implementation", "trust_remote_code")}
        options["dtype"] = DTYPES.get(self._precision, torch.float32)
        model = empty_model(name, len(self.tokenizer), **options) if empty else load_model(name, **options)
        resize_embeddings(model, self.tokenizer)
        stop_at(model, end_of_turn_id(self.tokenizer))
        return add_lora(model, self.hparams["lora"]) if self.hparams["lora"] is not None else model

    @property
    def _precision(self) -> str:
        return str(self._trainer.precision) if self._trainer is not None else "32-true"

    def configure_optimizers(self) -> Any:
        """Returns the optimizer over all trainable parameters, and a schedule by optimizer steps."""
        optimizer = self.make_optimizer(self.param_groups())
        if isinstance(optimizer, GaLoreAdamW):
            require_layerwise(self.trainer.strategy)
            optimizer.project_in_backward()
        self._check_projection(optimizer)
        warmup, kind = self.hparams["warmup_steps"], self.hparams["lr_scheduler_type"]
        steps = self.trainer.estimated_stepping_batches
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

    def param_groups(self) -> Any:
        """Returns what the optimizer is made for: groups of named parameters, with the settings of projection."""
        names = ("rank", "update_proj_gap", "scale", "proj_type", "subspace", "project_embeddings")
        settings = {name: self.hparams[name] for name in names if self.hparams[name] is not None}
        groups = galore_param_groups(self.model, **settings)
        if self.hparams["rank"] is None:
            keep = ("params", "weight_decay")
            groups = [{key: group[key] for key in keep if key in group} for group in groups]
        return groups

    @torch.compiler.set_stance("force_eager")
    def on_fit_start(self) -> None:
        """Makes sure that our chunked loss is this model's own loss, before anything trains."""
        ids = torch.arange(4, device=self.device)[None] % self.language_model.config.get_text_config().vocab_size
        training = self.training
        self.eval()
        with self.trainer.precision_plugin.forward_context():
            agrees = self._lm.agrees(ids)
        self.train(training)
        if not agrees:
            raise UsageError(
                f"model.model_name_or_path: the loss does not know how {type(self.language_model).__name__} makes its logits"
            )

    # ------------------------------------------------------------------ steps

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds dropout by batch and rank: a resumed run draws what the uninterrupted one would have drawn."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        torch.manual_seed(hash((seed, self.trainer.global_step, batch_idx, self.trainer.global_rank)))
        if self.window is not None:
            self.window.settle(self.trainer.optimizers)  # blocks may have been drawn just now

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of a micro-batch; ``configure_gradient_clipping`` makes its gradient that of the step's mean."""
        last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, GaLoreAdamW):
            optimizer.accumulating = not last
        parts = self._lm(**batch)
        ids = batch["input_ids"]
        tokens = batch["attention_mask"].sum() if "attention_mask" in batch else ids.new_tensor(ids.numel())
        return self._step.add(parts, tokens, last)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Makes the gradients of a loss that is not finite NaN, if they are not: on every process the step is skipped then."""
        super().backward(loss * torch.where(loss.isfinite(), 1.0, float("nan")), *args, **kwargs)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Completes the step's gradient, clips what the optimizer consumes, and logs loss and norm."""
        self.last_step = self._step.finish(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.log("train_loss", self.last_step.loss, prog_bar=True)
        self.log("grad_norm", self.last_step.grad_norm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Steps, and drops the gradients at once: Lightning would keep full-rank ones through the next forward."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    # ------------------------------------------------------------------ held-out data

    def on_validation_epoch_start(self) -> None:
        """Begins the held-out figures anew."""
        self.val_figures.begin()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the loss of a held-out batch, or compares generated answers where the batch has a ``reference``."""
        self._evaluate(batch, self.val_figures)

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out figures."""
        self.log_dict(self.val_figures.figures("val"), prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Begins the figures of the test data anew."""
        self.test_figures.begin()
        self.test_choices.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As ``validation_step``, on the test data, and likelihoods where the batch has choices."""
        if "right" in batch:
            self.test_choices.update(batch, self._lm.score(batch))
        else:
            self._evaluate(batch, self.test_figures)

    def on_test_epoch_end(self) -> None:
        """Logs the figures of the test data."""
        self.log_dict(self.test_figures.figures("test"), prog_bar=True)
        if self.test_choices.update_count > 0:
            self.log_dict({f"test_{name}": value for name, value in self.test_choices.compute().items()})

    def _evaluate(self, batch: dict[str, Any], figures: HeldOutFigures) -> None:
        if "reference" in batch:
            figures.add_answers(zip(self.generate(batch), batch["reference"], strict=True))
        else:
            parts = self._lm(**batch)
            figures.add_loss(parts.loss, parts.targets)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Returns a dict a row: what the batch knows of it (``prompt``, ``reference``), and the ``generated`` answer."""
        answers = self.generate(batch)
        facts = {key: value for key, value in batch.items() if not isinstance(value, Tensor)}
        rows = [{**{key: values[i] for key, values in facts.items()}, "generated": answers[i]} for i in range(len(answers))]
        return [row for row in rows if row.get("reference", "") is not None]  # None: it fills up a rank's share

    @torch.compiler.set_stance("force_eager")  # its cache is another case for each block: nothing would be left for training
    def generate(self, batch: dict[str, Any]) -> list[str]:
        """Returns the greedy continuation of each left-padded prompt (``input_ids``, ``attention_mask``), as text."""
        prompts = batch["input_ids"]
        generated = self._lm.generate(
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

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the settings that have to be the same when the run is resumed."""
        checkpoint["settings"] = self._lasting_settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that does not belong to this run.

        Raises:
            UsageError: A run is resumed with settings that it can't change, or the checkpoint is of another model.
        """
        if self._trainer is not None:
            check_settings(checkpoint.get("settings"), self._lasting_settings(), resumes=self.trainer.training)

    def _lasting_settings(self) -> dict[str, Any]:
        architecture = architecture_of(self.language_model.config)
        return lasting_settings(self.hparams, len(decoder_layers(self)), architecture, self._sampling)

    @property
    def _sampling(self) -> LayerwiseSampling | None:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, LayerwiseSampling)), None)
