"""Many short runs of two processes under load: how many of the processes end with exit code 0.

``python -m tests.distributed.many_ends 50`` (with ``--load 4`` processes that keep the cores busy meanwhile).
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.data.samples import tiny_tokenizer
from tests.distributed.launch import Launch
from tests.tiny import tiny_model


def main() -> int:
    """Runs them, and prints how they ended; returns 1 if one ended otherwise than with 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int)
    parser.add_argument("--load", type=int, default=2, help="Processes that compute beside the runs")
    given = parser.parse_args()
    ends: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        home, tokenizer = Path(name), tiny_tokenizer()
        tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(home / "model")
        tokenizer.save_pretrained(home / "model")
        rows = [{"instruction": f"is {i} odd?", "output": "yes"} for i in range(16)]
        (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.load)]
        try:
            for number in range(given.runs):
                strategy = ("fsdp2", "ddp_layerwise")[number % 2]
                launch = Launch(_arguments(home, strategy), home / f"run{number}", ranks=2)
                codes = launch.wait(300)
                ends.update(f"{strategy}: {code}" for code in codes)
                if codes != [0, 0]:
                    print(f"run {number} ({strategy}) ended with {codes}\n{launch.output[-2000:]}", flush=True)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    good = sum(count for end, count in ends.items() if end.endswith(": 0"))
    print(f"{good} of {ends.total()} processes of {given.runs} runs ended with 0: {dict(ends)}")
    return int(good != ends.total())


def _arguments(home: Path, strategy: str) -> list[str]:
    settings = {
        "model.model_name_or_path": home / "model", "model.rank": 4, "data.dataset": home / "rows.jsonl", "data.val_size": 0,
        "data.batch_size": 2, "sampling": "null", "trainer.accelerator": "cpu", "trainer.devices": 2,
        "trainer.strategy": strategy,
        "trainer.max_steps": 2, "trainer.default_root_dir": home / "runs", "trainer.enable_progress_bar": "false",
        "trainer.enable_checkpointing": "false", "trainer.logger": "false",
    }  # fmt: skip
    return ["fit", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


if __name__ == "__main__":
    sys.exit(main())
