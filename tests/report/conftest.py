"""Small run folders as `fit` leaves them, made by code."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.published import LLAMA_2_7B


def make_run(
    folder: Path,
    ratios: list[float] = LLAMA_2_7B,
    steps: int = 500,
    interval_steps: int = 50,
    activated_layers: int = 5,
    sampled: bool = True,
    seconds_per_step: float = 1.7,
    model: str = "meta-llama/Llama-2-7b-hf",
    seed: int = 0,
) -> Path:
    """A run folder: training logged every 10 steps, validation every 50 in rows of its own, as CSVLogger has them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    probabilities = np.array(ratios) / np.sum(ratios)
    if sampled:
        scores = {
            "model": model,
            "num_layers": len(ratios),
            "threshold": 13.0,
            "calibration_samples": 128,
            "distribution": "outlier",
            "outlier_ratios": list(ratios),
            "probabilities": probabilities.tolist(),
        }
        (folder / "outlier_scores.json").write_text(json.dumps(scores))
        lines = ["interval,step,blocks"]
        for interval, step in enumerate(range(0, steps, interval_steps)):
            blocks = rng.choice(len(ratios), activated_layers, replace=False, p=probabilities)
            lines.append(f"{interval},{step},{' '.join(map(str, sorted(blocks)))}")
        (folder / "sampling_history.csv").write_text("\n".join(lines) + "\n")
    rows: list[dict[str, float]] = []
    for step in range(9, steps, 10):
        loss = 0.4 + 3 * np.exp(-step / (60 + 20 * seed))
        rows.append(
            {
                "step": step,
                "epoch": 0,
                "train_loss": loss + rng.normal(0, 0.06),
                "grad_norm": 1.0,
                "tokens_per_second": 900 / seconds_per_step + rng.normal(0, 12),
                "peak_memory_mb": (21300.0 if sampled else 38200.0) + rng.normal(0, 150),
                "tokens": (step + 1) * 1500,
                "time_s": (step + 1) * seconds_per_step,
            }
        )
        if (step + 1) % 50 == 0:
            rows.append({"step": step, "epoch": 0, "val_loss": loss + 0.05, "val_perplexity": float(np.exp(loss + 0.05))})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list({name: None for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    optimizer = {"class_path": "ows_lightning.GaLoreAdamW", "init_args": {"lr": 0.0003, "weight_decay": 0.0}}
    config = {
        "seed_everything": 0,
        "model": {"model_name_or_path": model, "optimizer": optimizer, "rank": 128 if sampled else None},
        "sampling": {"activated_layers": activated_layers, "interval_steps": interval_steps, "distribution": "outlier"}
        if sampled
        else None,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(name="make_run", scope="session")
def make_run_fixture() -> Callable[..., Path]:
    return make_run
