"""The report of a run that goes on, served on the loopback interface and drawn anew whenever the run wrote something."""

import tempfile
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ows_lightning.errors import UsageError
from ows_lightning.report.run import newest_run
from ows_lightning.report.write import CONTENT_SECURITY_POLICY, render, write_report

REFRESH = 3  # seconds after which the page asks for itself again


class Page:
    """A run's page, drawn into another folder, ``output``; a browser gets this page and its CSV files, and nothing else."""

    def __init__(self, run: Path, output: Path) -> None:
        self.run, self.output = run, output
        self._drawing = threading.Lock()
        self._drawn: set[tuple[str, int, int]] = set()
        self._html = self._note("The run has logged nothing yet.")

    def get(self, path: str) -> tuple[str, bytes] | None:
        """Returns the type and the content of the page or of a file of numbers beside it, None for any other path."""
        name = path.partition("?")[0].removeprefix("/")
        if name in ("", "report.html"):
            return "text/html; charset=utf-8", self.html().encode()
        if name in {file.name for file in self.output.glob("*.csv")}:
            return "text/csv; charset=utf-8", (self.output / name).read_bytes()
        return None

    def html(self) -> str:
        """Returns the page, drawn anew if the run's files changed."""
        with self._drawing:
            if (files := self._files()) != self._drawn:
                try:
                    self._html = write_report([self.run], self.output, refresh=REFRESH).read_text(encoding="utf-8")
                except UsageError as error:  # a file that is being written, or no figures yet: the next request may find more
                    self._html = self._html if self._drawn else self._note(str(error))
                self._drawn = files
            return self._html

    def _note(self, text: str) -> str:
        return render(f"Run {self.run}", refresh=REFRESH, note=text)

    def _files(self) -> set[tuple[str, int, int]]:
        """The files of the run that a report is made from, with size and time of the last change."""
        patterns = [f"{folder}{name}" for folder in ("", "version_*/") for name in ("*.csv", "*.json", "*.jsonl", "*.yaml")]
        try:
            files = {str(file): file.stat() for pattern in patterns for file in self.run.glob(pattern)}
        except FileNotFoundError:  # one is being replaced: draw again
            return set()
        return {(name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items()}


def serve(page: Page, port: int) -> ThreadingHTTPServer:
    """Returns a server of the page on 127.0.0.1, which answers only GET and HEAD, and only under that name."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host") not in hosts:  # another site's name may resolve to 127.0.0.1
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            if (found := page.get(self.path)) is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            kind, content = found
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing of each request."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UsageError(f"port: can't listen on 127.0.0.1:{port} ({error}); give another, or leave it out") from error
    hosts = {f"{name}:{server.server_address[1]}" for name in ("127.0.0.1", "localhost")}
    return server


def watch(run: Path, port: int = 0) -> None:
    """Serves a run's page until the run ends or the user interrupts; of a run that has ended, until the user does."""
    if not run.is_dir():
        raise UsageError(f"{run}: no such folder; give the folder that a run writes to")
    with tempfile.TemporaryDirectory() as output, serve(Page(run, Path(output)), port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            print(f"{run}: http://127.0.0.1:{server.server_address[1]}/ (until a run in progress ends, or Ctrl-C)", flush=True)
            was_running = False
            while (running := is_running(run)) or not was_running:
                was_running = was_running or running
                time.sleep(1)
            time.sleep(2 * REFRESH)  # a page that is open shows the end
            print("The run has ended.")
        except KeyboardInterrupt:
            print("Stopped.")
        finally:
            server.shutdown()


def is_running(run: Path) -> bool:
    """Whether a process holds the lock of the run's folder."""
    try:
        if (lock := newest_run(run) / ".lock").is_file():
            with FileLock(lock, timeout=0):
                pass
    except OSError as error:  # else there is no folder any more, or the lock is another user's
        return isinstance(error, Timeout)
    return False
