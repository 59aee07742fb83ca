"""The method in transformers' Trainer and in TRL's trainers, which are Trainers: SFTTrainer, DPOTrainer and others."""

import logging
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, cast

from accelerate.state import GradientState
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from ows_lightning.checkpoints.fixed_settings import check_fixed_settings, plain
from ows_lightning.errors import UsageError
from ows_lightning.optim.galore import GaLoreAdamW
from ows_lightning.optim.hooks import remove_hook
from ows_lightning.optim.param_groups import galore_param_groups
from ows_lightning.sampling.activation import unfreeze, unwrapped
from ows_lightning.sampling.sampler import BlockSampler


class LayerwiseSamplingCallback(BlockSampler, TrainerCallback, ExportableState):
    """``LayerwiseSampling`` for transformers' Trainer: trains a few sampled decoder blocks at a time (OWS, LISA).

    The rules, and all arguments, are those of ``BlockSampler``. Give it as one of the Trainer's ``callbacks``, with any
    optimizer; for GaLoreAdamW call ``use_galore``. Every ``train`` starts afresh. Scores are computed from the Trainer's
    training data and the first blocks drawn when training begins, when every parameter is in the optimizer; each further
    draw happens before the first micro-batch of an interval.

    The state is in ``trainer_state.json`` of the Trainer's checkpoints, as plain values: ``train(resume_from_checkpoint=...)``
    goes on as if the run had not ended. Scores and draws are also written into ``output_dir`` as ``outlier_scores.json`` and
    ``sampling_history.csv``, unless ``save_strategy`` is ``no``.

    One process trains: DDP fixes what trains at its start, FSDP and DeepSpeed reshape it. The Lightning side takes several.

    Raises:
        UsageError: A setting is out of its range; the Trainer runs on several processes, or clips where nothing is to clip.
    """

    _written_to: Path | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Unfreezes what a run that ended by an exception left frozen, before an optimizer is made."""
        self.release()
        unfreeze(kwargs["model"] or nn.Module())  # also another such callback's; with ``model_init`` there is no model yet

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Scores the blocks and draws the first ones, or puts back those of the run that is resumed."""
        model, optimizer = kwargs["model"], unwrapped(kwargs["optimizer"])
        _require_one_process(args)
        _require_use_galore(optimizer, args)
        clips = args.max_grad_norm > 0
        if self.distribution == "gradient_norm" and (clips or args.fp16):
            fault = "max_grad_norm: the Trainer clips" if clips else "fp16: the loss is scaled"
            hint = "set it to 0 (and clip by use_galore(trainer, max_grad_norm=...))" if clips else "take bf16"
            what = f"{fault} before any callback sees the gradients, by whose norms gradient_norm draws"
            raise UsageError(f"{what}; {hint}, or take another distribution")
        if not isinstance(optimizer, GaLoreAdamW):
            for p in model.parameters():
                remove_hook(p)  # of a run of ``use_galore`` that ended by an exception
        self.release()
        self.reset()
        if state.global_step > 0:
            self._resume(state)
            _require_state(optimizer)
        self.attach(model)
        self._written_to = Path(str(args.output_dir)) if state.is_world_process_zero and args.save_strategy != "no" else None
        self.start(state.global_step, [optimizer], partial(self.compute_scores, model, kwargs["train_dataloader"]))
        self.write(self._written_to)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draws new blocks where this step is the first of an interval."""
        compute = partial(self.compute_scores, kwargs["model"], kwargs["train_dataloader"])
        if self.advance(state.global_step, [kwargs["optimizer"]], compute):
            self.write(self._written_to)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lets the norms of the gradients count, where the draws depend on them."""
        self.observe([kwargs["optimizer"]])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Names the blocks that never trained, and unfreezes all."""
        self.warn_of_never_trained()
        self.release()

    def state(self) -> dict[str, Any]:
        """What the Trainer's checkpoints keep of this callback: plain values."""
        settings = {name: getattr(self, name) for name in signature(BlockSampler).parameters}
        return plain({"args": settings, "attributes": {"resumed": self.state_dict()}})

    def _resume(self, state: TrainerState) -> None:
        states: Any = state.stateful_callbacks  # a dict once a checkpoint is loaded
        if (saved := states.get(name := type(self).__name__)) is None:
            raise UsageError(f"resume_from_checkpoint: the checkpoint is of a run without {name}; give one of a run with it")
        for name, before in saved["args"].items():
            if (now := self.state()["args"].get(name, before)) != before:
                logging.getLogger(__name__).warning("The resumed run changes %s from %s to %s", name, before, now)
        self.load_state_dict(saved["attributes"]["resumed"])


class _AccumulatingGaLoreAdamW(GaLoreAdamW):
    """The optimizer of ``use_galore``: its ``accumulating`` follows what accelerate says of a micro-batch."""

    def project_gradient(self, p: Tensor) -> None:
        self.accumulating = not GradientState().sync_gradients
        super().project_gradient(p)


class _GaLoreCallback(TrainerCallback):
    """Makes an optimizer of ``use_galore`` project within backward, with its own settings, while its Trainer trains."""

    def __init__(self, optimizer: GaLoreAdamW) -> None:
        self.optimizer = optimizer
        # But for those of the Trainer's arguments, which the Trainer itself takes from the checkpoint.
        others = {"params", "param_names", "lr", "betas", "eps", "weight_decay"}
        self.configured = [{name: group[name] for name in group.keys() - others} for group in optimizer.param_groups]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes over the gradients; a resumed run has loaded the checkpoint's state, and its settings with it."""
        if state.global_step > 0:
            for group, configured in zip(self.optimizer.param_groups, self.configured, strict=True):
                check_fixed_settings({name: group.get(name) for name in configured}, configured, prefix="use_galore")
            _require_state(self.optimizer)
        self.optimizer.zero_grad()  # what a run has left that an exception ended within a step
        self.optimizer.project_in_backward(model=kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves gradients to ``grad`` again: another Trainer may train the model then."""
        self.optimizer.project_in_backward(False)


def use_galore(trainer: Trainer, rank: int = 128, **options: Any) -> GaLoreAdamW:
    """Gives a Trainer GaLoreAdamW, which it returns, and projects gradients within backward; call it before ``train``.

    Learning rate, betas, epsilon and weight decay are those of the Trainer's arguments. Gradients are accumulated, clipped by
    ``max_grad_norm`` and logged as ``grad_norm`` as the optimizer consumes them: projected.

    Args:
        trainer: A Trainer, SFTTrainer, DPOTrainer, ... that has not trained yet.
        rank: Of the projected gradients.
        **options: Further arguments of ``galore_param_groups`` (``update_proj_gap``, ``scale``, ``proj_type``, ``subspace``,
            ``project_embeddings``) and of GaLoreAdamW (``moments_dtype``, ...).

    Raises:
        UsageError: The Trainer has an optimizer or makes its model itself, runs on several processes, or computes in float16.
    """
    args, model = trainer.args, cast(nn.Module, trainer.model)
    _require_one_process(args)
    if trainer.optimizer is not None:
        raise UsageError("use_galore: this Trainer has an optimizer; leave `optimizers` out, and call it before `train`")
    if trainer.model_init is not None:
        raise UsageError("model_init: train makes a new model and optimizer; give Trainer the model itself")
    if args.fp16:
        raise UsageError("fp16: its scaled gradients can't be projected within backward; set bf16=True, or neither")
    if given := options.keys() & {"lr", "betas", "eps", "weight_decay"}:
        raise UsageError(f"use_galore: {min(given)} comes from the Trainer's arguments (learning_rate, adam_beta1, ...)")
    of_groups = {name: options.pop(name) for name in signature(galore_param_groups).parameters if name in options}
    groups, betas = galore_param_groups(model, rank=rank, **of_groups), (args.adam_beta1, args.adam_beta2)
    optimizer = _AccumulatingGaLoreAdamW(
        groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay, **options
    )
    trainer.accelerator.clip_grad_norm_ = lambda parameters, max_norm, norm_type=2: optimizer.clip_gradients(max_norm)
    trainer.callback_handler.callbacks.insert(0, _GaLoreCallback(optimizer))  # it refuses before any other has frozen blocks
    trainer.optimizer = optimizer
    return optimizer


def _require_one_process(args: TrainingArguments) -> None:
    who = "LayerwiseSamplingCallback, use_galore: the Trainer"
    if args.parallel_mode is ParallelMode.DISTRIBUTED or args.deepspeed or args.fsdp:  # DDP wraps a single process, too
        hint = "or with this package's CausalLMModule and trainer.strategy ddp_layerwise or fsdp2"
        fixed = "DDP, FSDP and DeepSpeed fix the set of trained parameters"
        raise UsageError(f"{who}'s {fixed}; train on one process without torchrun, {hint}")
    if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
        raise UsageError(f"{who} copies the model to all cards at every step; choose one with CUDA_VISIBLE_DEVICES=0")


def _require_state(optimizer: Optimizer) -> None:
    """Refuses a checkpoint without the optimizer's state, from which the Trainer would resume without a warning."""
    stateless = isinstance(optimizer, SGD) and not any(group["momentum"] for group in optimizer.param_groups)
    if not optimizer.state and not stateless:
        fault = "the checkpoint has no state of the optimizer (save_only_model=True)"
        raise UsageError(f"resume_from_checkpoint: {fault}; give one that has, or load its model and train anew")


def _require_use_galore(optimizer: Optimizer, args: TrainingArguments) -> None:
    """Refuses a GaLoreAdamW whose gradients the Trainer would not see."""
    if not isinstance(optimizer, GaLoreAdamW) or isinstance(optimizer, _AccumulatingGaLoreAdamW):
        return
    if optimizer.projects_in_backward and (args.max_grad_norm > 0 or args.gradient_accumulation_steps > 1):
        what = "the Trainer clips and accumulates full gradients, but this GaLoreAdamW projects them within backward"
        raise UsageError(f"max_grad_norm: {what}; call use_galore(trainer) instead of giving `optimizers`")
