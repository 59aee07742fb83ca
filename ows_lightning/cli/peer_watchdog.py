"""Watchdog for the processes of one run on this machine: if one dies, the others exit, even where they hang.

A collective notices that a process is gone; a rendezvous, torch's store and a computation don't, for up to half an hour.
So the processes that a launcher starts connect to each other before they load any library, by names that Linux forgets with
the process (abstract Unix sockets), and a thread waits for the end of a connection. Other systems have no such names.
"""

import atexit
import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time

from ows_lightning.errors import RunError

START_TIMEOUT = 40.0  # seconds that the others may have started later than this one
EXIT_TIMEOUT = 25.0  # seconds for this process to end by itself, as it does where it waits in a collective
_RUN_ID_VARIABLE = "OWS_RUN"  # names the run in the environment of processes that this one starts
_RUN_ID_PARTS = (
    "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "GROUP_RANK", "NODE_RANK",
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID",
)  # fmt: skip
"""What the processes of one run on one machine have in common, and those of other runs have not."""
_GOODBYE = b"."
_watchdog: "_Watchdog | None" = None


def start() -> None:
    """Starts the watchdog, where the environment says which one of several processes this is."""
    global _watchdog
    atexit.unregister(_exit_at_once)
    atexit.register(_exit_at_once)  # before any library registers something, so that this comes last
    launches_itself = "SLURM_NTASKS" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    rank = os.environ.get("LOCAL_RANK") or ("" if launches_itself else os.environ.get("SLURM_LOCALID", ""))
    run = os.environ.get(_RUN_ID_VARIABLE) or "/".join(os.environ.get(name, "") for name in _RUN_ID_PARTS)
    if sys.platform == "linux" and _watchdog is None and rank.isdigit() and run.strip("/"):
        _watchdog = _Watchdog(run, int(rank), int(os.environ.get("LOCAL_WORLD_SIZE") or 0))


def set_local_world_size(world_size: int) -> None:
    """Says how many processes the run has here, all to be there by `START_TIMEOUT`; the launching one starts its watchdog."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.world_size = world_size
    elif sys.platform == "linux" and world_size > 1:
        os.environ[_RUN_ID_VARIABLE] = f"{os.getpid()}/{time.monotonic_ns()}"  # containers may share process numbers
        _watchdog = _Watchdog(os.environ[_RUN_ID_VARIABLE], 0, world_size)


def stop(program_ends: bool = False) -> None:
    """Stops the watchdog, so that the others don't mind the end of this process; a RunError if one of them died before.

    If the ``program_ends``, it does so at once: its end takes seconds of a processor, a minute of a busy machine.
    """
    if _watchdog is None:
        return
    if failure := _watchdog.stop(_GOODBYE):
        raise RunError(f"{failure} before this one was through; its own output says why")
    _watchdog.exit_code = 0 if program_ends else None


def abort(code: int) -> None:
    """Closes the connections, so that the others exit, and makes sure that this process exits with a code, too."""
    if _watchdog is None:
        return
    _watchdog.exit_code = code
    _watchdog.stop(b"")
    # Its timer is a thread of C, which fires even if C++ code, or a destructor that waits for the others, blocks Python.
    faulthandler.dump_traceback_later(EXIT_TIMEOUT, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115 (until the end)


def _exit_at_once() -> None:
    """Exits without the interpreter's shutdown, if `stop` or `abort` has set an exit code.

    Shutdown would wait for gloo's threads, which after an error wait for the interpreter: a deadlock.
    """
    if _watchdog is not None and _watchdog.exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(_watchdog.exit_code or int(hasattr(sys, "last_value")))  # an exception that came after a good end


class _Watchdog:
    """Connections to the other processes of this machine, and the thread that watches them.

    Each process connects to those of lower rank, and says its own; before it ends in good order it says so.
    """

    def __init__(self, run: str, rank: int, world_size: int) -> None:
        self._run, self._rank = run, rank
        self.world_size = world_size  # processes of the run on this machine; 0 where it is not known
        self.exit_code: int | None = None  # with which this process is to end at once
        self._peers: dict[int, socket.socket] = {}  # by the rank of the other
        self._connected = {rank}
        self._start_deadline, self._exit_timeout = time.monotonic() + START_TIMEOUT, EXIT_TIMEOUT
        self._failure = ""  # what is wrong with whom
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(self._name(rank))
        except OSError:  # another run has this one's port
            self._stopped.set()
            return
        self._listener.listen(64)
        self._listener.setblocking(False)
        os.register_at_fork(after_in_child=self._close)  # a worker that outlives its process would keep the links
        threading.Thread(target=self._watch_loop, name="peer_watchdog", daemon=True).start()

    def _name(self, rank: int) -> str:
        return f"\0ows-lightning/{os.getuid()}/{self._run}/{rank}"

    def stop(self, message: bytes) -> str:
        """Sends a last byte to all peers and closes; returns the failure of a peer that died before, or an empty text."""
        with self._lock:
            if not self._stopped.is_set() and not self._failure:
                self._failure = self._poll()
            self._stopped.set()
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.send(message)
            self._close()
        return self._failure

    def _close(self) -> None:
        for peer in (*self._peers.values(), self._listener):
            peer.close()

    def _watch_loop(self) -> None:
        while not self._stopped.is_set() and not self._failure:
            with self._lock:
                if not self._stopped.is_set():
                    self._failure = self._poll()
            self._stopped.wait(0.5)
        if not self._failure:
            return
        os.write(2, f"{self._failure}, its own output says why; this one ends, too\n".encode())
        if not self._stopped.wait(self._exit_timeout):
            os.write(2, f"error: {self._failure}, and this one waited for it\n".encode())
            os._exit(1)

    def _poll(self) -> str:
        """Connects to new peers; returns the failure of a peer that died or did not come in time, or an empty text."""
        for rank in (rank for rank in range(self._rank) if rank not in self._connected):
            peer = socket.socket(socket.AF_UNIX)
            try:
                peer.connect(self._name(rank))
                peer.send(bytes([self._rank]))
                self._add_peer(rank, peer)
            except OSError:  # not yet
                peer.close()
        with contextlib.suppress(BlockingIOError):  # no more have come
            while True:
                peer, _ = self._listener.accept()
                peer.settimeout(1)
                with contextlib.suppress(TimeoutError):
                    if word := peer.recv(1):
                        self._add_peer(word[0], peer)
        for rank, peer in [*self._peers.items()]:
            try:
                word = peer.recv(1)
            except BlockingIOError:  # it is there, and says nothing
                continue
            except OSError:  # it ended before it had read what was sent
                word = b""
            if word != _GOODBYE:
                return f"another process of this run (local rank {rank}) has ended"
            peer.close()
            del self._peers[rank]
        missing = next((rank for rank in range(self.world_size) if rank not in self._connected), None)
        if missing is None or time.monotonic() <= self._start_deadline:
            return ""
        self._exit_timeout = 0.0  # nothing has begun yet that this process could end
        return f"another process of this run (local rank {missing}) was not there within {START_TIMEOUT:.0f} s"

    def _add_peer(self, rank: int, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._connected.add(rank)
        self._peers[rank] = peer
