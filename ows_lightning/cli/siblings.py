"""Ends this process when another one of its run on this machine has ended before its time, wherever this one waits for it.

A collective notices that a process is gone; a rendezvous, torch's store and a computation don't, for up to half an hour.
So the processes that a launcher starts connect to each other before they load any library, by names that Linux forgets with
the process (abstract Unix sockets), and a thread waits for the end of a connection. Other systems have no such names.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time

from ows_lightning.errors import RunError

PATIENCE = 40.0  # seconds that the others may have started later than this one
GRACE = 25.0  # seconds for this process to end by itself, as it does where it waits in a collective
_RUN = "OWS_RUN"  # names the run in the environment of processes that this one starts
_SHARED = (
    "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "GROUP_RANK", "NODE_RANK",
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID",
)  # fmt: skip
"""What the processes of one run on one machine have in common, and those of other runs have not."""
_DONE = b"."

_watch: _Watch | None = None
_code: int | None = None  # to end with at once


def watch() -> None:
    """Begins to watch, where the environment says which one of several processes this is."""
    global _watch
    atexit.unregister(_end_at_once)
    atexit.register(_end_at_once)  # before any library registers something, so that this comes last
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or ""
    run = os.environ.get(_RUN) or "/".join(os.environ.get(name, "") for name in _SHARED)
    if sys.platform == "linux" and _watch is None and rank.isdigit() and run.strip("/"):
        _watch = _Watch(run, int(rank), int(os.environ.get("LOCAL_WORLD_SIZE") or 0))


def expect(number: int) -> None:
    """Lets this process, one of a number that it may start itself, end if not all are there `PATIENCE` after it."""
    global _watch
    if _watch is not None:
        _watch.number = number
    elif sys.platform == "linux" and number > 1:
        os.environ[_RUN] = str(os.getpid())
        _watch = _Watch(os.environ[_RUN], 0, number)


def leave(ends: bool = False) -> None:
    """Ends the watch, so that the others don't mind the end of this process; a RunError if one of them is gone already.

    Args:
        ends: The program is through. Nobody watches its end, which takes seconds of a processor, a minute of a busy machine.
    """
    global _code
    if _watch is None:
        return
    if gone := _watch.leave(_DONE):
        raise RunError(f"{gone} before this one was through; its own output says why")
    _code = 0 if ends else None


def end_early(code: int) -> None:
    """Tells the others that this process ends before its time, and sees to it that it does, with an exit code."""
    global _code
    if _watch is None:
        return
    _code = code
    _watch.leave(b"")
    # By a thread of C: what waits in C++ may hold Python up. Whatever is collected on the way may wait for the others.
    faulthandler.dump_traceback_later(GRACE, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115 (until the end)


def _end_at_once() -> None:
    """Ends this process without the interpreter's own end.

    That collects process groups which an error's stack trace or a mesh still holds, and waits for gloo's threads, which
    after an error wait for the interpreter in turn: forever.
    """
    if _code is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(_code or int(hasattr(sys, "last_value")))  # an exception that came after a good end


class _Watch:
    """Connections to the other processes of this machine, and the thread that watches them.

    Each process connects to those of lower rank, and says its own; before it ends in good order it says so. An end without
    that is one before its time.
    """

    def __init__(self, run: str, rank: int, number: int) -> None:
        self._run, self._rank, self.number = run, rank, number  # 0 processes where it is not known how many they are
        self._links: dict[int, socket.socket] = {}  # by the rank of the other
        self._met = {rank}
        self._late = time.monotonic() + PATIENCE
        self._grace = GRACE
        self._gone = ""  # what is wrong with whom
        self._left = threading.Event()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(self._name(rank))
        except OSError:  # another run has this one's port
            self._left.set()
            return
        self._listener.listen(64)
        self._listener.setblocking(False)
        os.register_at_fork(after_in_child=self._close)  # a worker that outlives its process would keep the links
        threading.Thread(target=self._wait, name="siblings", daemon=True).start()

    def _name(self, rank: int) -> str:
        return f"\0ows-lightning/{os.getuid()}/{self._run}/{rank}"

    def leave(self, word: bytes) -> str:
        """Takes leave with a last word; returns what is said of one that has ended before, if there is one."""
        with self._lock:
            if not self._left.is_set() and not self._gone:
                self._gone = self._look()
            self._left.set()
            for link in self._links.values():
                with contextlib.suppress(OSError):
                    link.send(word)
            self._close()
        return self._gone

    def _close(self) -> None:
        for link in (*self._links.values(), self._listener):
            link.close()

    def _wait(self) -> None:
        while not self._left.is_set() and not self._gone:
            with self._lock:
                if not self._left.is_set():
                    self._gone = self._look()
            self._left.wait(0.5)
        if not self._gone:
            return
        os.write(2, f"{self._gone}, its own output says why; this one ends, too\n".encode())
        if not self._left.wait(self._grace):
            os.write(2, f"error: {self._gone}, and this one waited for it\n".encode())
            os._exit(1)

    def _look(self) -> str:
        """Meets who has come; returns what is said of one that has ended before its time or has not come, if there is one."""
        for rank in range(self._rank):
            if rank not in self._met:
                link = socket.socket(socket.AF_UNIX)
                try:
                    link.connect(self._name(rank))
                    link.send(bytes([self._rank]))
                    self._meet(rank, link)
                except OSError:  # not yet
                    link.close()
        with contextlib.suppress(BlockingIOError):  # no more have come
            while True:
                link, _ = self._listener.accept()
                link.settimeout(1)
                with contextlib.suppress(TimeoutError):
                    if word := link.recv(1):
                        self._meet(word[0], link)
        for rank, link in [*self._links.items()]:
            try:
                word = link.recv(1)
            except BlockingIOError:  # it is there, and says nothing
                continue
            except OSError:  # it ended before it had read what was sent
                word = b""
            if word != _DONE:
                return f"another process of this run (local rank {rank}) has ended"
            link.close()
            del self._links[rank]
        missing = next((rank for rank in range(self.number) if rank not in self._met), None)
        if missing is None or time.monotonic() <= self._late:
            return ""
        self._grace = 0.0  # nothing has begun yet that this process could end
        return f"another process of this run (local rank {missing}) was not there within {PATIENCE:.0f} s"

    def _meet(self, rank: int, link: socket.socket) -> None:
        link.setblocking(False)
        self._met.add(rank)
        self._links[rank] = link
