"""What settings do to learning: validation loss of the quickstart over seeds: ``python -m benchmarks.learning``.

Each run is a process of ``main.py fit`` with a folder of its own; a second call goes on where the first one stopped (delete
a folder to have it run anew). Time is not measured: runs share the machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median

from benchmarks.report import markdown
from ows_lightning.report.run import RunRecord

ROOT = Path(__file__).parents[1]

_ALL = ["--sampling.always_train", "[embeddings,lm_head,norm]"]
_RENEWED = ["--model.update_proj_gap", "5", "--model.optimizer.init_args.moments_at_renewal"]
_ROUNDED = ["--model.optimizer.init_args.stochastic_rounding", "true"]
_BFLOAT16 = ["--trainer.precision", "bf16-true", *_ROUNDED]

SETTINGS: dict[str, tuple[str, list[str]]] = {
    "base": ("bf16-true, stochastic rounding, float32 moments, embeddings frozen", _BFLOAT16),
    "low_rank": ("embeddings and head train in low rank", [*_BFLOAT16, *_ALL, "--model.project_embeddings", "true"]),
    "full_rank": ("embeddings and head train in full rank", [*_BFLOAT16, *_ALL]),
    "bf16_moments": ("bfloat16 moments", [*_BFLOAT16, "--model.optimizer.init_args.moments_dtype", "bfloat16"]),
    "to_nearest": ("weights rounded to nearest", ["--trainer.precision", "bf16-true"]),
    "float32": ("float32 throughout", []),
    "keep": ("subspaces renewed every 5 steps, moments kept", [*_BFLOAT16, *_RENEWED, "keep"]),
    "reproject": ("the same, moments reprojected", [*_BFLOAT16, *_RENEWED, "reproject"]),
    "reset": ("the same, moments reset", [*_BFLOAT16, *_RENEWED, "reset"]),
}
"""Key -> how the table calls a setting, and its flags of ``main.py fit``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the runs that are missing, then writes and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml", help="what the settings change")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"), help="directory of runs and table")
    args = parser.parse_args(arguments)

    def loss(setting: str, seed: int) -> float:
        return validation_loss(args.config, setting, seed, args.steps, args.output.absolute(), args.jobs)

    with ThreadPoolExecutor(args.jobs) as pool:
        seeds_first = list(product(range(args.seeds), args.settings))
        losses = dict(zip(seeds_first, pool.map(lambda run: loss(run[1], run[0]), seeds_first), strict=True))
    by_setting = {setting: [losses[seed, setting] for seed in range(args.seeds)] for setting in args.settings}
    table = as_table(by_setting)
    (args.output / "learning.md").write_text(table + "\n")
    print(f"\n{table}\n\nWritten to {args.output / 'learning.md'}")


def validation_loss(config: Path, setting: str, seed: int, steps: int, output: Path, jobs: int) -> float:
    """Returns the validation loss (nats a target token) at the end of a run, which is made if it is not there."""
    folder = output / f"{setting}-steps{steps}-seed{seed}"
    known = _final_loss(folder)
    if known is None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        flags = {
            "seed_everything": seed, "data.seed": seed, "sampling.seed": seed, "data.exact_match_rows": 0,
            # Longer intervals than the quickstart's, so that a subspace can be renewed within one, and larger batches.
            "sampling.interval_steps": 10, "data.batch_size": 12, "model.warmup_steps": 10,
            "model.optimizer.init_args.lr": 2.0e-3,
            "trainer.max_steps": steps, "trainer.val_check_interval": steps, "trainer.num_sanity_val_steps": 0,
            "trainer.default_root_dir": folder, "trainer.enable_progress_bar": "false",
            "checkpoint.monitor": "null", "checkpoint.save_top_k": 0, "checkpoint.save_last": "false",
        }  # fmt: skip
        command = [sys.executable, "main.py", "fit", "--config", str(config), *SETTINGS[setting][1]]
        command += [part for key, value in flags.items() for part in (f"--{key}", str(value))]
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, **threads})
        known = _final_loss(folder)
        assert known is not None, f"{folder} has no validation loss"
        for model in folder.glob("version_*/model"):
            shutil.rmtree(model)  # the record alone is of use here
        print(f"{setting}, seed {seed}: {known:.3f}", flush=True)
    return known


def as_table(losses: dict[str, list[float]]) -> str:
    """Returns validation losses by setting and seed as a Markdown table, with their differences from the first setting."""
    first = next(iter(losses.values()))
    rows = []
    for setting, values in losses.items():
        differences = [value - other for value, other in zip(values, first, strict=True)]
        rows.append([SETTINGS[setting][0], _spread(values, ".3f"), "" if values is first else _spread(differences, "+.3f")])
    return markdown(["Setting", f"Validation loss, {len(first)} seeds", "Minus the first row's, seed by seed"], rows)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _final_loss(folder: Path) -> float | None:
    losses = RunRecord.read(folder).series("val_loss")[1] if folder.exists() else []
    return losses[-1] if losses else None


if __name__ == "__main__":
    main()
