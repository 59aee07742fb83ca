"""Runs of the command line in processes of their own, which can be several ranks, and can be killed."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

Target = Callable[[list[str]], None]

# A server imports everything once; each process is a fork of it, and starts in a moment.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "ows_lightning.cli.lightning_cli", "tests.distributed.probe", "datasets", "scipy.optimize",
        "transformers.models.llama.modeling_llama", "tests.distributed.warm",
    ]
)  # fmt: skip


def main_without_prediction(arguments: list[str]) -> None:
    """Runs the command line, but for the prediction of memory, which takes longer than these runs."""
    from ows_lightning.callbacks.run_summary import RunSummary
    from ows_lightning.cli.main import main

    with mock.patch.object(RunSummary, "_memory_text", return_value="not predicted in tests"):
        main(arguments)


def _run(target: Target, arguments: Sequence[str], environment: dict[str, str], output: str, file_bytes: int | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable()  # a crash in a native library shows where this process was
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    # As in a process that was started from a shell; workers of the server's kind would outlive a run that is killed.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    sys.argv = ["main.py"]

    import datasets
    import torch

    from ows_lightning.callbacks import run_folder

    datasets.config.HF_DATASETS_CACHE = Path(environment["HF_DATASETS_CACHE"])  # which is imported already
    torch.set_num_threads(1)
    with mock.patch.object(run_folder, "write_pictures", return_value=[]):  # they take longer than these runs, too
        target(list(arguments))


class Launch:
    """Processes that run the command line, as ``torchrun`` would start them.

    Args:
        arguments: The command line.
        folder: Where the processes' output goes.
        ranks: How many processes.
        file_bytes: Longest file that they can write, in the place of a full disk.
        target: What runs in the place of the command line.
        environment: Further variables of the processes; with SLURM's, it is SLURM that started them.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        ranks: int = 1,
        file_bytes: int | None = None,
        target: Target = main_without_prediction,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"rank{rank}.txt" for rank in range(ranks)]
        self.processes: list[BaseProcess] = []
        port = free_port()
        for rank, output in enumerate(self.outputs):
            variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
            if environment and "SLURM_NTASKS" in environment:
                variables |= {
                    "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            elif ranks > 1:
                variables |= {
                    "TORCHELASTIC_RUN_ID": "tests", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
                    "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }  # fmt: skip
            variables |= environment or {}
            process = context.Process(target=_run, args=(target, list(arguments), variables, str(output), file_bytes))
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 600) -> list[int | None]:
        """Waits for all processes, and returns their exit codes; those that are still there then are killed (None)."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        """Sends SIGKILL to all processes."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.join()

    @property
    def output(self) -> str:
        """What the processes printed."""
        return "\n".join(output.read_text() for output in self.outputs if output.exists())


def run(
    arguments: Sequence[str], folder: Path, ranks: int = 1, timeout: float = 600, target: Target = main_without_prediction
) -> str:
    """Runs the command line to its end, which has to be a good one, and returns what it printed."""
    launch = Launch(arguments, folder, ranks, target=target)
    codes = launch.wait(timeout)
    assert codes == [0] * ranks, f"{codes}\n{launch.output[-3000:]}"
    return launch.output


def free_port() -> int:
    """A port that nothing listens on, below those that the system hands out by itself: it stays free until it is used.

    That takes seconds, in which others may ask: each worker of pytest-xdist has ports of its own.
    """
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:], os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    while True:
        port = random.SystemRandom().randrange(10_000 + int(worker), 32_000, int(workers))
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
