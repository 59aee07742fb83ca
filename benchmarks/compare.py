"""Memory and time of fine-tuning methods side by side: ``python -m benchmarks.compare --model smollm2``.

Each method trains in a process of its own, in turns (A B C ... A B C ...), so that whatever else the machine does meets
all of them. Every finished run is a line of ``results.jsonl``; a second call goes on where the first one stopped. The
tables (Markdown, CSV) and the plot beside it are made of the runs of the present code and settings alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.methods import METHODS, PACKAGES
from benchmarks.models import WORKLOADS, prepare
from benchmarks.report import Runs, targets_table, write_report
from ows_lightning.cli.preflight import cpu_has_bfloat16

ROOT = Path(__file__).parents[1]
MEASURED = ("benchmarks", *(f"ows_lightning/{part}" for part in ("optim", "sampling", "models", "offload", "compat.py")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing, then writes the report and prints the table and the ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(WORKLOADS), default="smollm2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights; float32 on a CPU without bfloat16")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=3, help="processes a method")
    parser.add_argument("--steps", type=int, default=45, help="measured optimizer steps, after 3 of warm-up")
    parser.add_argument("--interval", type=int, default=10, help="optimizer steps between two draws of blocks")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="directory of results and reports")
    args = parser.parse_args(arguments)
    for method in args.methods:
        if method in PACKAGES and importlib.util.find_spec(PACKAGES[method]) is None:
            parser.error(f'--methods: {method} needs {PACKAGES[method]}; pip install "ows_lightning[benchmarks]"')
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch finds no GPU; give cpu")
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("--device: the peak memory of a phase can be measured on Linux alone")

    native = args.device == "cuda" or cpu_has_bfloat16()
    output = args.output.absolute()
    directory = output / "models" / args.model
    directory.mkdir(parents=True, exist_ok=True)
    workload = WORKLOADS[args.model]
    prepare(workload, directory)
    for shape in workload.shapes:
        common = {
            "model": args.model,
            "device": args.device,
            "dtype": args.dtype or ("bfloat16" if native else "float32"),
            "shape": list(shape),
            "steps": args.steps,
            "interval": args.interval,
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "code": _code_version()},
        }
        runs = _run_missing(common, args.methods, args.repeats, directory, output / "results.jsonl")
        report = output / "-".join([args.model, args.device, common["dtype"], "x".join(map(str, shape))])
        write_report(runs, common, report)
        print(f"\n{report.with_suffix('.md').read_text()}\n{targets_table(runs)}\n\nWritten to {report}.md, .csv and .png\n")


def _run_missing(common: dict[str, Any], methods: Sequence[str], repeats: int, directory: Path, results: Path) -> Runs:
    """Returns the runs of each method, after those that ``results`` lacks have been made and added to it."""
    lines = results.read_text().splitlines() if results.exists() else []
    finished = [json.loads(line) for line in lines]
    runs: Runs = {method: [] for method in methods}
    for repeat in range(repeats):
        for method in methods:
            settings = {**common, "method": method, "repeat": repeat}
            result = next((r for r in finished if r["settings"] == settings), None)
            if result is None:
                print(f"{method}, run {repeat + 1} of {repeats} ... ", end="", flush=True)
                result = {"settings": settings, **_run({**settings, "directory": str(directory)})}
                with results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(result.get("error") or f"{sorted(result['seconds'])[len(result['seconds']) // 2]:.3f} s a step")
            runs[method].append(result)
    return runs


def _run(settings: dict[str, Any]) -> dict[str, Any]:
    """Measures in a fresh process; what ends it early is a result as well."""
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(settings)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode == 0:
        return dict(json.loads(process.stdout))
    if process.returncode < 0:
        return {"error": f"killed by signal {-process.returncode}"}
    return {"error": (process.stderr.strip().splitlines() or ["no message"])[-1]}


def _code_version() -> str:
    """A fingerprint of the code that is measured: results of other code must not end up in the same table."""
    files = sorted(file for path in MEASURED for file in [ROOT / path, *(ROOT / path).rglob("*.py")] if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


if __name__ == "__main__":
    main()
