"""Many short runs of two processes under load, and how each of the processes ends.

``python -m tests.distributed.many_ends 50`` lets all end by themselves, with exit code 0. With ``--kill``, one of the two gets
SIGKILL at a drawn moment of the run's life, from its start to its end, and the other has to end within a minute, with a line
that says why. ``--load 4`` processes keep the cores busy meanwhile; ``--seed`` draws other moments.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from ows_lightning.cli.peer_watchdog import EXIT_TIMEOUT
from tests.data.samples import tiny_tokenizer
from tests.distributed.launch import Launch, free_port
from tests.distributed.probe import KILLED, MOMENTS
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # seconds for a process to end after the other was killed
STARTED_BY = (*["a fork"] * 6, "torchrun", "lightning")
"""A fork has the libraries already; ``main.py`` loads them, started as torchrun would, or one process by the other."""

WHEN = ("start", *MOMENTS, "teardown")
"""The moments that are drawn from: the end twice, which is long."""


def main() -> int:
    """Runs them, and prints how they ended; returns 1 if one ended otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int)
    parser.add_argument("--load", type=int, default=2, help="Processes that compute beside the runs")
    parser.add_argument("--kill", action="store_true", help="Kill one of the two processes of each run")
    parser.add_argument("--seed", type=int, default=0, help="Draws whom, where and when to kill")
    parser.add_argument("--first", type=int, default=0, help="Number of the first run, which its draw depends on")
    parser.add_argument("--moments", nargs="+", default=WHEN, help="Draw from these alone")
    given = parser.parse_args()
    ends: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        prepare(home)
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.load)]
        try:
            for number in range(given.first, given.first + given.runs):
                if given.kill:
                    ends[kill(home, random.Random(f"{given.seed}-{number}"), given.moments, f"run {number}: ")] += 1
                else:
                    ends.update(undisturbed(home, number))
        finally:
            for process in busy:
                process.kill()
                process.wait()
    wrong = sum(count for end, count in ends.items() if end.startswith("wrong"))
    print(f"{given.runs} runs{f' with seed {given.seed}' if given.kill else ''}: {dict(ends)}")
    return int(wrong > 0)


def prepare(home: Path) -> None:
    """Writes a tiny model and some rows."""
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    rows = [{"instruction": f"is {i} odd?", "output": "yes"} for i in range(16)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def undisturbed(home: Path, number: int) -> list[str]:
    """Lets two processes run to their ends, and returns how they did."""
    strategy = ("fsdp2", "ddp_layerwise")[number % 2]
    launch = Launch(arguments(home, strategy), home / f"run{number}", ranks=2)
    codes = launch.wait(300)
    if codes != [0, 0]:
        print(f"run {number} ({strategy}) ended with {codes}\n{launch.output[-2000:]}", flush=True)
    return [f"{'' if code == 0 else 'wrong, '}{strategy}: {code}" for code in codes]


def kill(home: Path, draw: random.Random, moments: Sequence[str] = WHEN, say: str = "") -> str:
    """Kills one of two processes, and looks at how the other ends.

    Args:
        home: The folder that was prepared.
        draw: Draws the settings, the victim and the moment.
        moments: Out of which.
        say: What the printed line begins with.

    Returns:
        ``noticed``; ``was through`` if the process that was left ended well at the same time; or ``wrong`` and why.
    """
    by, strategy, victim = draw.choice(STARTED_BY), draw.choice(["fsdp2", "ddp_layerwise"]), draw.randrange(2)
    moment, delay = draw.choice(moments), draw.choice([0.0, draw.random(), 3 * draw.random()])
    folder = Path(tempfile.mkdtemp(dir=home))
    more: dict[str, Any] = {
        "data.val_size": 4, "sampling.activated_layers": 1, "sampling.interval_steps": 2, "sampling.calibration_samples": 4,
        "sampling.threshold": 2, "trainer.val_check_interval": 2, "trainer.max_steps": 4, "checkpoint.every_n_train_steps": 2,
        "trainer.num_sanity_val_steps": 1,
    }  # fmt: skip
    if moment != "start":
        killer = {"moment": moment, "rank": victim, "delay": delay}
        if "batch" in moment or "before" in moment:
            killer["step"] = draw.choice([1, 2, 3])
        more |= {"trainer.callbacks": "tests.distributed.probe.Kill"}
        more |= {f"trainer.callbacks.{key}": value for key, value in killer.items()}
    elif by != "a fork":
        delay = draw.uniform(0, 20)
    processes = start(arguments(home, strategy, more), folder, by)
    killed, seconds, codes = watch(processes, by, victim, delay if moment == "start" else None)
    said = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.txt")))
    told = [line for line in said.splitlines() if "another process of this run" in line]
    if "Traceback" in said:
        end = "wrong: a stack trace"
    elif not killed and KILLED not in said:
        end = "was through"
    elif seconds > LIMIT:
        end = f"wrong: it was there after {LIMIT:.0f} s"
    elif told:
        end = "noticed"
    else:
        # None: of a process of Lightning's, which in vain would have waited longer.
        through = codes[1 - victim] == 0 or (codes[1 - victim] is None and seconds < EXIT_TIMEOUT)
        end = "was through" if through else "wrong: no line says why"
    print(f"{say}{by}, {strategy}, rank {victim} at {moment} + {delay:.1f} s: {end}, {seconds:.1f} s, {codes}", flush=True)
    if end.startswith("wrong"):
        print(said[-3000:], flush=True)
    return end


def start(words: list[str], folder: Path, by: str) -> list[Any]:
    """Starts two processes, or the one that starts the other; their output goes into text files of the folder."""
    if by == "a fork":
        return list(Launch(words, folder, ranks=2).processes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    torchrun = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0",
    }  # fmt: skip
    processes = []
    for rank in range(1 if by == "lightning" else 2):
        own = {} if by == "lightning" else {**torchrun, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(folder / f"rank{rank}.txt", "w") as file:
            command = [sys.executable, str(ROOT / "main.py"), *words]
            processes.append(subprocess.Popen(command, env=environment | own, stdout=file, stderr=file))
    return processes


def watch(processes: list[Any], by: str, victim: int, kill_after: float | None) -> tuple[bool, float, list[Any]]:
    """Waits for both ends, and kills the victim, if it does not do so itself.

    Args:
        processes: Those that were started.
        by: How.
        victim: Whose end counts.
        kill_after: Seconds from the victim's start to its kill.

    Returns:
        Whether it was killed from here; how many seconds later than it the other one ended; and the exit codes that are known.
    """
    ranks, killed, ends = [psutil.Process(process.pid) for process in processes], False, {}
    begin: float | None = None
    while len(ends) < 2 and not (victim in ends and time.monotonic() - ends[victim] > LIMIT):
        now = time.monotonic()
        if len(ranks) == 1 and by == "lightning" and alive(ranks[0]):
            with contextlib.suppress(psutil.Error):
                ranks += [child for child in ranks[0].children() if "fit" in child.cmdline()]
        elif len(ranks) == 1:
            ends.setdefault(1, now)  # it was never started
        if victim < len(ranks) and kill_after is not None and not killed and alive(ranks[victim]):
            begin = begin or now
            if now - begin >= kill_after:
                ranks[victim].kill()
                killed = True
        for rank, process in enumerate(ranks):
            if not alive(process):
                ends.setdefault(rank, now)
        time.sleep(0.05)
    for process in ranks:
        with contextlib.suppress(psutil.Error):
            process.kill()
    for process in processes:
        process.join() if by == "a fork" else process.wait()
    codes = [process.exitcode if by == "a fork" else process.returncode for process in processes]
    return killed, ends.get(1 - victim, time.monotonic()) - ends[victim], [*codes, None][:2]


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def arguments(home: Path, strategy: str, more: dict[str, Any] | None = None) -> list[str]:
    """Returns the command line of a run of two steps, with further settings."""
    settings = {
        "model.model_name_or_path": home / "model", "model.rank": 4, "data.dataset": home / "rows.jsonl", "data.val_size": 0,
        "data.batch_size": 2, "trainer.accelerator": "cpu", "trainer.devices": 2, "trainer.strategy": strategy,
        "trainer.max_steps": 2, "trainer.default_root_dir": home / "runs", "trainer.enable_progress_bar": "false",
    }  # fmt: skip
    plain = {"sampling": "null", "trainer.enable_checkpointing": "false", "trainer.logger": "false"}
    settings |= plain if more is None else more
    return ["fit", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


if __name__ == "__main__":
    sys.exit(main())
