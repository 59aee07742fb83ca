"""Evaluation on several processes against one: each row counts once, whatever the number of processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.fixtures import Arguments
from tests.distributed.launch import run

ROWS = 5  # which two processes can't divide


def evaluate(command: str, arguments: Arguments, folder: Path, rows: Path, *settings: str, **ranks: Any) -> Path:
    """Runs a command of evaluation, and returns the folder of that run."""
    more = [f"--data.test_dataset={rows}", f"--data.exact_match_rows={ROWS}", "--data.eval_batch_size=2"]
    more += ["--model.max_new_tokens=4", "--sampling=null", *settings]
    run([command, *arguments(*more, runs=folder / "runs", **ranks)[1:]], folder, ranks.get("ranks", 1))
    return folder / "runs" / "version_0"


def answers(folder: Path) -> list[dict[str, Any]]:
    lines = [line for file in folder.glob("predictions*.jsonl") for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda row: row["prompt"])


def figures(folder: Path) -> dict[str, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}


@pytest.fixture
def rows(arguments: Arguments, tmp_path: Path) -> Path:
    """Rows of which the untrained model answers two in five right."""
    path = tmp_path / "rows.jsonl"

    def write(outputs: list[str]) -> Path:
        table = [
            {"instruction": f"is {i} odd?", "output": output, "choices": [output, "perhaps"], "answer": i % 2}
            for i, output in enumerate(outputs)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
        return path

    said = [row["generated"] for row in answers(evaluate("predict", arguments, tmp_path / "first", write(["no"] * ROWS)))]
    return write([text if i in (0, 3) else "no" * (1 + i) for i, text in enumerate(said)])


@pytest.mark.parametrize("strategy", [pytest.param("fsdp2", marks=pytest.mark.slow), "ddp_layerwise"])
def test_each_row_counts_once(strategy: str, rows: Path, arguments: Arguments, tmp_path: Path) -> None:
    one = figures(evaluate("test", arguments, tmp_path / "one", rows))
    assert one["test_exact_match"] == pytest.approx(2 / ROWS)
    two = figures(evaluate("test", arguments, tmp_path / "two", rows, ranks=2, strategy=strategy))
    assert two == pytest.approx(one, rel=1e-5)


def test_each_row_is_answered_once(rows: Path, arguments: Arguments, tmp_path: Path) -> None:
    one = answers(evaluate("predict", arguments, tmp_path / "one", rows))
    assert len(one) == ROWS
    assert answers(evaluate("predict", arguments, tmp_path / "two", rows, ranks=2, strategy="fsdp2")) == one


@pytest.mark.slow
def test_what_offloaded_blocks_learned_at_rest_counts_on_two_processes(
    rows: Path, arguments: Arguments, tmp_path: Path
) -> None:
    resting = ["--sampling.resting_rank=3", "--sampling.activated_layers=1", "--sampling.distribution=[1,0,0,0]"]
    run(arguments("--trainer.max_steps=5", "--model.frozen_in=host", *resting, runs=tmp_path / "trained"), tmp_path / "fit")
    checkpoint = tmp_path / "trained" / "version_0" / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["state"]
    assert any("update" in state for state in saved.values())  # beside the weights, not in them
    exported = f"--model.model_name_or_path={checkpoint.parents[1] / 'model'}"
    expected = figures(evaluate("test", arguments, tmp_path / "exported", rows, exported))
    assert figures(evaluate("test", arguments, tmp_path / "one", rows, f"--ckpt_path={checkpoint}")) == pytest.approx(expected)
    for strategy in ("fsdp2", "ddp_layerwise"):
        two = evaluate("test", arguments, tmp_path / strategy, rows, f"--ckpt_path={checkpoint}", ranks=2, strategy=strategy)
        assert figures(two) == pytest.approx(expected, rel=1e-5), strategy
