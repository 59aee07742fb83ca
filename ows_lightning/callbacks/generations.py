"""What the model answers: to fixed prompts while it trains, and to the rows of ``predict``."""

import csv
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ows_lightning.callbacks.run_folder import run_folder
from ows_lightning.callbacks.step_callback import StepCallback
from ows_lightning.data.encoding import Encoder
from ows_lightning.errors import UsageError
from ows_lightning.models.causal_lm import eval_mode
from ows_lightning.module import CausalLMModule

log = logging.getLogger(__name__)


class ShowGenerations(StepCallback):
    """Logs the answers to fixed prompts, at the start and every ``every_n_steps`` optimizer steps, also to TensorBoard.

    They stand in ``generations.csv`` in the run's folder, too, from which the report has them, unless there is no logger.
    Answers are greedy and at most the module's ``max_new_tokens`` long. The training's state stays as it is.

    Args:
        prompts: Questions, each asked as a user's message in the model's chat template.
        every_n_steps: Optimizer steps from one time to the next.

    Raises:
        UsageError: There is no prompt, or the interval is below 1.
    """

    def __init__(self, prompts: Sequence[str], every_n_steps: int = 100) -> None:
        if not prompts:
            raise UsageError("ShowGenerations.prompts: give one prompt at least")
        if every_n_steps < 1:
            raise UsageError(f"ShowGenerations.every_n_steps: {every_n_steps} must be at least 1")
        self.prompts, self.every_n_steps = list(prompts), every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._show(trainer, pl_module, overwrite=not trainer.ckpt_path)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, module: LightningModule, overwrite: bool = False) -> None:
        if not isinstance(module, CausalLMModule):
            raise UsageError(f"ShowGenerations: {type(module).__name__} can't generate; use CausalLMModule")
        encoder, answers = Encoder(module.tokenizer), []
        for prompt in self.prompts:
            _, ids = encoder.encode_prompt({"messages": [{"role": "user", "content": prompt}]}, row_name="a prompt")
            batch = torch.tensor([ids], device=module.device)
            with trainer.precision_plugin.forward_context(), eval_mode(module):
                answers += module.generate({"input_ids": batch, "attention_mask": torch.ones_like(batch)})
        folder = run_folder(trainer)  # asks all ranks
        if not trainer.is_global_zero:
            return
        step, pairs = trainer.global_step, [*zip(self.prompts, answers, strict=True)]
        log.info("Answers after step %d:\n%s", step, "\n".join(f"  {prompt!r} -> {answer!r}" for prompt, answer in pairs))
        if trainer.loggers and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "generations.csv").open("w" if overwrite else "a", newline="", encoding="utf-8") as file:
                header = [["step", "prompt", "answer"]] if file.tell() == 0 else []
                csv.writer(file).writerows([*header, *([step, *pair] for pair in pairs)])
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = "\n\n".join(f"**{prompt}**\n\n{answer}" for prompt, answer in pairs)
                logger.experiment.add_text("generations", text, step)


class PredictionFile(Callback):
    """Writes each answer of a CausalLMModule as a line of ``predictions.jsonl`` into the run's folder; one file per rank."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        self._path = folder / f"predictions{rank}.jsonl"
        self._path.write_text("", encoding="utf-8")

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: Any) -> None:
        """Appends a batch's rows: ``row`` (from 0), ``prompt``, ``reference``, ``generated``, what else `PromptRows` has."""
        with self._path.open("a", encoding="utf-8") as file:
            for row in outputs:
                known = {key: value for key, value in row.items() if value is not None}
                file.write(json.dumps(known, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        print(f"\nWritten: {self._path}")  # the progress bar has not ended its line
