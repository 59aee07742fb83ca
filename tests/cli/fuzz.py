"""Random but valid settings: two steps with each, and again with a kill and a resume; both must give the same weights.

The killed run gets SIGKILL at a drawn moment of its life, which may be before its first checkpoint or in a later one; of two
processes one or both.

python -m tests.cli.fuzz 1000 --seed 7
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import signal
import sys
import tempfile
import typing
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ows_lightning import CausalLMModule, GaLoreAdamW, InstructionDataModule, LayerwiseSampling, decoder_layers
from tests.data.samples import tiny_tokenizer
from tests.distributed.launch import Launch, Target, main_without_prediction
from tests.tiny import tiny_model

OWNERS = {
    "model": CausalLMModule,
    "data": InstructionDataModule,
    "sampling": LayerwiseSampling,
    "model.optimizer": GaLoreAdamW,
}
OTHER_OPTIMIZERS = [f"torch.optim.{name}" for name in ("AdamW", "SGD", "Adafactor", "NAdam")]
TWO_PROCESSES = ("ddp_layerwise", "fsdp2")
# Choices for what no type bounds; of all else the type says what is valid.
VALUES: dict[str, list[Any]] = {
    "model.rank": [None, 1, 3, 64],
    "model.update_proj_gap": [1, 2, 200],
    "model.gradient_checkpointing": [False, True, 3, "auto"],
    "model.scale": [0.25, 1.0],
    "model.warmup_steps": [0, 1, 0.5],
    "model.optimizer": ["GaLoreAdamW", *OTHER_OPTIMIZERS],
    "model.window_blocks": [2, 3],
    "data.data_format": [None, "alpaca"],
    "data.batch_size": [1, 3, 8],
    "data.max_seq_length": [16, 64],
    "data.val_size": [0, 4, 0.1],
    "data.seed": [0, 2**31],
    "sampling.activated_layers": [1, 2],
    "sampling.interval_steps": [1, 2, 50],
    "sampling.threshold": [0.5, 2.0],
    "sampling.calibration_samples": [1, 8],
    "sampling.always_train": [[], ["norm"], ["embeddings", "lm_head", "norm"]],
    "sampling.rescore_every": [None, 1],
    "sampling.seed": [0, 2**31],
    "sampling.resting_rank": [0, 2],
    "model.optimizer.lr": [1e-4, 1e-2],
    "model.optimizer.weight_decay": [0.0, 0.1],
    "trainer.accumulate_grad_batches": [1, 2],
    "trainer.strategy": ["auto", *TWO_PROCESSES],
    "trainer.precision": ["32-true", "bf16-true", "bf16-mixed"],
    "trainer.gradient_clip_val": [None, 0.1],
}
LEFT_OUT = {"trust_remote_code", "compile", "kernels", "streaming", "save_hyperparameters"}


MOMENTS = {
    "on_train_start": [0], "on_train_batch_start": [0, 1], "on_before_backward": [0, 1], "on_after_backward": [0, 1],
    "on_before_optimizer_step": [0, 1], "on_before_zero_grad": [0, 1], "on_train_batch_end": [1, 2],
    "on_save_checkpoint": [1, 2], "on_train_end": [2], "on_fit_end": [2],
}  # fmt: skip
"""Hooks of a callback in which the process may be killed, and after how many steps they come."""


def draw(random: random.Random) -> dict[str, Any]:
    """Returns some settings, by key; each key is set half the time. Most of what never goes together is left out."""
    choices = dict(VALUES)
    for owner, kind in OWNERS.items():
        hints = typing.get_type_hints(kind.__init__)
        for name in inspect.signature(kind).parameters:
            values = _values(hints[name]) if name in hints and name not in LEFT_OUT else []
            if values:
                choices.setdefault(f"{owner}.{name}", values)
    drawn = {key: random.choice(values) for key, values in sorted(choices.items()) if random.random() < 0.5}
    if random.random() < 0.9:
        if drawn.get("trainer.strategy") in TWO_PROCESSES:
            drawn = {key: value for key, value in drawn.items() if not key.startswith("model.frozen_")}
        if any(key.startswith("sampling.") for key in drawn):  # else the default, more than have outliers
            drawn.setdefault("sampling.activated_layers", 2)
        if drawn.get("model.optimizer") in OTHER_OPTIMIZERS:
            of_ours = ("model.rank", *(f"model.optimizer.{name}" for name in inspect.signature(GaLoreAdamW).parameters))
            shared = ("model.optimizer.lr", "model.optimizer.weight_decay")
            drawn = {key: value for key, value in drawn.items() if key not in of_ours or key in shared} | {"model.rank": None}
            drawn.pop("sampling.resting_rank", None)
    return drawn


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
    model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=6)
    for number, block in enumerate(decoder_layers(model), start=1):
        block.mlp.down_proj.weight.data[0, :number] += 5  # outliers, without which most draws would be refused
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    rows = [{"instruction": f"is {i} even?", "output": "no" if i % 2 else "yes"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def processes(settings: dict[str, Any]) -> int:
    """How many processes train with the settings."""
    return 2 if settings.get("trainer.strategy") in TWO_PROCESSES else 1


def command_line(folder: Path, runs: Path, settings: dict[str, Any]) -> list[str]:
    """Returns the words that train with the settings."""
    fixed = {
        "model.model_name_or_path": folder / "tiny", "data.dataset": folder / "rows.jsonl", "data.num_workers": 0,
        "trainer.accelerator": "cpu", "trainer.devices": processes(settings), "trainer.max_steps": 2,
        "trainer.enable_progress_bar": False,
        "trainer.log_every_n_steps": 1, "checkpoint.every_n_train_steps": 1, "trainer.default_root_dir": runs,
    }  # fmt: skip
    words = {key: json.dumps(value) if isinstance(value, (bool, list, type(None))) else str(value)
             for key, value in {**fixed, **settings}.items()}  # fmt: skip
    return ["fit", *(f"--{key}={word}" for key, word in words.items())]


def main(words: list[str]) -> None:
    """Runs the command line, with the prediction of memory."""
    from ows_lightning.cli.main import main

    main(words)


def attempt(home: Path, settings: dict[str, Any], kill: dict[str, Any], target: Target) -> tuple[str, str]:
    """Trains with the settings, with and without a kill and a resume.

    Args:
        home: The folder that was prepared.
        settings: By key.
        kill: When to kill whom, see `Kill`.
        target: What runs the command line the first time.

    Returns:
        ``killed`` (and resumed), ``trained`` (the moment never came), ``refused`` or ``wrong``, and why.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def fit(runs: str, target: Target, more: dict[str, Any]) -> tuple[set[int | None], str]:
            words, ranks = command_line(home, folder / runs, {**settings, **more}), processes(settings)
            launch = Launch(words, folder / "output", ranks, target=target)
            return set(launch.wait(300)), launch.output

        codes, said = fit("whole", target, {})
        if codes == {2}:  # these do not go together, which one line has to say
            told = said.count("error: ") == processes(settings) and "Traceback" not in said
            line = said[said.rindex("error: ") :].strip() if told else f"no line: {said[-1500:]}"
            return ("refused" if told else "wrong"), line
        if codes != {0}:
            return "wrong", f"exit codes {codes}: {said[-1500:]}"
        killed = {"trainer.callbacks": "tests.distributed.probe.Kill"}
        codes, said = fit("killed", main_without_prediction, killed | {f"trainer.callbacks.{key}": kill[key] for key in kill})
        was_killed = -signal.SIGKILL in codes  # 0: that moment never came; 1: of two processes the other was killed
        told = codes != {0, 1} and (1 not in codes or "another process of this run" in said)
        if not codes <= {0, 1, -signal.SIGKILL} or not told or "Traceback" in said:
            return "wrong", f"to be killed: exit codes {codes}: {said[-1500:]}"
        codes, said = fit("killed", main_without_prediction, {"ckpt_path": "last"})
        if codes != {0}:
            return "wrong", f"resumed: exit codes {codes}: {said[-1500:]}"
        models = [max((folder / runs).glob("version_*/model/model.safetensors")) for runs in ("whole", "killed")]
        same = models[0].read_bytes() == models[1].read_bytes()
        return ("killed" if was_killed else "trained", "") if same else ("wrong", "the resumed run has other weights")


def run(number: int, seed: int, first: int = 0) -> Counter[str]:
    """Tries a number of draws, says what was refused and what went wrong, and returns how many ended how."""
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        prepare(Path(home))
        for index in range(first, first + number):
            drawn = random.Random(f"{seed}-{index}")
            settings, moment = draw(drawn), drawn.choice([*MOMENTS])
            kill = {"moment": moment, "step": drawn.choice(MOMENTS[moment])}
            if processes(settings) == 2:
                kill["rank"] = drawn.choice([None, 0, 1])
            target = drawn.choice([main, *[main_without_prediction] * 7])
            end, why = attempt(Path(home), settings, kill, target)
            ends[end] += 1
            print(f"draw {index} {end}{why and ': '}{why}", flush=True)
            if end == "wrong":
                print(f"  {settings}, {kill}", flush=True)
    return ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, help="How many draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="Number of the first draw")
    given = parser.parse_args()
    found = run(given.number, given.seed, given.first)
    print(f"{given.number} draws with seed {given.seed}: {', '.join(f'{count} {end}' for end, count in found.most_common())}")
    sys.exit(found["wrong"] > 0)
