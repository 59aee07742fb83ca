"""Random but valid settings: two steps with each, and again with a resume after the first; both must give the same weights.

The resumed run goes on from a copy of the run's folder that is made when the second step starts: what a kill at that moment
leaves. (Real kills are those of ``tests/checkpoints/test_resume.py``; here each would cost a run more.)

python -m tests.cli.fuzz 1000 --seed 7
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import random
import shutil
import sys
import tempfile
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from lightning.pytorch import Callback, LightningModule, Trainer

from ows_lightning import CausalLMModule, GaLoreAdamW, InstructionDataModule, LayerwiseSampling
from ows_lightning.cli.main import main
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_model

OWNERS = {
    "model": CausalLMModule,
    "data": InstructionDataModule,
    "sampling": LayerwiseSampling,
    "model.optimizer": GaLoreAdamW,
}
# Choices for what no type bounds; of all else the type says what is valid.
VALUES: dict[str, list[Any]] = {
    "model.rank": [None, 1, 3, 64],
    "model.update_proj_gap": [1, 2, 200],
    "model.scale": [0.25, 1.0],
    "model.warmup_steps": [0, 1, 0.5],
    "model.frozen_in": ["device", "host"],
    "model.frozen_dtype": [None],
    "data.data_format": [None, "alpaca"],
    "data.batch_size": [1, 3, 8],
    "data.max_seq_length": [16, 64],
    "data.val_size": [0, 4, 0.1],
    "data.seed": [0, 2**31],
    "sampling.activated_layers": [1, 2, 4],
    "sampling.interval_steps": [1, 2, 50],
    "sampling.threshold": [0.5, 2.0],
    "sampling.calibration_samples": [1, 8],
    "sampling.always_train": [[], ["norm"], ["embeddings", "lm_head", "norm"]],
    "sampling.rescore_every": [None, 1],
    "sampling.seed": [0, 2**31],
    "model.optimizer.lr": [1e-4, 1e-2],
    "model.optimizer.weight_decay": [0.0, 0.1],
    "trainer.accumulate_grad_batches": [1, 2],
    "trainer.precision": ["32-true", "bf16-true", "bf16-mixed"],
    "trainer.gradient_clip_val": [None, 0.1],
}
LEFT_OUT = {"trust_remote_code", "compile", "streaming", "save_hyperparameters"}


class Copy(Callback):
    """Copies the folder of runs when the second step starts, as a kill would leave it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1 and not Path("killed").exists():
            shutil.copytree("whole", "killed", symlinks=True)


def draw(random: random.Random) -> dict[str, Any]:
    """Returns some settings, by key; each key is set half the time."""
    choices = dict(VALUES)
    for owner, kind in OWNERS.items():
        hints = typing.get_type_hints(kind.__init__)
        for name in inspect.signature(kind).parameters:
            values = _values(hints[name]) if name in hints and name not in LEFT_OUT else []
            if values:
                choices.setdefault(f"{owner}.{name}", values)
    return {key: random.choice(values) for key, values in sorted(choices.items()) if random.random() < 0.5}


def _values(hint: Any) -> list[Any]:
    """What a type allows, if it is a truth value or a choice."""
    if hint is bool:
        return [False, True]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) if get_origin(part) is Literal for value in get_args(part)]


def prepare(folder: Path) -> None:
    """Writes a tiny model and some rows."""
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=6).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    rows = [{"instruction": f"is {i} even?", "output": "no" if i % 2 else "yes"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def fit(folder: Path, settings: dict[str, Any], *more: str) -> tuple[int, str]:
    """Trains in a process of its own, forked so that nothing is imported again; returns its exit code and what it wrote."""
    flags = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    fixed = [
        "--model.model_name_or_path=tiny", "--data.dataset=rows.jsonl", "--data.num_workers=0", "--trainer.accelerator=cpu",
        "--trainer.devices=1", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1",
        "--checkpoint.every_n_train_steps=1",
    ]  # fmt: skip
    output = folder / "output.txt"
    if (child := os.fork()) == 0:
        code = 1
        with output.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                sys.argv = ["main.py"]
                os.chdir(folder)
                main(["fit", *fixed, *flags, *more])
                code = 0
            except SystemExit as exit:
                code = int(exit.code or 0)
            finally:
                file.flush()
                os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text()


def attempt(settings: dict[str, Any]) -> tuple[bool, str | None]:
    """Trains with the settings, with and without a resume.

    Returns:
        Whether the settings were accepted, and what is wrong, None if nothing is.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        code, said = fit(folder, settings, "--trainer.default_root_dir=whole", "--trainer.callbacks=tests.cli.fuzz.Copy")
        if code == 2:  # these do not go together, which one line has to say
            told = said.count("error: ") == 1 and "Traceback" not in said
            return False, None if told else f"exit code 2 without a line: {said[-500:]}"
        if code != 0:
            return True, f"exit code {code}: {said[-500:]}"
        code, said = fit(folder, settings, "--trainer.default_root_dir=killed", "--ckpt_path=last")
        if code != 0:
            return True, f"resumed: exit code {code}: {said[-500:]}"
        models = [folder / run / "model" / "model.safetensors" for run in ("whole/version_0", "killed/version_1")]
        same = models[0].read_bytes() == models[1].read_bytes()
        return True, None if same else "the resumed run has other weights"


def run(number: int, seed: int) -> tuple[int, list[str]]:
    """Tries a number of draws; returns how many were accepted, and a line for each that went wrong."""
    accepted, wrong = 0, []
    for index in range(number):
        settings = draw(random.Random(f"{seed}-{index}"))
        taken, problem = attempt(settings)
        accepted += taken
        if problem:
            wrong.append(f"seed {seed}, draw {index}, {settings}: {problem}")
            print(wrong[-1], flush=True)
    return accepted, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, help="How many draws")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    trained, found = run(given.number, given.seed)
    print(f"{given.number} draws with seed {given.seed}: {trained} trained, the others refused; {len(found)} went wrong")
    sys.exit(bool(found))
