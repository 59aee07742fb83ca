"""The page of a run that goes on: read-only, on the loopback interface, and gone with the run."""

from __future__ import annotations

import csv
import http.client
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from filelock import FileLock

from ows_lightning.errors import UsageError
from ows_lightning.report.watch import Page, serve, watch
from tests.report.test_html import BROWSER

ROOT = Path(__file__).parents[2]


@pytest.fixture
def served(tmp_path, make_run):
    """A run's folder, its page, and the page's address."""
    run = make_run(tmp_path / "run", steps=200)
    (tmp_path / "drawn").mkdir()
    page = Page(run, tmp_path / "drawn")
    server = serve(page, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert server.server_address[0] == "127.0.0.1"
    yield run, page, server.server_address[1]
    server.shutdown()
    server.server_close()


def get(port: int, path: str = "/") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=600) as answer:
        return answer.read().decode()


def test_the_page_follows_the_run(served):
    run, _, port = served
    first = get(port)
    assert '<meta http-equiv="refresh"' in first
    assert first.count("<img") == 8
    assert get(port) == first
    metrics = run / "metrics.csv"
    whole = metrics.read_text()
    metrics.write_text(whole[:-20])  # a row that is being written is left out
    assert get(port).count("<img") == 8
    metrics.write_text(whole + "x\n")  # damaged: the page stays as it was
    assert get(port).count("<img") == 8
    with (run / "generations.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "prompt", "answer"], [7, "who?", "<b>me</b>\nand you"]])
    metrics.write_text(whole)
    later = get(port)
    assert "&lt;b&gt;me&lt;/b&gt;\nand you" in later
    assert "Answers while it trained" in later


def test_the_server_reads_alone_and_shows_the_page_alone(served):
    run, _, port = served
    get(port)
    assert get(port, "/loss.csv").startswith("run,")
    for path in ("/metrics.csv", "/../run/config.yaml", "/..%2frun%2fconfig.yaml", "/config.yaml", "//etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(port, path)
    before = {path: path.read_bytes() for path in run.iterdir()}
    for method in ("POST", "PUT", "DELETE"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request(method, "/", body="x")
        assert connection.getresponse().status == 501
        connection.close()
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_a_site_whose_name_leads_here_reads_nothing(served):
    connection = http.client.HTTPConnection("127.0.0.1", served[2], timeout=600)
    connection.request("GET", "/", headers={"Host": f"elsewhere.example:{served[2]}"})
    assert connection.getresponse().status == 403
    connection.close()


def test_a_run_without_figures_has_a_page(tmp_path):
    (tmp_path / "run" / "version_0").mkdir(parents=True)
    assert "refresh" in Page(tmp_path / "run", tmp_path).html()


def test_what_can_not_be_watched(tmp_path, served):
    with pytest.raises(UsageError, match="no such folder"):
        watch(tmp_path / "nothing")
    with pytest.raises(UsageError, match="give another"):
        serve(served[1], served[2])


def start(run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "main.py"), "report", "--watch", str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_it_stops_with_the_run(tmp_path, make_run):
    run = make_run(tmp_path / "run", steps=100)
    with FileLock(run / ".lock"):
        process = start(run)
        assert "http://127.0.0.1:" in process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
    out, _ = process.communicate(timeout=600)
    assert (process.returncode, out) == (0, "The run has ended.\n")


@pytest.mark.slow
def test_it_stops_at_ctrl_c(tmp_path, make_run):
    process = start(make_run(tmp_path / "run", steps=100))
    assert "http://127.0.0.1:" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=600)
    assert (process.returncode, out) == (0, "Stopped.\n")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_a_browser_shows_it(served, tmp_path):
    _, _, port = served
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", f"http://127.0.0.1:{port}/"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    assert shown.count("<img") == 8
