"""LoRA on sharded weights: all that runs the model gathers them first."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.fixtures import Arguments
from tests.distributed.launch import run

LORA = [
    "--model.rank=null", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.max_new_tokens=4",
    "--model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}",
    "--data.val_size=5", "--data.exact_match_rows=5", "--data.eval_batch_size=2", "--trainer.val_check_interval=2",
]  # fmt: skip


def figures(folder: Path) -> dict[str, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        last = {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}
    return {key: value for key, value in last.items() if key.startswith(("val_", "train_", "grad_"))}


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


def answers(folder: Path) -> list[dict[str, Any]]:
    lines = [line for file in folder.glob("predictions*.jsonl") for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda row: row["prompt"])


@pytest.mark.slow
def test_training_scoring_and_answering_are_those_of_one_process(arguments: Arguments, tmp_path: Path) -> None:
    folders = []
    for ranks, strategy in ((1, "auto"), (2, "fsdp2")):
        folder = tmp_path / str(ranks)
        # With the scores of the base model's outliers, a draw, validation with generated answers, and an export at the end.
        run(arguments(*LORA, "--trainer.max_steps=2", strategy=strategy, ranks=ranks, runs=folder), folder, ranks)
        predict = ["predict", *arguments(*LORA, "--sampling=null", strategy=strategy, ranks=ranks, runs=folder)[1:]]
        run(predict, folder, ranks)
        folders.append(folder)
    one, two = folders
    scores = [json.loads((folder / "version_0" / "outlier_scores.json").read_text())["outlier_ratios"] for folder in folders]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    # The adapters' first values differ, and add nothing before the first step.
    first = [losses(folder / "version_0")[0] for folder in folders]
    assert first[1] == pytest.approx(first[0], rel=1e-5)
    assert "val_exact_match" in figures(two / "version_0")
    assert answers(two / "version_1") == answers(one / "version_1") != []
