"""Processes of a run notice each other's end, wherever they wait."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.launch import free_port

WATCHES = """
import os, sys, time
from ows_lightning.cli import peer_watchdog
peer_watchdog.EXIT_TIMEOUT = {exit_timeout}
peer_watchdog.start()
while len(peer_watchdog._watchdog._connected) < {peers}:
    time.sleep(0.01)
print(flush=True)
sys.stdin.readline()
"""
HANGS = "__import__('ctypes').PyDLL(None).sleep(60)"  # in C, where no other thread of Python gets a turn
SLEEPS = "print(flush=True); time.sleep(60)"
FORKS = f"os.fork(); {SLEEPS}"


class Pair:
    """Processes that run some code each, once all watch, and end `exit_timeout` seconds after the end of another one."""

    def __init__(self, *codes: str, exit_timeout: float = 0.2) -> None:
        run = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank, code in enumerate(codes):
            meets = WATCHES.format(peers=len(codes) if len(codes) > 1 else 0, exit_timeout=exit_timeout) + code
            environment = {**os.environ, **run, "LOCAL_RANK": str(rank)}
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen([sys.executable, "-c", meets], env=environment, **streams))  # type: ignore[call-overload]
        for process in self.processes:
            process.stdout.readline()  # it watches
        for process in self.processes:
            process.stdin.write("\n")
            process.stdin.flush()

    def end(self, rank: int) -> tuple[int, str]:
        """Returns how a process ended, and what it said."""
        try:
            _, said = self.processes[rank].communicate(timeout=20)
            return self.processes[rank].returncode, said
        finally:
            for process in self.processes:
                process.kill()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("code", [SLEEPS, FORKS], ids=["sleeps", "forks"])
def test_a_process_ends_when_its_sibling_was_killed(victim: int, code: str) -> None:
    """A worker that the killed one forked lives on, and does not hide its end."""
    codes = [SLEEPS] * 2
    codes[victim] = code
    pair = Pair(*codes)
    pair.processes[victim].stdout.readline()  # it has forked
    pair.processes[victim].kill()
    end, said = pair.end(1 - victim)
    assert end == 1
    assert f"another process of this run (local rank {victim}) has ended" in said


def test_a_good_end_is_none_to_mind() -> None:
    pair = Pair("while peer_watchdog._watchdog._peers: time.sleep(0.01)\npeer_watchdog.stop()", "peer_watchdog.stop()")
    assert pair.end(0) == (0, "")


def test_an_end_in_a_collective_is_left_to_it() -> None:
    """Where the main thread notices by itself, its own error and exit code stand."""
    notices = "while not peer_watchdog._watchdog._failure: time.sleep(0.01)\nraise SystemExit(3)"
    assert Pair(notices, "raise SystemExit(2)", exit_timeout=60).end(0)[0] == 3


def test_who_was_never_started_is_missed() -> None:
    pair = Pair(
        "peer_watchdog.set_local_world_size(2); time.sleep(60)".replace(
            "peer_watchdog.", "peer_watchdog._watchdog._start_deadline = 0; peer_watchdog.", 1
        )
    )
    end, said = pair.end(0)
    assert end == 1
    assert "another process of this run (local rank 1) was not there within" in said


@pytest.mark.parametrize(
    ("job", "watches"), [({}, False), ({"NTASKS": "2", "JOB_NAME": "bash"}, False), ({"NTASKS": "2"}, True)]
)
def test_a_batch_script_without_srun_is_one_process(job: dict[str, str], watches: bool) -> None:
    """SLURM gives it a local rank, and Lightning starts the others itself."""
    code = "from ows_lightning.cli import peer_watchdog; peer_watchdog.start(); print(peer_watchdog._watchdog is not None)"
    names = {"LOCALID": "0", "JOB_ID": "77", **job}
    environment = {**os.environ, **{f"SLURM_{name}": value for name, value in names.items()}}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{watches}\n"


def test_a_process_that_can_not_end_is_ended() -> None:
    pair = Pair(f"peer_watchdog.abort(2); {HANGS}", "time.sleep(60)")
    assert pair.end(0)[0] == 1


def test_an_error_ends_without_what_the_interpreter_would_wait_for() -> None:
    """As it would for a process group that a stack trace holds, whose threads wait for the interpreter."""
    code = (
        f"import sys; sys.held = type('Held', (), {{'__del__': lambda _: {HANGS}}})(); peer_watchdog.abort(2); print('said')"
    )
    assert Pair(code, "time.sleep(60)", exit_timeout=60).end(0)[0] == 2


@pytest.mark.parametrize(("after", "code"), [("", 0), ("; raise ValueError", 1)])
def test_a_good_end_takes_no_time_that_nobody_watches(after: str, code: int) -> None:
    held = f"import sys; sys.held = type('Held', (), {{'__del__': lambda _: {HANGS}}})()"
    end, said = Pair(f"{held}; peer_watchdog.stop(program_ends=True){after}", "peer_watchdog.stop()").end(0)
    assert end == code
    assert ("ValueError" in said) == bool(code)


def test_a_program_that_goes_on_after_its_run_keeps_its_exit_code() -> None:
    pair = Pair("peer_watchdog.stop(); raise SystemExit(3)", "peer_watchdog.stop()")
    assert pair.end(0)[0] == 3


@pytest.mark.slow
def test_rank_0_is_killed_in_its_teardown(tmp_path: Path) -> None:
    """Lightning has started the other one, which is as far, and waits, leaves or has left."""
    from tests.distributed.many_ends import STARTED_BY, kill, prepare

    def draw(seed: int) -> tuple[str, int]:
        drawn = random.Random(seed)
        by, _ = drawn.choice(STARTED_BY), drawn.choice(["fsdp2", "ddp_layerwise"])
        return by, drawn.randrange(2)

    prepare(tmp_path)
    seeds = [seed for seed in range(200) if draw(seed) == ("lightning", 0)][:3:2]
    with ThreadPoolExecutor() as pool:  # most of the time these runs wait
        found = [*pool.map(lambda seed: kill(tmp_path, random.Random(seed), ["teardown"]), seeds)]
    assert not [end for end in found if end.startswith("wrong")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_of_a_run(seed: int, tmp_path: Path) -> None:
    """``python -m tests.distributed.many_ends 60 --kill`` does more of it."""
    from tests.distributed.many_ends import kill, prepare

    prepare(tmp_path)
    assert not kill(tmp_path, random.Random(f"{os.environ.get('OWS_TEST_SEED', 0)}-{seed}")).startswith("wrong")
