"""Small runs of TRL's trainers, which can be killed."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ows_lightning.integrations.transformers import LayerwiseSamplingCallback, use_galore
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_model

LAYERS, STEPS, INTERVAL, ACCUMULATE = 5, 10, 3, 2


def make_trainer(
    output: Path,
    kind: str = "sft",
    galore: bool = False,
    *callbacks: TrainerCallback,
    sampling: Any = None,
    peft_config: Any = None,
    **options: Any,
) -> tuple[Any, LayerwiseSamplingCallback]:
    """A trainer of TRL's with our callback, on a tiny model; two micro-batches a step."""
    set_seed(0)
    tokenizer = tiny_tokenizer("chatml")
    made = tiny_model("llama", num_hidden_layers=LAYERS, vocab_size=len(tokenizer), tie_word_embeddings=False)
    made.save_pretrained(output / "base")  # DPO loads its reference model from there
    model = AutoModelForCausalLM.from_pretrained(output / "base")
    sampling = sampling or LayerwiseSamplingCallback(
        activated_layers=2, interval_steps=INTERVAL, calibration_samples=4, threshold=2.0, always_train=["norm"]
    )
    common: dict[str, Any] = {
        "output_dir": str(output), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "gradient_accumulation_steps": ACCUMULATE, "save_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "max_length": 32, **options,
    }  # fmt: skip
    rest: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [sampling, *callbacks], "peft_config": peft_config}
    if kind == "sft":
        rows = [{"prompt": f"is {i} even?", "completion": " yes" if i % 2 == 0 else " no"} for i in range(24)]
        trainer = SFTTrainer(model, args=SFTConfig(**common), train_dataset=Dataset.from_list(rows), **rest)
    else:
        pairs = [{"prompt": f"is {i} even?", "chosen": " yes", "rejected": " no"} for i in range(24)]
        trainer = DPOTrainer(model, args=DPOConfig(**common), train_dataset=Dataset.from_list(pairs), **rest)
    if galore:
        use_galore(trainer, rank=4, update_proj_gap=4)
    return trainer, sampling


class DieAt(TrainerCallback):
    """Kills the process in the midst of a step, as the machine's failure would."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(arguments: list[str]) -> None:
    """Trains: ``OUTPUT {sft,dpo} {adamw,galore} [--die N] [--resume]``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("kind")
    parser.add_argument("optimizer")
    parser.add_argument("--die", type=int)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args(arguments)
    trainer, sampling = make_trainer(given.output, given.kind, given.optimizer == "galore", DieAt(given.die))
    trainer.train(resume_from_checkpoint=given.resume)
    torch.save({"weights": trainer.model.state_dict(), "history": sampling.history}, given.output / "end.pt")
