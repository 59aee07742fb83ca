"""CausalLMModule: a LightningModule around a causal LM of transformers."""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ows_lightning.checkpoints.fixed_settings import FIXED_MODEL_KEYS, check_fixed_settings, plain, sampling_settings
from ows_lightning.data.encoding import end_of_turn_id
from ows_lightning.distributed.sharded_model import load_into_shards
from ows_lightning.errors import UsageError
from ows_lightning.evaluation import EvaluationModule
from ows_lightning.fit.checks import check_callbacks, check_offloading, check_strategy, check_unscaled, offloads
from ows_lightning.fit.duration import expected_steps
from ows_lightning.fit.projection import prepare_fit
from ows_lightning.models import execution, pretrained
from ows_lightning.models.causal_lm import CausalLM
from ows_lightning.models.decoder import decoder_layers, non_block_parameters
from ows_lightning.models.execution import GradientCheckpointing, Kernels
from ows_lightning.models.lora import add_lora, lora_config
from ows_lightning.models.loss import LossParts, precompute_on_host, token_mask
from ows_lightning.offload.disk import Disk, load_mapped_model
from ows_lightning.offload.offloader import BlockOffloader
from ows_lightning.optim.galore import GaLoreAdamW, ProjType, check_options
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.optim.resting import merged_weights
from ows_lightning.optim.sharding import is_sharded
from ows_lightning.optim.state_dtypes import keep_state_dtypes
from ows_lightning.optim.subspace import SubspaceMethod, derived_seed
from ows_lightning.sampling.callback import LayerwiseSampling
from ows_lightning.sampling.scores import architecture_of
from ows_lightning.step import StepAccumulator, StepMetrics

# Lightning warns at every start that the data module lacks `on_before_batch_transfer`; the one here suits any of them.
warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`")

log = logging.getLogger(__name__)
_DECAYS = ("cosine", "linear", "constant")
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def default_optimizer(params: Any) -> Optimizer:
    """Returns GaLoreAdamW with a learning rate of 3e-4."""
    return GaLoreAdamW(params, lr=3e-4)


def warmup_and_decay(optimizer: Optimizer, kind: str, warmup_steps: float, steps: float) -> LambdaLR:
    """Returns a schedule by optimizer steps: a linear warm-up from 0, then ``cosine`` or ``linear`` to 0, or ``constant``.

    ``warmup_steps`` below 1 are a share of all ``steps``, which may be infinite where nothing depends on them (UsageError).
    """
    if math.isinf(steps) and (kind != "constant" or 0 < warmup_steps < 1):
        hint = "or set model.lr_scheduler_type to constant and model.warmup_steps to a number of steps"
        raise UsageError(f"trainer.max_steps: the schedule needs the number of steps; give max_steps or max_epochs, {hint}")
    warmup = round(warmup_steps * steps) if 0 < warmup_steps < 1 else int(warmup_steps)
    if warmup >= max(steps, 1):
        message = "model.warmup_steps: %d are no less than the run's %d steps: the rate never reaches its value"
        log.warning(message, warmup, steps)
    name = "constant_with_warmup" if kind == "constant" else kind
    from transformers import get_scheduler  # it imports peft

    total = None if math.isinf(steps) else int(steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)


class CausalLMModule(EvaluationModule):
    """Fine-tunes a causal LM: loss over the target tokens of each optimizer step, projected AdamW, warm-up and decay.

    The loss is the mean over all target tokens of an optimizer step, over its micro-batches and ranks, as one large batch
    would give it; so is the gradient. ``grad_norm``, which ``gradient_clip_val`` limits, is the norm of what the optimizer
    consumes: projected gradients for projected weights. Calling the module returns what ``CausalLM`` does: ``LossParts``.

    Args:
        model_name_or_path: Hub name, local directory, ``.gguf`` file, or ``package://PACKAGE/FILE.gguf``.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; with None transformers chooses.
        gradient_checkpointing: Recompute activations in backward: for all blocks, the first N, or with ``auto`` as few as fit
            the memory (by callback ``AutoGradientCheckpointing``, else all). Blocks below the lowest active one store none.
        compile: Compile each decoder block with ``torch.compile``.
        optimizer: Callable that makes the optimizer from parameter groups.
        rank: Rank of GaLoreAdamW's projected gradients; None trains in full rank, which other optimizers need.
        update_proj_gap: Optimizer steps between two renewals of a subspace.
        scale: Factor of the updates of projected weights.
        proj_type: The dimension that is projected: ``std`` smaller, ``reverse_std`` larger, ``left`` rows, ``right`` columns.
        subspace: How subspaces are found: ``randomized``, ``svd`` or ``random``.
        project_embeddings: Also project embeddings and LM head, if they train.
        lr_scheduler_type: Decay after the warm-up: ``cosine``, ``linear`` or ``constant``.
        warmup_steps: Optimizer steps of warm-up; a value below 1 is a share of all steps.
        lora: Settings of peft's ``LoraConfig``; the base model is then frozen. Needs the extra ``lora``.
        frozen_in: Where frozen blocks are: ``device``, or ``host`` memory or ``disk``, from which each is fetched to compute.
        frozen_dtype: ``int8``: frozen blocks compute in int8; their exact weights, which train and are saved, are elsewhere.
        window_blocks: How many offloaded blocks are on the device at a time, 2 or 3.
        max_new_tokens: Length limit of generated answers.
        max_skipped_steps: ``StopOnNaN`` ends the run after this many skipped steps (gradients with NaN or Inf) in a row.
        trust_remote_code: Run code from the model's repository.
        kernels: ``liger``: RMSNorm, SwiGLU and RoPE by liger-kernel's fused kernels, on a GPU. Needs the extra ``liger``.

    Raises:
        UsageError: A setting is out of range, or settings contradict each other.
    """

    def __init__(
        self,
        model_name_or_path: str,
        attn_implementation: str | None = None,
        gradient_checkpointing: GradientCheckpointing = False,
        compile: bool = False,
        optimizer: OptimizerCallable = default_optimizer,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: ProjType = "std",
        subspace: SubspaceMethod = "randomized",
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
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__()
        projection = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        try:
            check_options({**projection, "subspace": subspace})
        except ValueError as error:
            raise UsageError(f"model.{error}") from None
        for name, value, valid, limit in (
            ("frozen_in", frozen_in, frozen_in in ("device", "host", "disk"), "device, host or disk"),
            ("frozen_dtype", frozen_dtype, frozen_dtype in (None, "int8"), "int8 or null"),
            ("kernels", kernels, kernels in (None, "liger"), "liger or null"),
            ("lr_scheduler_type", lr_scheduler_type, lr_scheduler_type in _DECAYS, "cosine, linear or constant"),
            ("window_blocks", window_blocks, window_blocks in (2, 3), "2 or 3: one computes while the next comes"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("max_skipped_steps", max_skipped_steps, max_skipped_steps >= 1, "at least 1"),
            ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0 (below 1 it is a share of all steps)"),
        ):
            if not valid:
                raise UsageError(f"model.{name}: {value} must be {limit}")
        execution.check_gradient_checkpointing(gradient_checkpointing)
        model_name_or_path = str(model_name_or_path)  # a Path could not be read from a checkpoint
        self.save_hyperparameters(ignore=["optimizer"])
        self.make_optimizer: Callable[[Any], Optimizer] = optimizer
        self.offloader: BlockOffloader | None = None  # of frozen blocks
        self.last_step_metrics: StepMetrics | None = None  # of the latest optimizer step

    @property
    def model(self) -> Any:
        """The transformers model, or peft's around one; None before ``configure_model``."""
        return None if self.causal_lm is None else self.causal_lm.model

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model itself, also within a peft model."""
        return self._loaded_causal_lm.language_model

    def forward(self, **batch: Any) -> Any:
        """Returns the loss of a batch as ``LossParts``, or the model's own output where there are no ``labels``."""
        return self._loaded_causal_lm(**batch)

    def check(self, load_config: Callable[[str, bool], Any] = pretrained.load_config) -> Any:
        """Checks all settings, without weights (UsageError); returns what ``load_config`` returns for the model's name."""
        self._check_projection(self.example_optimizer())
        if self.hparams["lora"] is not None:
            lora_config(self.hparams["lora"])
        return load_config(self.hparams["model_name_or_path"], self.hparams["trust_remote_code"])

    def example_optimizer(self) -> Optimizer:
        """Returns the optimizer for a small matrix and a vector: wrong arguments show here, as a UsageError."""
        try:
            return self.make_optimizer([{"params": [nn.Parameter(torch.zeros(shape))]} for shape in ((2, 2), (2,))])
        except (TypeError, ValueError) as error:
            raise UsageError(f"model.optimizer: {error}") from error

    def exceeded_position_limit(self, length: int) -> int | None:
        """The most tokens that the model has positions for, where `length` are more; from its config, without weights."""
        name, trust_remote_code = self.hparams["model_name_or_path"], self.hparams["trust_remote_code"]
        return pretrained.exceeded_position_limit(pretrained.load_config(name, trust_remote_code), length, trust_remote_code)

    def setup(self, stage: str) -> None:
        """Starts afresh: of an earlier run the weights remain. Gives the Trainer the clean-up after a fit."""
        trains_unsampled = stage == "fit" and LayerwiseSampling.of(self.trainer) is None
        check_offloading(self.hparams, trains_unsampled, self.trainer.world_size, self.device_mesh is not None)
        if stage != "fit":
            return
        check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        prepare_fit(self.trainer)
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        if on_gpu and self._precision.startswith("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
            log.warning("trainer.precision: this card only emulates bfloat16, which takes long; 32-true may be faster")
        if torch.are_deterministic_algorithms_enabled():  # of which the flash-attn package knows nothing
            os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
        self.step_accumulator = StepAccumulator(self.trainer.world_size)
        self.last_step_metrics = None

    def configure_model(self) -> None:
        """Loads the weights, once, in the dtype that the Trainer's precision asks for."""
        if self.causal_lm is not None:
            if self.device_mesh is not None and not any(map(is_sharded, self.parameters())):
                raise UsageError("trainer.strategy: fsdp2 shards a model as it loads it; this one is loaded, make another")
            return
        disk = Disk(self.trainer.log_dir if self._trainer else None) if self.hparams["frozen_in"] == "disk" else None
        if self.device_mesh is None:
            # Lightning's context has transformers load straight onto a GPU, which the whole model may not fit.
            with torch.device("cpu") if offloads(self.hparams) else contextlib.nullcontext():
                self.causal_lm = CausalLM(self.build(disk=disk))
        elif self.device_mesh["tensor_parallel"].size() > 1:
            raise UsageError("trainer.strategy: ModelParallelStrategy here splits tensors, too; write strategy: fsdp2")
        else:
            check_callbacks(self.trainer.callbacks, sharded=True)  # type: ignore[attr-defined]
            mesh, device = self.device_mesh["data_parallel"], self.trainer.strategy.root_device
            self.causal_lm = load_into_shards(self.build, self.hparams["model_name_or_path"], mesh, device, self._precision)
        execution.checkpoint_activations(self.language_model, self.hparams["gradient_checkpointing"])
        if self.hparams["compile"]:
            execution.compile_blocks(self.language_model)
        if offloads(self.hparams) and self.device_mesh is None:
            slots, has_adapters = self.hparams["window_blocks"], self.hparams["lora"] is not None
            int8_in = self.hparams["frozen_in"] if self.hparams["frozen_dtype"] == "int8" else None
            self.offloader = BlockOffloader(decoder_layers(self), slots, has_adapters, disk, int8_in)
            # DDP sends weights even from one process to itself, and NCCL takes none from the host
            offloaded = {p for weights in self.offloader.parameters for p in weights}
            self._ddp_params_and_buffers_to_ignore = [name for name, p in self.named_parameters() if p in offloaded]

    def build(self, empty: bool = False, disk: Disk | None = None) -> nn.Module:
        """Makes the model with its weights, blocks on a disk, or ``empty``: with weights on the meta device, to be filled."""
        name, num_tokens = self.hparams["model_name_or_path"], len(self.tokenizer)
        options: dict[str, Any] = {key: self.hparams[key] for key in ("attn_implementation", "trust_remote_code")}
        options["dtype"] = DTYPES.get(self._precision, torch.float32)
        if empty:
            model = pretrained.empty_model(name, num_tokens, **options)
        elif disk is not None:
            model = load_mapped_model(name, num_tokens, disk, **options)
        else:
            model = pretrained.load_model(name, **options)
        pretrained.resize_embeddings(model, self.tokenizer)
        pretrained.add_eos_token_id(model, end_of_turn_id(self.tokenizer))
        if self.hparams["kernels"] is not None:
            execution.apply_liger_kernels_(model)
        return add_lora(model, self.hparams["lora"]) if self.hparams["lora"] is not None else model

    @property
    def _precision(self) -> str:
        return str(self._trainer.precision) if self._trainer is not None else "32-true"

    def configure_optimizers(self) -> Any:
        """Returns the optimizer over all trainable parameters, and a schedule by optimizer steps."""
        optimizer = self.make_optimizer(self.param_groups())
        self._check_projection(optimizer)
        steps = expected_steps(self.trainer)
        scheduler = warmup_and_decay(optimizer, self.hparams["lr_scheduler_type"], self.hparams["warmup_steps"], steps)
        if isinstance(optimizer, GaLoreAdamW):
            check_strategy(self.trainer.strategy)
            check_unscaled(self.trainer.precision_plugin)
            optimizer.project_in_backward(model=self.model)  # last: an error before leaves no hook behind
            if self.offloader is not None:
                self.offloader.attach_optimizer(optimizer)
        else:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                check_unscaled(self.trainer.precision_plugin, "a fused optimizer undoes it after clipping")
            keep_state_dtypes(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _check_projection(self, optimizer: Optimizer) -> None:
        if self.hparams["rank"] is not None and not isinstance(optimizer, GaLoreAdamW):
            raise UsageError(f"model.rank: {type(optimizer).__name__} can't project; set rank to null, or take GaLoreAdamW")

    def param_groups(self) -> Any:
        """Returns what the optimizer is made for: groups of named parameters, with the settings of projection."""
        names = ("rank", "update_proj_gap", "scale", "proj_type", "subspace", "project_embeddings")
        return galore_param_groups(self.model, **{name: self.hparams[name] for name in names})

    def on_train_start(self) -> None:
        """Gives the blocks that were drawn memory on the device: a resumed run may validate before it trains."""
        if self.offloader is not None:
            if self.offloader.optimizer not in self.trainer.optimizers:  # it is of an earlier fit
                self.offloader.detach_optimizer()
            if self.offloader.was_copied:  # weight averaging begins with these weights, before any step
                self.offloader.merge_updates()
            self.offloader.apply_draw(self.trainer.optimizers)

    def on_validation_epoch_start(self) -> None:
        """Re-reads offloaded weights, which weight averaging may have swapped, and resets the metrics."""
        self.reread_offloaded()
        super().on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics, and re-reads offloaded weights, which were swapped back."""
        super().on_validation_epoch_end()
        self.reread_offloaded()

    def reread_offloaded(self) -> None:
        """Makes what averaging wrote into offloaded weights count."""
        if self.offloader is not None and self.offloader.was_copied:
            self.offloader.refresh_all()

    @torch.compiler.set_stance("force_eager")
    def on_fit_start(self) -> None:
        """Makes sure that our chunked loss is this model's own loss, before anything trains."""
        with self.trainer.precision_plugin.forward_context():
            self._loaded_causal_lm.check_logits(torch.arange(4, device=self.device)[None])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds dropout by batch and rank: a resumed run draws what the uninterrupted one would have drawn."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        torch.manual_seed(derived_seed(seed, self.trainer.global_step, batch_idx, self.trainer.global_rank))
        if self.offloader is not None:
            self.offloader.apply_draw(self.trainer.optimizers)  # blocks may have been drawn just now

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Computes target positions and padding while the batch is in host memory, so that no step waits for the GPU."""
        needed = {"labels"} if self.trainer.training else {"labels", "reference"}
        if not self.trainer.predicting and not (isinstance(batch, Mapping) and batch.keys() & needed):
            found = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise UsageError(f"a batch ({found}) must be a dict of input_ids and labels (-100 where nothing is to be learned)")
        return precompute_on_host(batch) if self.trainer.training else batch

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of a micro-batch; ``optimizer_step`` makes its gradient that of the step's mean.

        For a term of your own, override ``forward``, and add to ``LossParts.total`` the term times ``LossParts.num_targets``:
        the step's loss is a mean over target tokens (validation is without it). A ``training_step`` of your own is scaled and
        clipped as Lightning does it.
        """
        place = batch_idx % self.trainer.accumulate_grad_batches
        last = place + 1 == self.trainer.accumulate_grad_batches or self.trainer.is_last_batch
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, GaLoreAdamW):
            optimizer.accumulating = not last
        parts = self(**batch)
        if not isinstance(parts, LossParts):
            raise UsageError("forward must return LossParts where a batch has labels; or override training_step")
        return self.step_accumulator.add(parts, token_mask(batch).sum(), place == 0, last)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """If the loss is not finite, sets all gradients to NaN, so that every process skips the step."""
        super().backward(loss * torch.where(loss.isfinite(), 1.0, float("nan")), *args, **kwargs)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips what the optimizer consumes, and logs loss and norm."""
        if self.step_accumulator.totals is None:  # a `training_step` of a subclass
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        self.step_accumulator.rescale(optimizer, self.trainer.accumulate_grad_batches)  # where a subclass did not
        self.last_step_metrics = self.step_accumulator.clip_and_report(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.log("train_loss", self.last_step_metrics.loss, prog_bar=True)
        self.log("grad_norm", self.last_step_metrics.grad_norm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Steps, and drops the gradients at once: Lightning would keep full-rank ones through the next forward."""
        own: Any = self.optimizers(use_pl_optimizer=False)

        def closure() -> Any:
            loss = optimizer_closure()
            self.step_accumulator.rescale(own, self.trainer.accumulate_grad_batches)  # which a scheduler may change
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad()

    def on_train_end(self) -> None:
        """Merges what offloaded blocks learned at rest into their weights, for whatever reads them after training."""
        self.reread_offloaded()  # weight averaging may have swapped weights
        if self.offloader is not None:
            self.offloader.merge_updates()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads weights, building the model first if needed: this is how forked processes return theirs."""
        self.configure_model()
        return super().load_state_dict(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Omits what offloaded blocks learned at rest, which the optimizer's state holds; that of ``model`` has it."""
        if self.offloader is None:
            return super().state_dict(*args, **kwargs)
        self.offloader.saves_updates_separately = True
        try:
            return super().state_dict(*args, **kwargs)
        finally:
            self.offloader.saves_updates_separately = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the settings that have to be the same when the run is resumed; weights alone are saved whole."""
        checkpoint["settings"] = self._fixed_settings()
        arguments = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        for name in [name for name, value in arguments.items() if callable(value)]:  # a model, which no resume would read
            del arguments[name]
        if "optimizer_states" not in checkpoint:
            optimizers = [optimizer.state_dict() for optimizer in self.trainer.optimizers]
            checkpoint["state_dict"].update(merged_weights(checkpoint["state_dict"], optimizers))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses, with a UsageError, settings that a resumed run can't change, and a checkpoint of another model."""
        resumes = self._trainer is not None and self.trainer.training
        if resumes and "callbacks" not in checkpoint:
            raise UsageError("ckpt_path: the checkpoint has weights alone (save_weights_only); a run can't go on from those")
        if self._trainer is not None:
            check_fixed_settings(checkpoint.get("settings"), self._fixed_settings(), resumes)
        if not resumes and "optimizer_states" in checkpoint:
            weights = checkpoint.get("state_dict", {})
            weights.update(merged_weights(weights, checkpoint["optimizer_states"]))  # one at a time

    def _fixed_settings(self) -> dict[str, Any]:
        """The settings that can't change, as plain values by their YAML keys, and the model's dimensions."""
        settings = {f"model.{key}": self.hparams[key] for key in FIXED_MODEL_KEYS if key in self.hparams}
        settings |= {"number of blocks": len(decoder_layers(self)), **architecture_of(self.language_model.config)}
        outside = non_block_parameters(self)
        settings["tied embeddings"] = not set(outside["embeddings"]).isdisjoint(outside["lm_head"])
        if (sampling := LayerwiseSampling.of(self.trainer)) is not None:
            settings |= {f"sampling.{key}": value for key, value in sampling_settings(sampling).items()}
        return {key: plain(value) for key, value in settings.items()}
