"""What a card does: ``python -m benchmarks.gpu``, offline and within ten minutes.

It measures step times and power of Llama-2-7B's shape with random weights, how much of the copies hides behind computation
where frozen blocks are in host memory, how often the process waits for the device, whether weights stay the same to the bit
where copies or computation are slow, peak memory beside ``plan``'s, and the loss head's alternatives; it runs the tests marked
``gpu``; and it writes ``gpu.md`` and ``gpu.json``. What no longer fits into its time is left out, and the report says so.

Beside torch, transformers and lightning it needs `PACKAGES`. ``--device cpu`` is a dry run on a model of a few kilobytes: it
goes the same ways, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.gpu.report import as_markdown
from benchmarks.gpu.settings import MODELS, Row, rows

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "jsonargparse": "jsonargparse",
    "docstring_parser": "docstring-parser",
    "typeshed_client": "typeshed-client",
    "accelerate": "accelerate",
    "scipy": "scipy",
    "peft": "peft",
    "galore_torch": "galore-torch",
    "bitsandbytes": "bitsandbytes",  # which galore-torch imports
    "pytest": "pytest",
    "datasets": "datasets",
}
"""What it imports beside torch, transformers and lightning, and under which name to bring that along. Without peft
or galore-torch, and without pytest and datasets, the rows that need them say so."""
PARTS = ("step", "waits", "adversarial", "plan", "tests", "loss head")
LEAST = 15.0  # seconds below which no further row is begun


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the time allows, and writes both files after every row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run on a tiny model")
    parser.add_argument("--minutes", type=float, default=9.5, help="what the whole may take")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all by default")
    parser.add_argument("--only", help="rows with this in their name")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="directory of gpu.md and gpu.json")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch finds no GPU; give cpu for a dry run")
    deadline = time.monotonic() + 60 * args.minutes
    output = args.output.absolute()
    about = {**machine(args.device), "dry_run": args.device == "cpu"}
    large = about.get("memory_gb", 0) > 24
    about["model"] = model = "tiny" if about["dry_run"] else "llama2-7b-random" if large else "llama-1b-random"
    for name, sizes in MODELS.items():
        AutoConfig.for_model("llama", **sizes, tie_word_embeddings=False).save_pretrained(output / "models" / name)
    wanted = [
        row
        for row in rows(model, str(output / "models"))
        if (not args.parts or row["part"] in args.parts) and (not args.only or args.only in row["name"])
    ]
    done: list[dict[str, Any]] = []
    for row, figures in measured(wanted, args.device, deadline):
        done.append({key: row[key] for key in ("part", "name")} | figures)
        print(f"{row['part']}: {row['name']}: {figures.get('error') or '{:.0f} s'.format(figures['took_s'])}", flush=True)
        (output / "gpu.json").write_text(json.dumps({"about": about, "rows": done}, indent=2) + "\n")
        (output / "gpu.md").write_text(as_markdown(about, done) + "\n")
    print(f"\n{as_markdown(about, done)}\n\nWritten to {output}/gpu.md and gpu.json")


def machine(device: str) -> dict[str, Any]:
    """Names the card, its driver, and the versions of what was measured."""
    about: dict[str, Any] = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        about |= {"device": card.name, "memory_gb": card.total_memory / 1e9, "cuda": torch.version.cuda, "driver": _driver()}
    for package in ("torch", "transformers", "lightning", "peft", "galore-torch", "liger-kernel"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = None
    about["missing"] = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    return about


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def measured(wanted: list[Row], device: str, deadline: float) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Yields each row with its figures. A process that dies or hangs costs the row that it is at; another one goes on."""
    worker: _Worker | None = None
    for row in wanted:
        left = deadline - time.monotonic()
        if left < LEAST:
            yield row, {"error": "left out: no time was left"}
        elif row["part"] == "tests":
            yield row, gpu_tests(min(row["limit"], left))
        else:
            worker = worker or _Worker(device)
            figures = worker.measure(row, min(row["limit"], max(deadline - time.monotonic(), 0)))  # a start may take long
            if "died" in figures:
                worker.stop()
                worker = None
            yield row, figures
    if worker is not None:
        worker.stop()


class _Worker:
    """A process of ``measure`` that rows are given to."""

    def __init__(self, device: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.measure", device]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        if self._lines.get() is None:  # it has ended before it was ready
            self._lines.put(None)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def measure(self, row: Row, limit: float) -> dict[str, Any]:
        """Returns the row's figures; ``died`` says that this process is of no use any more."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(row) + "\n")
            self.process.stdin.flush()
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            return {"error": f"not done within {limit:.0f} s", "died": True}
        except OSError:
            line = None
        if line is None:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            return {"error": f"the process ended: {last[:200]}", "died": True}
        return dict(json.loads(line))

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        self._errors.close()


def gpu_tests(limit: float) -> dict[str, Any]:
    """Runs the tests that are marked ``gpu``, out of the files that have any."""
    if find_spec("pytest") is None:
        return {"error": "pytest is not installed; bring it along"}
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line", *files]
    start = time.monotonic()
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {limit:.0f} s"}
    lines = (process.stdout.strip() or process.stderr.strip() or "no output").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1].strip("= "), "failed": failed, "took_s": time.monotonic() - start}


if __name__ == "__main__":
    main()
