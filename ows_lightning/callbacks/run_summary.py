"""A summary of a run before it starts, and of its results when it has ended."""

import itertools
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ows_lightning.callbacks.run_checkpoint import checkpoint_callback
from ows_lightning.callbacks.run_folder import run_folder
from ows_lightning.data import InstructionDataModule
from ows_lightning.errors import add_note, command_line, first_line, is_out_of_memory
from ows_lightning.fit.duration import expected_steps, steps_before, time_is_up
from ows_lightning.memory.cards import available_bytes
from ows_lightning.memory.plan_settings import settings_of_run
from ows_lightning.memory.prediction import predict_memory
from ows_lightning.models.causal_lm import eval_mode
from ows_lightning.models.decoder import decoder_layers
from ows_lightning.models.execution import count_checkpointed
from ows_lightning.module import CausalLMModule
from ows_lightning.report.run import is_run_folder
from ows_lightning.sampling.activation import non_block_trains
from ows_lightning.sampling.callback import LayerwiseSampling

log = logging.getLogger(__name__)
_MAX_SAMPLE_CHARS = 400  # characters of a sample row
_SHOWN_METRICS = {"val_loss": ("loss", "{:.3f}"), "val_exact_match": ("exact match", "{:.1%}")}


class RunSummary(Callback):
    """Logs a summary before the sanity check, and the validation metrics before and after the training at the end.

    The metrics from before are the sanity check's: of all validation batches with ``num_sanity_val_steps: -1``, else of the
    first ones, and the log says how many these are. Memory is predicted from the parsed ``config``, if it is given.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.before: dict[str, float] = {}
        self.batches_before = ""  # in words, where these are not the figures of all validation batches
        self.first_step: int | None = None  # of this run, which may be a resumed one
        self.validated_step: int | None = None  # the last one with a validation
        self.predicted: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            RunSummary.__init__(self, self.config)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder, steps = run_folder(trainer), expected_steps(trainer)  # both ask all ranks
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        lines = {"Model": _model_text(pl_module), **_data_texts(data), "Training": _training_text(trainer, pl_module, steps)}
        if self.config is not None and isinstance(pl_module, CausalLMModule):
            lines["Memory"] = self._memory_text(pl_module)
        lines["Run folder"] = str(folder)
        log.info("\n".join(f"{name:<11} {text}" for name, text in lines.items()))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if no validation comes; logs the share of the weights that train at some time, if the draws are known."""
        self.first_step = trainer.global_step
        sampling, steps = LayerwiseSampling.of(trainer), expected_steps(trainer)
        if not trainer.is_global_zero or steps == float("inf"):
            return
        # The number of the first batch that a validation may follow; where they come by time, there is no `val_check_batch`.
        validates, due = pl_module.automatic_optimization and any(trainer.num_val_batches), trainer.val_check_batch or 1
        if epochs_before := (trainer.check_val_every_n_epoch or 1) - 1:
            due += epochs_before * trainer.num_training_batches
        if validates and due < float("inf") and steps_before(trainer, due - 1) >= steps:
            setting = "check_val_every_n_epoch" if epochs_before else "val_check_interval"
            log.warning("No validation in these %d steps: lower trainer.%s", steps, setting)
        if sampling is not None and (drawn := sampling.planned_blocks(int(steps))) is not None:  # else they depend on scores
            share = _size_text(_numel(_sampled_weights(pl_module, sampling, drawn)), pl_module)
            log.info("Over the run, %d of %d blocks train: %s", len(drawn), len(decoder_layers(pl_module)), share)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the metrics from before the training; a resumed run keeps those of its first start."""
        if not self.before and (metrics := _logged_metrics(trainer, *_SHOWN_METRICS)) and trainer.is_global_zero:
            checked, there = trainer.num_sanity_val_batches, trainer.num_val_batches
            self.before = metrics
            self.batches_before = "" if checked == there else f" ({checked[0]} of {there[0]} batches)"
            log.info("Before training%s: validation %s", self.batches_before, _metrics_text(metrics))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the time of scores, draws and subspaces, and the loss with int8 blocks beside that of exact weights."""
        sampling, times = LayerwiseSampling.of(trainer), _logged_metrics(trainer, "time_s", "renewal_s")
        seconds = times.get("renewal_s", 0.0) + (0.0 if sampling is None else sampling.seconds)
        if seconds and trainer.is_global_zero and (whole := times.get("time_s")):
            log.info("Scores, draws and subspaces took %.1f s of %.0f s (%.1f%%)", seconds, whole, 100 * seconds / whole)
        if isinstance(pl_module, CausalLMModule) and (found := _int8_and_exact_losses(trainer, pl_module)) is not None:
            log.info("Validation loss with frozen blocks in int8: %.4f; with the exact weights, as exported: %.4f", *found)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)  # asks all ranks
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # it leaves no files
            return
        if self.first_step in (None, trainer.global_step):  # a resumed run that had ended
            limit = "max_steps" if 0 <= trainer.max_steps <= trainer.global_step else "max_epochs"
            limit = "max_time, which earlier runs have used up" if time_is_up(trainer.callbacks) else limit  # type: ignore[attr-defined]
            log.warning("Nothing was trained: the checkpoint is of step %d already; raise %s", trainer.global_step, limit)
        if after := _logged_metrics(trainer, *_SHOWN_METRICS):
            when = "training" if self.validated_step == trainer.global_step else f"step {self.validated_step}"
            log.info("After %s: validation %s", when, _metrics_text(after, self.before, self.batches_before))
        steps = [command_line("report", folder)] if is_run_folder(folder) else []
        data = trainer.datamodule  # type: ignore[attr-defined]
        has_test_rows = not isinstance(data, InstructionDataModule) or data.test_dataset or data.eval_dataset or data.val_size
        if has_test_rows and (last := getattr(checkpoint_callback(trainer), "last_model_path", "")):
            steps.append(command_line("test --config", folder / "config.yaml", "--ckpt_path", last))
        there = {
            "model": "the model in model/ (for AutoModelForCausalLM.from_pretrained)", "checkpoints": "checkpoints/",
            "metrics.csv": "figures", "*.png": "pictures",
        }  # fmt: skip
        if found := [text for pattern, text in there.items() if any(folder.glob(pattern))]:
            log.info("%s has %s", folder, ", ".join(found))
        if steps:
            log.info("Next: %s", "\n      ".join(steps))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.predicted is not None and is_out_of_memory(exception):
            add_note(exception, self.predicted)

    def state_dict(self) -> dict[str, Any]:
        return {"before": dict(self.before), "batches_before": self.batches_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.batches_before = state_dict["before"], state_dict.get("batches_before", "")

    def _memory_text(self, module: CausalLMModule) -> str:
        """Returns the predicted memory, or why it can't be predicted."""
        device, processes = module.device, module.trainer.num_devices
        available = available_bytes(device, module.parameters(), processes)
        there = f"{available / 1e9:.1f} GB available on {device}"
        try:
            recomputing = count_checkpointed(module.language_model)
            needs = predict_memory(replace(settings_of_run(self.config, module), gradient_checkpointing=recomputing))
        except Exception as error:  # no fault of a prediction may end a run
            return f"not predicted ({first_line(error)}), {there}"
        needed, self.predicted = needs.peak_bytes, f"{needs.peak_bytes / 1e9:.1f} GB predicted for tensors, {there}"
        if needs.host_bytes:
            self.predicted += f"; {needs.host_bytes / 1e9:.1f} GB of host memory"
            if device.type == "cpu":
                needed += needs.host_bytes
            else:
                free = available_bytes(torch.device("cpu"), module.parameters(), processes)
                self.predicted += f", {free / 1e9:.1f} GB available"
                if needs.host_bytes > free:
                    self.predicted += f"; too little of it: see `{command_line('plan')}`, or set model.frozen_in: disk"
        return self.predicted + (f"; too little: see `{command_line('plan')}`" if needed > available else "")


def _model_text(module: LightningModule) -> str:
    count, dtypes = _numel(module.parameters()), {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    size = f"{_human_count(count)} weights in {', '.join(sorted(dtypes))}"
    if not isinstance(module, CausalLMModule):
        return f"{type(module).__name__}, {size}"
    kind, name = type(module.language_model).__name__, module.hparams["model_name_or_path"]
    return f"{name} ({kind}), {size}, {len(decoder_layers(module))} blocks"


def _data_texts(data: object) -> dict[str, str]:
    if not isinstance(data, InstructionDataModule):
        return {}
    summary, text = data.summary(), "a stream"
    if "rows" in summary:
        text = f"{summary['rows']:,} rows, {summary['tokens']:,} tokens, {summary['target_tokens']:,} of them targets"
    row = ""  # in one line, the trained parts in guillemets; long untrained parts lose their middle
    for piece, trained in data.sample_row():
        piece = piece.replace("\n", "\\n")
        if len(piece) > _MAX_SAMPLE_CHARS:
            piece = f"{piece[: _MAX_SAMPLE_CHARS // 2]} [...] {piece[-_MAX_SAMPLE_CHARS // 2 :]}"
        row += f"«{piece}»" if trained else piece
    return {"Data": f"{text}; {summary['validation_rows']:,} validation rows", "A row": f"{row}  (trained: what is in «»)"}


def _training_text(trainer: Trainer, module: LightningModule, steps: float) -> str:
    text = f"{int(steps):,} steps" if steps != float("inf") else "no end"
    if (sampling := LayerwiseSampling.of(trainer)) is None:
        return f"{text}; {_size_text(_numel(p for p in module.parameters() if p.requires_grad), module)}"
    layers = decoder_layers(module)
    in_blocks = sum(_numel(p for p in layer.parameters() if p.requires_grad) for layer in layers)
    count = round(sampling.activated_layers * in_blocks / len(layers)) + _numel(_sampled_weights(module, sampling))
    at_rest = f" (others at rest, rank {sampling.resting_rank})" if sampling.resting_rank else ""
    what = " + ".join([f"{sampling.activated_layers} blocks{at_rest}", *sampling.always_train])
    return f"{text}; at a time {what}: {_size_text(count, module)}; new blocks every {sampling.interval_steps} steps"


def _sampled_weights(module: LightningModule, sampling: LayerwiseSampling, blocks: Iterable[int] = ()) -> list[nn.Parameter]:
    """The parameters of some blocks, and those outside the blocks that always train."""
    outside = (p for p, trains in non_block_trains(module, sampling.always_train).items() if trains)
    return list(dict.fromkeys([*outside, *sampling.weights_of(blocks)]))


def _size_text(count: int, module: LightningModule) -> str:
    return f"{_human_count(count)} weights ({count / _numel(module.parameters()):.1%})"


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _human_count(count: int) -> str:
    unit, letter = next(((unit, letter) for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if count >= unit), (1, ""))
    return f"{count / unit:.4g}{letter}"


def _logged_metrics(trainer: Trainer, *names: str) -> dict[str, float]:
    return {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}


def _metrics_text(after: dict[str, float], before: dict[str, float] | None = None, batches: str = "") -> str:
    parts = []
    for key, value in after.items():
        name, form = _SHOWN_METRICS[key]
        first = f"{form.format(before[key])}{batches} -> " if before and key in before else ""
        parts.append(f"{name} {first}{form.format(value)}")
    return ", ".join(parts)


def _int8_and_exact_losses(trainer: Trainer, module: CausalLMModule) -> tuple[float, float] | None:
    """The validation loss with frozen blocks in int8, and with exact weights; None without int8 or validation rows."""
    if module.offloader is None or module.hparams["frozen_dtype"] is None or not trainer.val_dataloaders:
        return None
    module.reread_offloaded()  # weight averaging may have swapped weights
    with eval_mode(module):
        quantized = _validation_loss(trainer, module)
        with module.offloader.exact_weights():
            return quantized, _validation_loss(trainer, module)


@torch.inference_mode()
def _validation_loss(trainer: Trainer, module: CausalLMModule) -> float:
    loaders: Any = trainer.val_dataloaders
    total = targets = 0.0
    for loader, limit in zip(loaders if isinstance(loaders, list) else [loaders], trainer.num_val_batches, strict=False):
        batches = itertools.islice(loader, None if limit == float("inf") else int(limit))
        for batch in (batch for batch in batches if "labels" in batch):  # else prompts to be answered
            with trainer.precision_plugin.forward_context():
                parts = module(**trainer.strategy.batch_to_device(batch))
            total, targets = total + float(parts.total), targets + float(parts.num_targets)
    return total / targets if targets else float("nan")
